"""The conformance suite as a public API: prove that a mechanism, ours or yours, does what its card declares.

>>> from manyheads.testing import check_mechanism
>>> check_mechanism(MyAttention)  # AssertionError: every property that fails, with the smallest failing input
"""

from manyheads.testing.case import Case
from manyheads.testing.check import Finding, check_mechanism, examine_mechanism
from manyheads.testing.footprint import LargestTensor
from manyheads.testing.properties import PROPERTIES

__all__ = ["PROPERTIES", "Case", "Finding", "LargestTensor", "check_mechanism", "examine_mechanism"]
