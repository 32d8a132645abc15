"""Changes to attention at inference, each a context manager that is an exact no-op at its neutral setting.

with boost(model, slice(0, 12), 3.0):
    model.generate(...)
"""

from manyheads.explain.interventions.boost import boost
from manyheads.explain.interventions.buckets import buckets
from manyheads.explain.interventions.calibrate import calibrate
from manyheads.explain.interventions.juice import head_effects, juice
from manyheads.explain.interventions.perturb import guided, perturb
from manyheads.explain.interventions.pine import position_invariant
from manyheads.explain.interventions.redistribute import redistribute
from manyheads.explain.interventions.steer import fit_offsets, pick_heads, scaled, steer
from manyheads.explain.interventions.task_vector import TaskVector, head_means, learn_task_vector

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
