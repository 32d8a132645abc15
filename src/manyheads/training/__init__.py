"""Ways to train that work on any mechanism: wrappers called as the mechanism is, hooks, and losses on its weights."""

from manyheads.training.adversarial import adversarial_attention_loss
from manyheads.training.alignment import alignment, alignment_loss, monotone_alignment, same_number, sentence_mask
from manyheads.training.anchored_contrast import anchored_contrast
from manyheads.training.branch_labels import BranchLabels
from manyheads.training.buckets import (
    Bucket,
    BucketBatches,
    batch_sizes,
    bucket_of,
    length_buckets,
    measured_peak,
    padding_share,
)
from manyheads.training.deceptive import DeceptionReport, deception_report, deceptive_attention_loss
from manyheads.training.dense_reward import attention_reward, generator_reward
from manyheads.training.drop_key import drop_key
from manyheads.training.entropy import EntropyMaximised, negative_attention_entropy
from manyheads.training.episodic import Episodes, EpisodicPolicy, play, policy_loss, train_on_bandits
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
from manyheads.training.lamb import Lamb, lamb_groups
from manyheads.training.multi_route import MultiRoute, one_to_many
from manyheads.training.relations import minilm_loss, relation_loss
from manyheads.training.sink_token import add_sink_token, with_sink_token
from manyheads.training.subsampled import LocallySubsampled, SubsampledAttention, locally_subsampled, sampling
from manyheads.training.token_pooling import TokenAwarePooling, attention_diversification
from manyheads.training.virtual_adversarial import virtual_adversarial_attention_loss
from manyheads.training.visual_factors import VisualFactors, image_numbers

__all__ = [
    "BranchLabels",
    "Bucket",
    "BucketBatches",
    "DeceptionReport",
    "EntropyMaximised",
    "Episodes",
    "EpisodicPolicy",
    "HardInstanceMining",
    "HeadMask",
    "Lamb",
    "LocallySubsampled",
    "MultiRoute",
    "SubsampledAttention",
    "TokenAwarePooling",
    "VisualFactors",
    "add_sink_token",
    "adversarial_attention_loss",
    "alignment",
    "alignment_loss",
    "anchored_contrast",
    "attention_diversification",
    "attention_reward",
    "batch_sizes",
    "bucket_of",
    "deception_report",
    "deceptive_attention_loss",
    "drop_key",
    "generator_reward",
    "guided_heads",
    "image_numbers",
    "lamb_groups",
    "length_buckets",
    "locally_subsampled",
    "measured_peak",
    "minilm_loss",
    "monotone_alignment",
    "negative_attention_entropy",
    "neighbours",
    "one_to_many",
    "padding_share",
    "pattern_relevance",
    "play",
    "policy_loss",
    "relation_loss",
    "same_number",
    "same_sentence",
    "sampling",
    "sentence_mask",
    "sentence_numbers",
    "token_match",
    "train_on_bandits",
    "virtual_adversarial_attention_loss",
    "with_sink_token",
]
