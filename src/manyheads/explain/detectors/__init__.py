"""Head detectors: what every head of a model does, and what it is worth.

table = detect(load_model(), ["induction", "sink", "gate"])     # [layers, heads] each
table.top("induction", 5); table.found("sink"); table.save("heads"); table.profile(model)
massive_values(model, "key"), Maps.of(model), Importance.of(model), path_patching(model, clean, corrupted, metric)
"""

from __future__ import annotations

from manyheads.explain.detectors.circuit_tasks import CircuitTask, coloured_objects, indirect_object
from manyheads.explain.detectors.detect import DETECTORS, QUICK, detect, detector_notes
from manyheads.explain.detectors.hops import Clusters, cluster_heads, hop_strengths
from manyheads.explain.detectors.importance import Importance, Pruning
from manyheads.explain.detectors.maps import Maps
from manyheads.explain.detectors.massive import Channels, massive_values
from manyheads.explain.detectors.patching import (
    Overlap,
    Patched,
    PathPatching,
    circuit,
    circuit_overlap,
    logit_difference,
    path_patching,
)
from manyheads.explain.detectors.table import Detector, HeadTable

__all__ = [
    "DETECTORS",
    "QUICK",
    "Channels",
    "CircuitTask",
    "Clusters",
    "Detector",
    "HeadTable",
    "Importance",
    "Maps",
    "Overlap",
    "Patched",
    "PathPatching",
    "Pruning",
    "circuit",
    "circuit_overlap",
    "cluster_heads",
    "coloured_objects",
    "detect",
    "detector_notes",
    "hop_strengths",
    "indirect_object",
    "logit_difference",
    "massive_values",
    "path_patching",
]
