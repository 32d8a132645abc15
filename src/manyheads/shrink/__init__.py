"""Smaller key-value caches for Hugging Face models, per head and for real."""

from manyheads.shrink.policies import H2O, TOVA, AdaKV, Duo, Full, KeyNorm, PyramidKV, SnapKV, StreamingLLM
from manyheads.shrink.policy import Policy, release

__all__ = [
    "H2O",
    "TOVA",
    "AdaKV",
    "Duo",
    "Full",
    "KeyNorm",
    "Policy",
    "PyramidKV",
    "SnapKV",
    "StreamingLLM",
    "release",
]
