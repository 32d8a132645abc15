"""Where a decoder keeps its attention's weights: projections of their own for queries, keys and values, or one in which
their rows follow each other (Phi 3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Families whose query heads stand in contiguous groups, each tested.
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "phi3",
)  # fmt: skip
# And those whose heads cannot be told apart: see check_heads_apart.
KNOWN = (*FAMILIES, "olmo2")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FUSED = "qkv_proj"


@dataclass(frozen=True)
class Attention:
    """One layer's attention. Query head h reads key/value head h // (heads / kv_heads).

    normed: queries and keys are normed after their projection. turned: features of a head that positions turn, as
    pairs (i, i + turned / 2); None where positions turn none.
    """

    module: Any
    heads: int
    kv_heads: int
    head_dim: int
    normed: bool
    turned: int | None

    @property
    def fused(self) -> bool:
        return hasattr(self.module, FUSED)

    @property
    def mixed_norms(self) -> bool:
        """Queries and keys are normed over the features of all heads together."""
        return self.normed and self.module.k_norm.weight.numel() != self.head_dim

    def rows(self) -> dict[str, slice]:
        """Where the rows of queries, keys and values lie in what is fused."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        ends = {"q_proj": (0, queries), "k_proj": (queries, queries + keys), "v_proj": (queries + keys, None)}
        return {name: slice(*both) for name, both in ends.items()}

    def projections(self) -> dict[str, nn.Linear]:
        """Parts of what is fused are views: what is written into their weights is written into the whole."""
        if not self.fused:
            return {name: getattr(self.module, name) for name in PROJECTIONS}
        whole = getattr(self.module, FUSED)
        parts = {name: _part(whole, rows) for name, rows in self.rows().items()}
        return {**parts, "o_proj": self.module.o_proj}

    def watch(self, name: str, tell: Callable[[Tensor], None]) -> Any:
        """Calls `tell` with what a projection of queries, keys or values gives; returns the hook's handle."""
        rows = self.rows()[name] if self.fused else slice(None)
        linear = getattr(self.module, FUSED if self.fused else name)
        return linear.register_forward_hook(lambda module, args, output: tell(output[..., rows]))

    def named(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors such as `k_proj.weight` under the names of the module."""
        found = dict(parts)
        for kind in ("weight", "bias") if self.fused else ():
            three = [found.pop(f"{name}.{kind}", None) for name in ("q_proj", "k_proj", "v_proj")]
            whole = [part for part in three if part is not None]
            if whole:
                found[f"{FUSED}.{kind}"] = torch.cat(whole)
        return found


def _part(whole: nn.Linear, rows: slice) -> nn.Linear:
    weight = whole.weight.detach()[rows]
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=whole.bias is not None, device="meta")
    part.weight = nn.Parameter(weight, requires_grad=False)
    if whole.bias is not None:
        part.bias = nn.Parameter(whole.bias.detach()[rows], requires_grad=False)
    return part


@contextmanager
def in_eval(*models: Any) -> Iterator[None]:
    """No dropout while inside; every part stays in the mode that it was in. A trainer leaves a model in training."""
    modes = [(part, part.training) for model in models for part in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def check_bare(model: Any) -> None:
    """ValueError for a model with adapters in it, or with something around it: its weights have other names then, and
    what adapters add would be left out."""
    name = type(model).__name__
    if getattr(model, "_orig_mod", None) is not None:
        raise ValueError(f"{name}: torch.compile stands around the model; give the model inside, `_orig_mod`")
    if "Peft" in name or any(hasattr(part, "base_layer") for part in model.modules()):
        raise ValueError(
            f"{name}: adapters are in the model, or around it: make them part of its weights (merge_and_unload), and "
            "give what that returns"
        )


def attentions(model: Any) -> list[Attention]:
    """The attention of every layer of a causal language model. ValueError for a layout that is not known here."""
    check_bare(model)
    config = model.config
    name = type(model).__name__
    if config.model_type not in KNOWN:
        raise ValueError(
            f"{name} (model_type {config.model_type!r}) has no converter for its layout; want one of {list(FAMILIES)}"
        )
    found = []
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    rotates = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    for layer, turns in zip(model.get_decoder().layers, rotates, strict=True):
        module = layer.self_attn
        names = (FUSED, "o_proj") if hasattr(module, FUSED) else PROJECTIONS
        if not all(type(getattr(module, name, None)) is nn.Linear for name in names):
            raise ValueError(
                f"{name}: its projections are not plain Linear layers (quantised, or with adapters): merge adapters "
                "(merge_and_unload) and load it in float32 or bfloat16 first"
            )
        dim = int(module.head_dim)
        turned = int(dim * (1.0 if share is None else share)) if turns else None
        found.append(
            Attention(
                module,
                config.num_attention_heads,
                config.num_key_value_heads,
                dim,
                hasattr(module, "k_norm"),
                turned,
            )
        )
    return found


def check_heads_apart(model: Any) -> None:
    """ValueError where heads cannot be pooled or cut, as what one of them holds changes the others."""
    if any(layer.mixed_norms for layer in attentions(model)):
        raise ValueError(
            f"{type(model).__name__} norms queries and keys over all heads at once: without some of them, or with some "
            "pooled, all others change; convert it to a mechanism (--to NAME)"
        )


def with_kv_heads(model: Any, kv_heads: int) -> Any:
    """A model of the same class and weights but for k_proj and v_proj, which are new and of `kv_heads` heads."""
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = kv_heads
    parameter = next(model.parameters())
    made = type(model)._from_config(config, dtype=parameter.dtype)
    own: dict[str, Tensor] = made.state_dict()
    given = {key: value for key, value in model.state_dict().items() if own[key].shape == value.shape}
    made.load_state_dict(given, strict=False)
    with torch.no_grad():
        for old, new in zip(attentions(model), attentions(made), strict=True):
            new.projections()["q_proj"].weight.copy_(old.projections()["q_proj"].weight)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(parameter.device).eval()


def cache_numbers(model: Any) -> int:
    """Numbers that the cache holds for one token, over all layers."""
    config = model.config
    if config.model_type == "deepseek_v3":
        return int(config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim))
    return sum(2 * layer.kv_heads * layer.head_dim for layer in attentions(model))
