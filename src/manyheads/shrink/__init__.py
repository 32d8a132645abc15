"""Smaller key-value caches for Hugging Face models, per head and for real."""

from manyheads.shrink.policies import (
    H2O,
    TOVA,
    AdaKV,
    Duo,
    ExpectedAttention,
    Full,
    KeyNorm,
    LoCoCo,
    LongHeads,
    MoA,
    PyramidKV,
    Razor,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    fit_lococo,
    plan_spans,
)
from manyheads.shrink.policy import Policy, release
from manyheads.shrink.quantised import Quantised

__all__ = [
    "H2O",
    "TOVA",
    "AdaKV",
    "Duo",
    "ExpectedAttention",
    "Full",
    "KeyNorm",
    "LoCoCo",
    "LongHeads",
    "MoA",
    "Policy",
    "PyramidKV",
    "Quantised",
    "Razor",
    "SnapKV",
    "StreamingLLM",
    "TidalDecode",
    "fit_lococo",
    "plan_spans",
    "release",
]
