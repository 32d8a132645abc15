"""One method, one file."""

from manyheads.shrink.policies.allocations import AdaKV, PyramidKV
from manyheads.shrink.policies.chunkkv import ChunkKV
from manyheads.shrink.policies.compactor import Compactor
from manyheads.shrink.policies.composed import Composed
from manyheads.shrink.policies.criticalkv import CriticalKV
from manyheads.shrink.policies.cur import CUR
from manyheads.shrink.policies.duo import Duo
from manyheads.shrink.policies.expected import ExpectedAttention
from manyheads.shrink.policies.fast_kvzip import FastKVzip
from manyheads.shrink.policies.finch import Finch
from manyheads.shrink.policies.full import Full
from manyheads.shrink.policies.h2o import H2O
from manyheads.shrink.policies.key_norm import KeyNorm
from manyheads.shrink.policies.keydiff import KeyDiff
from manyheads.shrink.policies.kvzip import KVzip
from manyheads.shrink.policies.lagkv import LagKV
from manyheads.shrink.policies.leverage import Leverage
from manyheads.shrink.policies.lococo import LoCoCo, fit_lococo
from manyheads.shrink.policies.longheads import LongHeads
from manyheads.shrink.policies.moa import MoA, plan_spans
from manyheads.shrink.policies.non_causal import NonCausal
from manyheads.shrink.policies.qfilters import QFilters, fit_q_filters
from manyheads.shrink.policies.razor import Razor
from manyheads.shrink.policies.simlayer import SimLayerKV
from manyheads.shrink.policies.snapkv import SnapKV
from manyheads.shrink.policies.streaming import StreamingLLM
from manyheads.shrink.policies.tidal import TidalDecode
from manyheads.shrink.policies.tova import TOVA

__all__ = [
    "CUR",
    "H2O",
    "TOVA",
    "AdaKV",
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
    "PyramidKV",
    "QFilters",
    "Razor",
    "SimLayerKV",
    "SnapKV",
    "StreamingLLM",
    "TidalDecode",
    "fit_lococo",
    "fit_q_filters",
    "plan_spans",
]
