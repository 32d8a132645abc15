"""Any causal mechanism in the layers of a checkpoint: the host's weights in our own model, layer by layer.

A host of llama's layout becomes a ManyheadsForCausalLM that computes the same while every layer holds `softmax`. Then
the chosen layers get another mechanism. What fits is carried over by name: projections, and norms of queries and keys;
key/value heads are repeated where the mechanism shares none. What is new keeps the mechanism's own start, and can
learn from the layer that it replaces (`imitation.transfer`).
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.convert.layout import attentions
from manyheads.convert.places import check_family, own_specs, places, settings
from manyheads.registry import mechanism_class


def check_hosted(model: Any, spec: Mapping[str, Any] | None = None, layers: Sequence[int] = ()) -> None:
    """ValueError where our model has no place for what the host has, or the mechanism none in a decoder."""
    check_family(model)
    config, name = model.config, type(model).__name__
    strange = [i for i in layers if not 0 <= i < config.num_hidden_layers]
    if strange:
        raise ValueError(f"--layers: {name} has layers 0 to {config.num_hidden_layers - 1}, not {strange[0]}")
    if spec is not None and "causal-self" not in mechanism_class(spec["name"]).card.patterns:
        raise ValueError(f"--to {spec['name']}: it has no causal form, which a decoder needs")


@torch.no_grad()
def hosted(model: Any, spec: Mapping[str, Any] | None = None, layers: Sequence[int] = (), *, seed: int = 0) -> Any:
    """A ManyheadsForCausalLM with the host's weights; `layers` hold the mechanism that `spec` names (with arguments of
    its own), all others softmax. A mechanism whose scores are not softmax's takes neither a cap nor a window of the
    layer's: it sees all of the past. seed: of the weights that the host has none for. The given model is left as it
    is."""
    check_hosted(model, spec, layers)
    from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM

    plain = own_specs(model)
    specs = [_placed(spec, own) if spec is not None and i in layers else own for i, own in enumerate(plain)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = ManyheadsForCausalLM(ManyheadsConfig(**settings(model), layers=specs)).to(model.dtype)
    state = made.state_dict()
    for key, value in _carried(model, state).items():
        state[key].copy_(value)
    made.generation_config = copy.deepcopy(model.generation_config)
    made.generation_config.cache_implementation = None  # of the host's own cache; here the layers hold what they need
    return made.to(model.device).eval()


@torch.no_grad()
def unhosted(made: Any) -> Any:
    """The host again: a model of its class with the weights of one that `hosted` made, trained since or not.

    ValueError where a layer holds what that class has no place for. The given model is left as it is.
    """
    import transformers

    from manyheads.models.configuration import spec_name

    host = getattr(made.config, "host", None)
    if not host:
        raise ValueError(f"{type(made).__name__} was not made of a checkpoint: there is no class to go back to")
    settings = {key: value for key, value in host.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(host["model_type"], **settings)
    model = getattr(transformers, host["architectures"][0])._from_config(config, dtype=made.dtype)
    for i, (held, own) in enumerate(zip(made.config.encoder_specs(), own_specs(model), strict=True)):
        if json.dumps(held, sort_keys=True) != json.dumps(own, sort_keys=True):
            raise ValueError(
                f"layer {i} holds {spec_name(held)}, and {type(model).__name__} has a place only for the attention it "
                "came with: save it as it is"
            )
    given, state = made.state_dict(), model.state_dict()
    for place in places(model):
        state[place.theirs][place.rows].copy_(given[place.ours])
    model.generation_config = copy.deepcopy(made.generation_config)
    return model.to(made.device).eval()


def _placed(spec: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The spec with the host's sizes and positions, where its mechanism takes them and the spec does not say."""
    cls = mechanism_class(spec["name"])
    takes = inspect.signature(cls).parameters
    sizes: dict[str, Any] = {}
    if "shell" in takes:
        shares = getattr(cls, "shares_kv", True) and "kv_heads" not in spec
        left = [] if shares else ["kv_heads"]
        left += _homeless(spec, own)
        sizes["shell"] = {k: v for k, v in own["shell"].items() if k not in left}
    elif "kv_heads" in takes:
        sizes["kv_heads"] = own["shell"]["kv_heads"]
    if "rotary" in takes:
        sizes["rotary"] = own["rotary"]
    return {**sizes, **spec}


def _homeless(spec: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What of the layer's cap and window the spec's mechanism has no place for."""
    place = getattr(mechanism_class(spec["name"]), "has_place", lambda part: False)
    return [part for part in ("softcap", "window") if own["shell"].get(part) is not None and not place(part)]


def takes_all(model: Any, spec: Mapping[str, Any], layers: Sequence[int]) -> bool:
    """Whether the mechanism takes over all that these layers have, so that it can be their equal."""
    own = own_specs(model)
    return not any(_homeless(spec, own[i]) for i in layers)


def _carried(model: Any, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The host's tensors under our names, those that have a place of their shape."""
    own, found, layer = model.state_dict(), {}, attentions(model)[0]
    for place in places(model):
        if place.ours not in wanted:
            continue
        value, shape = own[place.theirs][place.rows], wanted[place.ours].shape
        if shape != value.shape and any(f".mechanism.{part}_proj." in place.ours for part in "kv"):
            heads = value.unflatten(0, (layer.kv_heads, layer.head_dim))
            value = heads.repeat_interleave(layer.heads // layer.kv_heads, 0).flatten(0, 1)
        if shape == value.shape:
            found[place.ours] = value
    return found
