"""What must hold of every mechanism. A property is a function of a case and a size n that raises where it fails.

Sizes are tried in ascending order, so that the first failure is the smallest. Everything is compared in float64.
"""

from manyheads.testing.properties import basics, decoding, gradients, graph, odd, planes, visibility, wrapped
from manyheads.testing.properties.prop import PROPERTIES, Property

__all__ = [
    "PROPERTIES",
    "Property",
    "basics",
    "decoding",
    "gradients",
    "graph",
    "odd",
    "planes",
    "visibility",
    "wrapped",
]
