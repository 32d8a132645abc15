"""Parts that a trained model gets afterwards, and that change nothing before they are trained."""

from __future__ import annotations

import re
from typing import Any

import torch

from manyheads.models.configuration import ManyheadsConfig
from manyheads.models.modeling import ManyheadsPreTrainedModel

NEUTRAL = ("num_token_kinds", "by_kind", "adapter_size")
BY_KIND = ("mlp", "adapter")


@torch.no_grad()
def extended(model: ManyheadsPreTrainedModel, **settings: Any) -> Any:
    """A new model with the weights of this one and adapters, or an MLP, for each kind of token: for tokens of any kind
    it computes what this one does, until it is trained.

    settings: num_token_kinds, by_kind (of "mlp" and "adapter") and adapter_size, as in ManyheadsConfig. The MLPs of all
    kinds begin as copies of the one that was (LlamaFusion, arXiv:2412.15188), adapters at nothing (PILL,
    arXiv:2311.02126). The parts that are new are `model.named_parameters()` less those of before: freeze the others to
    keep the language model as it is. ValueError for settings that would change what it computes.
    """
    parts = settings.get("by_kind", ())
    strange = [name for name in settings if name not in NEUTRAL]
    strange += [part for part in ([parts] if isinstance(parts, str) else parts) if part not in BY_KIND]
    if strange or model.config.by_kind or model.config.adapter_size:
        what = strange[0] if strange else "a model that has kinds or adapters already"
        raise ValueError(f"extended: {what}; want {list(NEUTRAL)}, by_kind of {list(BY_KIND)}, on a model without them")
    known = {key: value for key, value in model.config.to_dict().items() if key != "architectures"}
    made = type(model)(ManyheadsConfig(**{**known, **settings})).to(model.device, model.dtype)
    old = model.state_dict()
    new = {name: old.get(re.sub(r"\.kinds\.\d+\.", ".", name), value) for name, value in made.state_dict().items()}
    made.load_state_dict(new)
    return made.train(model.training)
