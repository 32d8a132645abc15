"""PILL's gate: the values of image tokens pass a gate of each head, which their own state opens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.sites import choose, text_stack
from manyheads.hosts.switching import uncompiled
from manyheads.hosts.wrappers import inside
from manyheads.steer.common import check_share
from manyheads.steer.method import Prompt, steering
from manyheads.steer.pictures import image_places, image_token

# Layer of the tower that reads text -> W_g [key/value heads, hidden size].
Gates = Mapping[int, Tensor]


@contextmanager
def modality_gate(model: Any, gates: Gates | None = None, *, share: float = 1.0) -> Iterator[None]:
    """Claim: a gate lets a language model take in a picture as far as it helps, beginning with nothing of it.

    v_j^h <- (1 - share + share tanh(W_g x_j)_h) v_j^h for image tokens j, x_j what the layer's value projection reads,
    h its key/value heads; keys and the softmax stay, so that image tokens go on taking weight. gates: W_g by layer, of
    all layers of the tower that reads text or some; None: zero in all, where the published training begins and a
    picture gives nothing. share 0 changes nothing. Gated values are what a cache holds, so later tokens read them too.
    Source: arXiv 2311.02126, DsaltYfish/PILL `model/llm_model.py`, whose attention has a gate for every head; with
    grouped heads a gate is of a group's values here. ValueError for a model whose layers have no `v_proj` of their own,
    and for one in training with gradient checkpointing.
    """
    check_share("modality_gate: share", share)
    places, token = value_projections(model), image_token(model)
    given = {layer: torch.zeros(_heads(at), at[1].in_features) for layer, at in places.items()}
    given = given if gates is None else _checked(gates, given)
    if model.training and any(getattr(own, "gradient_checkpointing", False) for own in model.modules()):
        raise ValueError(
            "modality_gate: with gradient checkpointing backward would run layers again without the gate: call "
            "model.activation_checkpointing_disable() or model.eval()"
        )
    seen: list[Tensor] = []
    whole = inside(model)

    def watch(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        ids = named.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor):
            seen[:] = [ids == token]

    def forget(module: nn.Module, args: Any, output: Any) -> None:
        seen.clear()

    with ExitStack() as hooks:
        if share:
            hooks.enter_context(uncompiled())
            for own in {id(own): own for own in (whole, whole.base_model)}.values():
                hooks.callback(own.register_forward_pre_hook(watch, with_kwargs=True).remove)
                hooks.callback(own.register_forward_hook(forget, always_call=True).remove)
            for layer, gate in given.items():
                hook = _gated(gate, share, seen)
                hooks.callback(places[layer][1].register_forward_hook(hook).remove)
        yield


def _gated(gate: Tensor, share: float, seen: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], value: Tensor) -> Tensor:
        if not seen:
            raise ValueError(
                "modality_gate: give input_ids, to the model itself: embeddings do not tell where pictures stand"
            )
        x, image = args[0], seen[0].to(value.device)
        opened = (x @ gate.to(x).mT).tanh()
        factor = torch.where(image[..., None], 1 - share + share * opened, torch.ones_like(opened))
        return (value.unflatten(-1, (gate.shape[0], -1)) * factor[..., None]).flatten(-2)

    return hook


def value_projections(model: Any) -> dict[int, tuple[Any, nn.Linear]]:
    """Layer -> the attention module of the tower that reads text, and its value projection."""
    found = {}
    for site in choose(model, None, text_stack(model), "self"):
        projection = getattr(site.module, "v_proj", None)
        if not isinstance(projection, nn.Linear):
            raise ValueError(f"modality_gate: {site.path} ({type(site.module).__name__}) has no v_proj of its own")
        found[site.layer] = site.module, projection
    return found


def _heads(place: tuple[Any, nn.Linear]) -> int:
    return place[1].out_features // int(place[0].head_dim)


def _checked(gates: Gates, wanted: dict[int, Tensor]) -> dict[int, Tensor]:
    for layer, gate in gates.items():
        if layer not in wanted:
            raise ValueError(f"modality_gate: a gate for layer {layer}; the model has layers {sorted(wanted)}")
        if gate.shape != wanted[layer].shape:
            raise ValueError(
                f"modality_gate: the gate of layer {layer} is {list(gate.shape)}; want {list(wanted[layer].shape)}, "
                "[key/value heads, hidden size]"
            )
    return dict(gates)


def fit_gates(
    model: Any, batches: Iterable[Mapping[str, Any]], *, lr: float = 1e-2, begin: Gates | None = None
) -> dict[int, Tensor]:
    """Gates that lower the model's own loss over batches with `labels`, one step of Adam a batch; the model's weights
    stay as they are. They begin at zero, or at `begin`."""
    places = value_projections(model)
    fresh = {layer: torch.zeros(_heads(at), at[1].in_features) for layer, at in places.items()}
    gates = {k: v.clone().requires_grad_() for k, v in (fresh if begin is None else _checked(begin, fresh)).items()}
    optimizer = torch.optim.Adam(list(gates.values()), lr=lr)
    with modality_gate(model, gates):
        for batch in batches:
            loss = model(**batch).loss
            for gate, slope in zip(gates.values(), torch.autograd.grad(loss, list(gates.values())), strict=True):
                gate.grad = slope
            optimizer.step()
    return {layer: gate.detach() for layer, gate in gates.items()}


def save_gates(gates: Gates, path: Path | str) -> None:
    from safetensors.torch import save_file

    save_file({str(layer): gate.contiguous() for layer, gate in gates.items()}, path)


def load_gates(path: Path | str) -> dict[int, Tensor]:
    """ValueError for a file that holds something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {int(name): gate for name, gate in load_file(path).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} holds no gates ({error}): want a file of save_gates") from None


@steering(
    "modality_gate",
    title="image tokens' values behind a gate of each head",
    source="arXiv 2311.02126",
    kinds=("vision-language",),
    neutral={"share": 0.0},
    strength="share",
    reach=(0.0, 1.0),
)
def _open(model: Any, prompt: Prompt, *, share: float = 1.0, file: str | None = None) -> AbstractContextManager[None]:
    """file: gates that `fit_gates` and `save_gates` made; else closed ones, which keep the picture's values out."""
    image_places(model, prompt.inputs, "modality_gate")
    return modality_gate(model, None if file is None else load_gates(file), share=share)
