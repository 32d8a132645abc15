"""Changes to what a diffusion model attends to while it draws, each a context manager on its sampler.

with isolate(model, masks):
    model.sample(["a 3 left of a 7"])
"""

from manyheads.steer.diffusion.colour_propagation import colour_propagation
from manyheads.steer.diffusion.common import box_mask, layers_in, until
from manyheads.steer.diffusion.concept_conductor import layout_guidance, masks_by_kind, merge_concepts
from manyheads.steer.diffusion.edit_maps import borrow_maps, count_peaks, edit_words
from manyheads.steer.diffusion.isolate import isolate, reposition
from manyheads.steer.diffusion.multi_reference import multi_reference
from manyheads.steer.diffusion.multi_view import multi_view
from manyheads.steer.diffusion.perturbed_guidance import hunt_heads, perturbed_guidance, self_heads
from manyheads.steer.diffusion.plug_and_play import plug_and_play
from manyheads.steer.diffusion.regional_prompts import regional_prompts
from manyheads.steer.diffusion.space_time import space_time

__all__ = [
    "borrow_maps",
    "box_mask",
    "colour_propagation",
    "count_peaks",
    "edit_words",
    "hunt_heads",
    "isolate",
    "layers_in",
    "layout_guidance",
    "masks_by_kind",
    "merge_concepts",
    "multi_reference",
    "multi_view",
    "perturbed_guidance",
    "plug_and_play",
    "regional_prompts",
    "reposition",
    "self_heads",
    "space_time",
    "until",
]
