"""Change a checkpoint's attention, and say what that cost.

>>> from manyheads.convert import grouped
>>> small = grouped(model, 2, calibration=rows)  # the same class with two key/value heads in every layer
>>> other = latent(model, 96, calibration=rows)  # a DeepseekV3ForCausalLM whose cache holds 96 numbers and one key
"""

from manyheads.convert.composed import Composed, compose, load_composed
from manyheads.convert.damage import Judge, Sizes
from manyheads.convert.dimap import dimap, load_dimap
from manyheads.convert.distilled import student
from manyheads.convert.fused import Fused, load_fused
from manyheads.convert.fused_ends import ImageEnds, draw_pictures, drawn_times, fusion_loss, load_ends
from manyheads.convert.grouped import aligned, grouped
from manyheads.convert.healing import Healing, heal
from manyheads.convert.hosted import hosted, unhosted
from manyheads.convert.imitation import transfer
from manyheads.convert.importance import head_scores
from manyheads.convert.latent import latent
from manyheads.convert.primitives import measured_latencies, primitive_mixture, settled_mixture
from manyheads.convert.prompted import add_prompts, load_prompts, remove_prompts, save_prompts, without_prompts
from manyheads.convert.pruned import as_mistral, pruned
from manyheads.convert.rorope import rorope
from manyheads.convert.saving import check_conversion, save_conversion
from manyheads.convert.shifted import settled, shifted
from manyheads.convert.upcycled import upcycled

__all__ = [
    "Composed",
    "Fused",
    "Healing",
    "ImageEnds",
    "Judge",
    "Sizes",
    "add_prompts",
    "aligned",
    "as_mistral",
    "check_conversion",
    "compose",
    "dimap",
    "draw_pictures",
    "drawn_times",
    "fusion_loss",
    "grouped",
    "head_scores",
    "heal",
    "hosted",
    "latent",
    "load_composed",
    "load_dimap",
    "load_ends",
    "load_fused",
    "load_prompts",
    "measured_latencies",
    "primitive_mixture",
    "pruned",
    "remove_prompts",
    "rorope",
    "save_conversion",
    "save_prompts",
    "settled",
    "settled_mixture",
    "shifted",
    "student",
    "transfer",
    "unhosted",
    "upcycled",
    "without_prompts",
]
