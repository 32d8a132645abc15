"""Ways to train that work on any mechanism: wrappers called as the mechanism is, hooks, and losses on its weights."""

from manyheads.training.alignment import alignment, alignment_loss, monotone_alignment, same_number, sentence_mask
from manyheads.training.anchored_contrast import anchored_contrast
from manyheads.training.branch_labels import BranchLabels
from manyheads.training.drop_key import drop_key
from manyheads.training.entropy import EntropyMaximised, negative_attention_entropy
from manyheads.training.guided_heads import (
    guided_heads,
    neighbours,
    pattern_relevance,
    same_sentence,
    sentence_numbers,
    token_match,
)
from manyheads.training.hard_instances import HardInstanceMining
from manyheads.training.head_mask import HeadMask
from manyheads.training.multi_route import MultiRoute, one_to_many
from manyheads.training.subsampled import SubsampledAttention, sampling
from manyheads.training.token_pooling import TokenAwarePooling, attention_diversification
from manyheads.training.visual_factors import VisualFactors, image_numbers

__all__ = [
    "BranchLabels",
    "EntropyMaximised",
    "HardInstanceMining",
    "HeadMask",
    "MultiRoute",
    "SubsampledAttention",
    "TokenAwarePooling",
    "VisualFactors",
    "alignment",
    "alignment_loss",
    "anchored_contrast",
    "attention_diversification",
    "drop_key",
    "guided_heads",
    "image_numbers",
    "monotone_alignment",
    "negative_attention_entropy",
    "neighbours",
    "one_to_many",
    "pattern_relevance",
    "same_number",
    "same_sentence",
    "sampling",
    "sentence_mask",
    "sentence_numbers",
    "token_match",
]
