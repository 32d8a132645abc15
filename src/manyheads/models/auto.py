"""The models, registered with transformers' Auto classes. Making any ManyheadsConfig imports this."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)

from manyheads.models.cache import ManyheadsCache
from manyheads.models.configuration import ManyheadsConfig
from manyheads.models.detection import ManyheadsForObjectDetection
from manyheads.models.graphs import ManyheadsForNodeClassification
from manyheads.models.heads import (
    ManyheadsForCausalLM,
    ManyheadsForSeq2SeqLM,
    ManyheadsForSequenceClassification,
)
from manyheads.models.images import ManyheadsForImageClassification, ManyheadsForSemanticSegmentation
from manyheads.models.modeling import ManyheadsModel, ManyheadsPreTrainedModel, ManyheadsSeq2SeqModel
from manyheads.models.tagging import ManyheadsForTokenClassification

__all__ = [
    "ManyheadsBody",
    "ManyheadsCache",
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
]


_OVER_IMAGES = (ManyheadsForImageClassification, ManyheadsForObjectDetection, ManyheadsForSemanticSegmentation)


class ManyheadsBody(ManyheadsPreTrainedModel):
    """What AutoModel opens: the body of the model that was saved, whichever it is. Never itself a model."""

    @classmethod
    def _from_config(cls, config: ManyheadsConfig, **kwargs: Any) -> Any:
        model, how = _body(config)
        return model._from_config(config, **how, **kwargs)

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if not isinstance(config, ManyheadsConfig):
            config, kwargs = ManyheadsConfig.from_pretrained(config or name, return_unused_kwargs=True, **kwargs)
        model, how = _body(config)
        return model.from_pretrained(name, *args, config=config, **how, **kwargs)


def _body(config: ManyheadsConfig) -> tuple[type[ManyheadsPreTrainedModel], dict[str, Any]]:
    saved = (config.architectures or [""])[0]
    if saved == ManyheadsForNodeClassification.__name__:
        raise ValueError(
            "AutoModel: a classifier of nodes has no body of its own class, and transformers no Auto class for it; use "
            f"manyheads.models.{saved}.from_pretrained"
        )
    if saved in {model.__name__ for model in _OVER_IMAGES}:
        raise ValueError(
            "AutoModel: an image model's body reads patches, and has no class of its own; use "
            f"AutoModel{saved.removeprefix('Manyheads')} (with "
            "output_hidden_states=True for what is below the classifier)"
        )
    if config.is_encoder_decoder:
        return ManyheadsSeq2SeqModel, {}
    over_text = {
        cls.__name__: cls.body for cls in (ManyheadsForSequenceClassification, ManyheadsForTokenClassification)
    }
    return ManyheadsModel, over_text.get(saved, {})


AutoConfig.register("manyheads", ManyheadsConfig, exist_ok=True)
AutoModel.register(ManyheadsConfig, ManyheadsBody, exist_ok=True)
AutoModelForCausalLM.register(ManyheadsConfig, ManyheadsForCausalLM, exist_ok=True)
AutoModelForSeq2SeqLM.register(ManyheadsConfig, ManyheadsForSeq2SeqLM, exist_ok=True)
AutoModelForSequenceClassification.register(ManyheadsConfig, ManyheadsForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(ManyheadsConfig, ManyheadsForTokenClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(ManyheadsConfig, ManyheadsForSemanticSegmentation, exist_ok=True)
AutoModelForImageClassification.register(ManyheadsConfig, ManyheadsForImageClassification, exist_ok=True)
AutoModelForObjectDetection.register(ManyheadsConfig, ManyheadsForObjectDetection, exist_ok=True)
# Trainer smooths labels itself, and shifts them for the classes that stand here and no others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["manyheads"] = ManyheadsForCausalLM.__name__
# Pipelines copy these, and the copies do not know what was registered.
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES["manyheads"] = ManyheadsForObjectDetection.__name__
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["manyheads"] = ManyheadsForSemanticSegmentation.__name__
