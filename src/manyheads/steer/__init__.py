"""Changes to attention at inference, each a context manager that is an exact no-op at its neutral setting.

with boost(model, slice(0, 12), 3.0):
    model.generate(...)
"""

from manyheads.steer.boost import boost
from manyheads.steer.buckets import buckets
from manyheads.steer.calibrate import calibrate
from manyheads.steer.juice import head_effects, juice
from manyheads.steer.offsets import fit_offsets, pick_heads, scaled, steer
from manyheads.steer.perturb import guided, perturb
from manyheads.steer.pine import position_invariant
from manyheads.steer.redistribute import redistribute
from manyheads.steer.task_vector import TaskVector, head_means, learn_task_vector

__all__ = [
    "TaskVector",
    "boost",
    "buckets",
    "calibrate",
    "fit_offsets",
    "guided",
    "head_effects",
    "head_means",
    "juice",
    "learn_task_vector",
    "perturb",
    "pick_heads",
    "position_invariant",
    "redistribute",
    "scaled",
    "steer",
]
