"""One method, one file."""

from manyheads.shrink.policies.allocations import AdaKV, PyramidKV
from manyheads.shrink.policies.duo import Duo
from manyheads.shrink.policies.full import Full
from manyheads.shrink.policies.h2o import H2O
from manyheads.shrink.policies.key_norm import KeyNorm
from manyheads.shrink.policies.snapkv import SnapKV
from manyheads.shrink.policies.streaming import StreamingLLM
from manyheads.shrink.policies.tova import TOVA

__all__ = ["H2O", "TOVA", "AdaKV", "Duo", "Full", "KeyNorm", "PyramidKV", "SnapKV", "StreamingLLM"]
