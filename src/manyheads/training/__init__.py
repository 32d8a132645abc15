"""Ways to train that work on any mechanism: wrappers called as the mechanism is, hooks, and losses on its weights."""

from manyheads.training.adversarial import adversarial_attention_loss
from manyheads.training.entropy import EntropyMaximised, negative_attention_entropy
from manyheads.training.hard_instances import HardInstanceMining
from manyheads.training.head_mask import HeadMask
from manyheads.training.subsampled import SubsampledAttention, sampling
from manyheads.training.token_pooling import TokenAwarePooling, attention_diversification
from manyheads.training.virtual_adversarial import virtual_adversarial_attention_loss

__all__ = [
    "EntropyMaximised",
    "HardInstanceMining",
    "HeadMask",
    "SubsampledAttention",
    "TokenAwarePooling",
    "adversarial_attention_loss",
    "attention_diversification",
    "negative_attention_entropy",
    "sampling",
    "virtual_adversarial_attention_loss",
]
