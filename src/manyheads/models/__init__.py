"""One Hugging Face configuration and model for every mechanism.

The configuration is light; the models are imported when one of them, or any configuration, is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from manyheads.models.configuration import ManyheadsConfig

if TYPE_CHECKING:
    from manyheads.models.auto import ManyheadsBody
    from manyheads.models.cache import ManyheadsCache
    from manyheads.models.detection import ManyheadsForObjectDetection
    from manyheads.models.diffusion import DiffusionConfig, DiffusionTransformer
    from manyheads.models.graphs import ManyheadsForNodeClassification
    from manyheads.models.heads import (
        ManyheadsForCausalLM,
        ManyheadsForSeq2SeqLM,
        ManyheadsForSequenceClassification,
    )
    from manyheads.models.images import ManyheadsForImageClassification, ManyheadsForSemanticSegmentation
    from manyheads.models.modeling import ManyheadsModel, ManyheadsPreTrainedModel, ManyheadsSeq2SeqModel
    from manyheads.models.tagging import ManyheadsForTokenClassification
    from manyheads.models.unet import DiffusionUNet, UNetConfig

__all__ = [
    "DiffusionConfig",
    "DiffusionTransformer",
    "DiffusionUNet",
    "ManyheadsBody",
    "ManyheadsCache",
    "ManyheadsConfig",
    "ManyheadsForCausalLM",
    "ManyheadsForImageClassification",
    "ManyheadsForNodeClassification",
    "ManyheadsForObjectDetection",
    "ManyheadsForSemanticSegmentation",
    "ManyheadsForSeq2SeqLM",
    "ManyheadsForSequenceClassification",
    "ManyheadsForTokenClassification",
    "ManyheadsModel",
    "ManyheadsPreTrainedModel",
    "ManyheadsSeq2SeqModel",
    "UNetConfig",
]
# Of the models that draw; all else is in auto.
_ROOMS = {
    "DiffusionConfig": "diffusion",
    "DiffusionTransformer": "diffusion",
    "DiffusionUNet": "unet",
    "UNetConfig": "unet",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"manyheads.models.{_ROOMS.get(name, 'auto')}"), name)
    globals()[name] = found
    return found
