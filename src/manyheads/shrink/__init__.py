"""Smaller key-value caches for Hugging Face models, per head and for real."""

from typing import Any

from manyheads.shrink import hints
from manyheads.shrink.channels import ThinK
from manyheads.shrink.policies import (
    CUR,
    H2O,
    TOVA,
    AdaKV,
    ChunkKV,
    Compactor,
    Composed,
    CriticalKV,
    Duo,
    ExpectedAttention,
    FastKVzip,
    Finch,
    Full,
    KeyDiff,
    KeyNorm,
    KVzip,
    LagKV,
    Leverage,
    LoCoCo,
    LongHeads,
    MoA,
    NonCausal,
    PyramidKV,
    QFilters,
    Razor,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    fit_lococo,
    fit_q_filters,
    plan_spans,
)
from manyheads.shrink.policy import Policy, release
from manyheads.shrink.quantised import Quantised
from manyheads.shrink.template import ChatTemplate

__all__ = [
    "CUR",
    "H2O",
    "TOVA",
    "AdaKV",
    "ChatTemplate",
    "ChunkKV",
    "Compactor",
    "Composed",
    "CriticalKV",
    "Duo",
    "ExpectedAttention",
    "FastKVzip",
    "Finch",
    "Full",
    "KVzip",
    "KeyDiff",
    "KeyNorm",
    "LagKV",
    "Leverage",
    "LoCoCo",
    "LongHeads",
    "MoA",
    "NonCausal",
    "Policy",
    "PyramidKV",
    "QFilters",
    "Quantised",
    "Razor",
    "SimLayerKV",
    "SnapKV",
    "StreamingLLM",
    "ThinK",
    "TidalDecode",
    "fit_lococo",
    "fit_q_filters",
    "plan_spans",
    "release",
]


def __getattr__(name: str) -> Any:
    told = hints.of_press(name, __all__)
    if told is not None:
        # An AttributeError's words would be lost on the way to who imports.
        raise ImportError(told)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
