"""One Hugging Face configuration and model for every mechanism. Importing this registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from manyheads.models.cache import ManyheadsCache
from manyheads.models.configuration import ManyheadsConfig
from manyheads.models.heads import (
    ManyheadsForCausalLM,
    ManyheadsForImageClassification,
    ManyheadsForSeq2SeqLM,
    ManyheadsForSequenceClassification,
)
from manyheads.models.modeling import ManyheadsModel, ManyheadsPreTrainedModel, ManyheadsSeq2SeqModel

AutoConfig.register("manyheads", ManyheadsConfig, exist_ok=True)
AutoModel.register(ManyheadsConfig, ManyheadsModel, exist_ok=True)
AutoModelForCausalLM.register(ManyheadsConfig, ManyheadsForCausalLM, exist_ok=True)
AutoModelForSeq2SeqLM.register(ManyheadsConfig, ManyheadsForSeq2SeqLM, exist_ok=True)
AutoModelForSequenceClassification.register(ManyheadsConfig, ManyheadsForSequenceClassification, exist_ok=True)
AutoModelForImageClassification.register(ManyheadsConfig, ManyheadsForImageClassification, exist_ok=True)

__all__ = [
    "ManyheadsCache",
    "ManyheadsConfig",
    "ManyheadsForCausalLM",
    "ManyheadsForImageClassification",
    "ManyheadsForSeq2SeqLM",
    "ManyheadsForSequenceClassification",
    "ManyheadsModel",
    "ManyheadsPreTrainedModel",
    "ManyheadsSeq2SeqModel",
]
