"""Ways to train that work on any mechanism: wrappers called as the mechanism is, hooks, and losses on its weights."""

from manyheads.training.adversarial import adversarial_attention_loss
from manyheads.training.deceptive import DeceptionReport, deception_report, deceptive_attention_loss
from manyheads.training.dense_reward import attention_reward, generator_reward
from manyheads.training.entropy import EntropyMaximised, negative_attention_entropy
from manyheads.training.hard_instances import HardInstanceMining
from manyheads.training.head_mask import HeadMask
from manyheads.training.subsampled import LocallySubsampled, SubsampledAttention, locally_subsampled, sampling
from manyheads.training.token_pooling import TokenAwarePooling, attention_diversification
from manyheads.training.virtual_adversarial import virtual_adversarial_attention_loss

__all__ = [
    "DeceptionReport",
    "EntropyMaximised",
    "HardInstanceMining",
    "HeadMask",
    "LocallySubsampled",
    "SubsampledAttention",
    "TokenAwarePooling",
    "adversarial_attention_loss",
    "attention_diversification",
    "attention_reward",
    "deception_report",
    "deceptive_attention_loss",
    "generator_reward",
    "locally_subsampled",
    "negative_attention_entropy",
    "sampling",
    "virtual_adversarial_attention_loss",
]
