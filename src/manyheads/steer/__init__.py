"""Changes to attention at inference, each a context manager that is an exact no-op at its neutral setting.

with boost(model, slice(0, 12), 3.0):
    model.generate(...)
"""

from manyheads.steer.agla import agla
from manyheads.steer.boost import boost
from manyheads.steer.buckets import buckets
from manyheads.steer.calibrate import calibrate
from manyheads.steer.causal_maps import causal_maps, counterfactual
from manyheads.steer.control import box_region, control
from manyheads.steer.gem import gem, word_maps
from manyheads.steer.imbalance import imbalance
from manyheads.steer.juice import head_effects, juice
from manyheads.steer.modality_mutual import modality_mutual
from manyheads.steer.offsets import fit_offsets, load_offsets, pick_heads, save_offsets, scaled, steer
from manyheads.steer.perturb import guided, perturb
from manyheads.steer.pine import position_invariant
from manyheads.steer.redistribute import find_sink_dims, redistribute
from manyheads.steer.task_vector import TaskVector, head_means, learn_task_vector
from manyheads.steer.vision_heads import head_divergence, vision_heads

__all__ = [
    "TaskVector",
    "agla",
    "boost",
    "box_region",
    "buckets",
    "calibrate",
    "causal_maps",
    "control",
    "counterfactual",
    "find_sink_dims",
    "fit_offsets",
    "gem",
    "guided",
    "head_divergence",
    "head_effects",
    "head_means",
    "imbalance",
    "juice",
    "learn_task_vector",
    "load_offsets",
    "modality_mutual",
    "perturb",
    "pick_heads",
    "position_invariant",
    "redistribute",
    "save_offsets",
    "scaled",
    "steer",
    "vision_heads",
    "word_maps",
]
