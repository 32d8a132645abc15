"""Smaller key-value caches for Hugging Face models, per head and for real."""

from typing import Any

from manyheads.shrink import hints
from manyheads.shrink.policies import (
    H2O,
    TOVA,
    AdaKV,
    Composed,
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
    "Composed",
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


def __getattr__(name: str) -> Any:
    told = hints.of_press(name, __all__)
    if told is not None:
        # An AttributeError's words would be lost on the way to who imports.
        raise ImportError(told)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
