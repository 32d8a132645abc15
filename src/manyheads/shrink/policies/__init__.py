"""One method, one file."""

from manyheads.shrink.policies.allocations import AdaKV, PyramidKV
from manyheads.shrink.policies.chunkkv import ChunkKV
from manyheads.shrink.policies.criticalkv import CriticalKV
from manyheads.shrink.policies.cur import CUR
from manyheads.shrink.policies.duo import Duo
from manyheads.shrink.policies.expected import ExpectedAttention
from manyheads.shrink.policies.finch import Finch
from manyheads.shrink.policies.full import Full
from manyheads.shrink.policies.h2o import H2O
from manyheads.shrink.policies.key_norm import KeyNorm
from manyheads.shrink.policies.keydiff import KeyDiff
from manyheads.shrink.policies.kvzip import KVzip
from manyheads.shrink.policies.lagkv import LagKV
from manyheads.shrink.policies.lococo import LoCoCo, fit_lococo
from manyheads.shrink.policies.longheads import LongHeads
from manyheads.shrink.policies.moa import MoA, plan_spans
from manyheads.shrink.policies.razor import Razor
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
    "CriticalKV",
    "Duo",
    "ExpectedAttention",
    "Finch",
    "Full",
    "KVzip",
    "KeyDiff",
    "KeyNorm",
    "LagKV",
    "LoCoCo",
    "LongHeads",
    "MoA",
    "PyramidKV",
    "Razor",
    "SnapKV",
    "StreamingLLM",
    "TidalDecode",
    "fit_lococo",
    "plan_spans",
]
