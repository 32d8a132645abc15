"""One sequence over many processes: attention on shards of the tokens, equal to that of one process."""

from manyheads.parallel.heads import heads_attention
from manyheads.parallel.layout import Layout
from manyheads.parallel.ring import ring_attention
from manyheads.parallel.states import state_attention
from manyheads.parallel.wire import Traffic, traffic

__all__ = ["Layout", "Traffic", "heads_attention", "ring_attention", "state_attention", "traffic"]
