"""One sequence over many processes: attention on shards of the tokens, equal to that of one process."""

from manyheads.parallel.halo import tokens_before, windowed_attention
from manyheads.parallel.heads import heads_attention
from manyheads.parallel.layout import Layout
from manyheads.parallel.ring import ring_attention
from manyheads.parallel.shards import reduce_gradients, shard
from manyheads.parallel.states import state_attention
from manyheads.parallel.switch import sequence_parallel
from manyheads.parallel.wire import Traffic, traffic

__all__ = [
    "Layout",
    "Traffic",
    "heads_attention",
    "reduce_gradients",
    "ring_attention",
    "sequence_parallel",
    "shard",
    "state_attention",
    "tokens_before",
    "traffic",
    "windowed_attention",
]
