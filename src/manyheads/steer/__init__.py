"""Changes to attention at inference, each a context manager that is an exact no-op at its neutral setting.

with boost(model, slice(0, 12), 3.0):
    model.generate(...)
"""

from manyheads.steer.boost import boost
from manyheads.steer.buckets import buckets
from manyheads.steer.calibrate import calibrate
from manyheads.steer.juice import head_effects, juice
from manyheads.steer.offsets import fit_offsets, load_offsets, pick_heads, save_offsets, scaled, steer
from manyheads.steer.perturb import guided, perturb
from manyheads.steer.pine import position_invariant
from manyheads.steer.redistribute import find_sink_dims, redistribute

__all__ = [
    "boost",
    "buckets",
    "calibrate",
    "find_sink_dims",
    "fit_offsets",
    "guided",
    "head_effects",
    "juice",
    "load_offsets",
    "perturb",
    "pick_heads",
    "position_invariant",
    "redistribute",
    "save_offsets",
    "scaled",
    "steer",
]
