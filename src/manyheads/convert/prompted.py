"""APT: prompt tuning without prompts in the sequence: Wu et al., arXiv:2306.15706.

P prompts before a row of n tokens cost n (n + P) scores in every layer. Attention over both is (1 - s) Attn(x) +
s softmax(q P_k^T) P_v, s the prompts' share; so what prompts do may be added to what attention gives, once for every
token, with no place in the cache:

    S = ReLU(x (P + U D P)^T),  e = S P,  w = max_j S_j (no gradient),  out = (Attn(x) + w e) exp(c)

x: what the queries are projected from. P: [prompts, dim], normal with deviation 0.02; D, U: down to `rank` numbers,
normal with deviation 1, and up again, zero; c: zero. This is the released code (DoubtedSteam/APT), in which the paper's
softmax is a ReLU, there is one head, and no query projection. With P and c zero it is the frozen layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.convert.adapter import frozen, read_adapter, write_adapter
from manyheads.convert.layout import attentions

KIND = "apt"
_NAME = "prompt_attention"


class PromptAttention(nn.Module):
    """What the prompts of one layer add to its attention."""

    def __init__(self, dim: int, prompts: int, rank: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(prompts, dim))
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=False)
        self.scale = nn.Parameter(torch.zeros(1))
        self.off = False
        nn.init.normal_(self.prompts, std=0.02)
        nn.init.normal_(self.down.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        """x, attended [b, n, dim]: what attention read, and gave after its output projection."""
        if self.off:
            return attended
        rows, keys = x.to(self.prompts.dtype), self.prompts + self.up(self.down(self.prompts))
        scores = F.relu(rows @ keys.mT)
        share = scores.detach().amax(-1, keepdim=True)
        return ((attended + share * (scores @ self.prompts)) * self.scale.exp()).to(attended.dtype)


def add_prompts(
    model: Any, prompts: int = 200, *, rank: int = 4, layers: Sequence[int] | None = None, seed: int = 0
) -> Any:
    """The model itself, frozen, with a `PromptAttention` in the chosen layers (all without a choice): what is trained.

    Its forward, generate, gradient checkpointing and Trainer go on as they are, for the prompts are modules of the
    model. ValueError for a layout that is not known, a layer that is not there, or a model that has prompts.
    """
    found = attentions(model)
    chosen = list(range(len(found))) if layers is None else sorted(set(layers))
    for name, value in (("prompts", prompts), ("rank", rank)):
        if value < 1:
            raise ValueError(f"{name}={value}: want 1 or more")
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(found):
        raise ValueError(f"layers={layers}: {type(model).__name__} has layers 0 to {len(found) - 1}")
    if _modules(model):
        raise ValueError(f"{type(model).__name__} has prompts already: remove_prompts(model) takes them out")
    frozen(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in chosen:
            module = found[layer].module
            own = PromptAttention(found[layer].projections()["q_proj"].in_features, prompts, rank)
            module.add_module(_NAME, own.to(module.q_proj.weight).train(model.training))
            # Reads the module that it is called for, so that a copy of the model has prompts of its own.
            module.register_forward_hook(_add, with_kwargs=True)
    return model


def remove_prompts(model: Any) -> Any:
    """The model as it was, and still frozen."""
    for layer in attentions(model):
        own = layer.module._modules.pop(_NAME, None)
        for key, hook in list(layer.module._forward_hooks.items()):
            if own is not None and hook is _add:
                del layer.module._forward_hooks[key]
                layer.module._forward_hooks_with_kwargs.pop(key, None)
    return model


@contextmanager
def without_prompts(model: Any) -> Iterator[Any]:
    """The model computes, in here, as it did before it had prompts."""
    own = list(_modules(model).values())
    for module in own:
        module.off = True
    try:
        yield model
    finally:
        for module in own:
            module.off = False


def save_prompts(model: Any, path: str | Path) -> Path:
    """The prompts alone, and which model they are for, in one safetensors file."""
    own = _modules(model)
    if not own:
        raise ValueError(f"{type(model).__name__} has no prompts to save: add_prompts(model) gives it some")
    first = next(iter(own.values()))
    facts = {"prompts": len(first.prompts), "rank": first.down.out_features, "layers": sorted(own)}
    held = {layer: attentions(model)[layer].module._modules.pop(_NAME) for layer in own}
    try:
        trained = nn.ModuleDict({str(layer): module for layer, module in own.items()})
        return write_adapter(path, KIND, trained.state_dict(), facts, {"model": model})
    finally:
        for layer, module in held.items():
            attentions(model)[layer].module._modules[_NAME] = module


def load_prompts(model: Any, path: str | Path) -> Any:
    """The model with the prompts that `save_prompts` wrote; those of another model are refused."""
    if _modules(model):
        raise ValueError(f"{type(model).__name__} has prompts already: remove_prompts(model) takes them out")
    weights, facts = read_adapter(path, KIND, {"model": model})
    add_prompts(model, facts["prompts"], rank=facts["rank"], layers=facts["layers"])
    trained = nn.ModuleDict({str(layer): module for layer, module in _modules(model).items()})
    trained.load_state_dict(weights)
    return model


def _modules(model: Any) -> dict[int, PromptAttention]:
    """The prompts by layer."""
    found = {i: layer.module._modules.get(_NAME) for i, layer in enumerate(attentions(model))}
    return {i: module for i, module in found.items() if module is not None}


def _add(module: Any, args: tuple[Any, ...], options: dict[str, Any], out: Any) -> Any:
    x = args[0] if args else options["hidden_states"]
    return (module.get_submodule(_NAME)(x, out[0]), *out[1:])
