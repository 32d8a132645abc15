"""Ways to train that work on any mechanism: wrappers called as the mechanism is, hooks, and losses on its weights."""

from manyheads.training.entropy import EntropyMaximised, negative_attention_entropy
from manyheads.training.hard_instances import HardInstanceMining
from manyheads.training.head_mask import HeadMask
from manyheads.training.relations import minilm_loss, relation_loss
from manyheads.training.subsampled import SubsampledAttention, sampling
from manyheads.training.token_pooling import TokenAwarePooling, attention_diversification

__all__ = [
    "EntropyMaximised",
    "HardInstanceMining",
    "HeadMask",
    "SubsampledAttention",
    "TokenAwarePooling",
    "attention_diversification",
    "minilm_loss",
    "negative_attention_entropy",
    "relation_loss",
    "sampling",
]
