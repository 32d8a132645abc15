"""Change a checkpoint's attention, and say what that cost.

>>> from manyheads.convert import grouped
>>> small = grouped(model, 2, calibration=rows)  # the same class with two key/value heads in every layer
>>> other = latent(model, 96, calibration=rows)  # a DeepseekV3ForCausalLM whose cache holds 96 numbers and one key
"""

from manyheads.convert.damage import Judge, Sizes
from manyheads.convert.distilled import student
from manyheads.convert.grouped import aligned, grouped
from manyheads.convert.healing import Healing, heal
from manyheads.convert.hosted import hosted, transfer
from manyheads.convert.latent import latent
from manyheads.convert.pruned import pruned
from manyheads.convert.saving import check_conversion, save_conversion

__all__ = [
    "Healing",
    "Judge",
    "Sizes",
    "aligned",
    "check_conversion",
    "grouped",
    "heal",
    "hosted",
    "latent",
    "pruned",
    "save_conversion",
    "student",
    "transfer",
]
