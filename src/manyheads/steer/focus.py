"""Focus directions: two vectors per head, learned once, that turn attention towards what is relevant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.positions import placed
from manyheads.hosts.sites import choose, text_stack
from manyheads.hosts.switching import uncompiled
from manyheads.hosts.taps import tap
from manyheads.steer.common import Heads, Span, inside
from manyheads.steer.method import Prompt, steering
from manyheads.steer.offsets import load_offsets, save_offsets

# (layer, query head) -> its two vectors [head dim], of queries and of keys.
Directions = Mapping[tuple[int, int], tuple[Tensor, Tensor]]


@contextmanager
def focused(model: Any, directions: Directions, scale: float = 1.0) -> Iterator[None]:
    """Claim: some heads look for what a question is about and are distracted; a constant direction in their queries and
    keys sharpens them, with no label of what is relevant.

    q_i' = q_i + a d^q for every place i of the head, k_j' = k_j + a d^k for the keys that the head reads, both before
    the rotation: behind it a constant in all keys adds the same to every score of a row, and changes nothing. a =
    scale; below 0 it distracts, 0 changes nothing. Keys are shared by the query heads of a group: several of one group
    add up their d^k.
    Source: arXiv 2503.23306; no code was found, and the papers' words do not say on which side of the rotation the
    vectors stand: this is the side where both do something. ValueError where a layer has no q_proj and k_proj.
    """
    if not directions:
        raise ValueError("focused: directions is empty; give {(layer, head): (query vector, key vector)}")
    if scale == 0:
        yield
        return
    stack = text_stack(model)
    with ExitStack() as hooks:
        hooks.enter_context(uncompiled())
        for site in choose(model, sorted({layer for layer, _ in directions}), stack, "self"):
            own = {head: pair for (layer, head), pair in directions.items() if layer == site.layer}
            for hook in _hooked(site.path, site.module, own, scale):
                hooks.callback(hook.remove)
        yield


def _hooked(path: str, attention: Any, own: Mapping[int, tuple[Tensor, Tensor]], scale: float) -> list[Any]:
    query: Any = getattr(attention, "q_proj", None)
    key: Any = getattr(attention, "k_proj", None)
    if query is None or key is None:
        raise ValueError(f"{path} has no q_proj and k_proj of its own: focus directions have no place in it")
    if hasattr(attention, "q_norm") or hasattr(attention, "k_norm"):
        raise ValueError(f"{path} normalises queries and keys behind their projections, which would undo a direction")
    width = attention.head_dim
    heads, groups = query.weight.shape[0] // width, key.weight.shape[0] // width
    wrong = [head for head in own if not 0 <= head < heads]
    if wrong:
        raise ValueError(f"{path} has heads 0 to {heads - 1}; got {wrong}")
    sized = [v.shape for pair in own.values() for v in pair if v.shape != (width,)]
    if sized:
        raise ValueError(f"{path}: directions have shape {list(sized[0])}; want [{width}]")
    like = query.weight
    rows = [next(iter(own.values()))[0].new_zeros(count, width).to(like) for count in (heads, groups)]
    for head, (asks, offers) in own.items():
        for place, vector, at in ((0, asks, head), (1, offers, head // (heads // groups))):
            hot = nn.functional.one_hot(torch.tensor(at, device=like.device), rows[place].shape[0]).to(like)
            rows[place] = rows[place] + hot[:, None] * vector.to(like)  # out of place, since vectors may be learned
    added = [scale * own_rows.flatten() for own_rows in rows]
    return [
        query.register_forward_hook(lambda module, args, output: output + added[0].to(output)),
        key.register_forward_hook(lambda module, args, output: output + added[1].to(output)),
    ]


@torch.no_grad()
def contextual_heads(
    model: Any, examples: Sequence[tuple[Mapping[str, Any], Span]], count: int
) -> list[tuple[int, int]]:
    """The heads that pay the relevant span most from the prompt's last place, on average over examples (inputs of one
    row or more, and the span in them), the best first."""
    if not examples:
        raise ValueError("contextual_heads: give examples, each the inputs and the span that is relevant in them")
    rows: dict[tuple[int, int], float] = {}
    for inputs, span in examples:
        for call in _read(model, inputs):
            n = call.query.shape[2]
            places = inside(span, call.key.shape[2], call.query.device)[:, None, None]
            held = (call.weights(rows=slice(n - 1, n)) * places).sum(-1).mean((0, 2))
            for head, value in enumerate(held.tolist()):
                rows[call.layer, head] = rows.get((call.layer, head), 0.0) + value
    if not 1 <= count <= len(rows):
        raise ValueError(f"contextual_heads: count={count}; the model has {len(rows)} heads")
    return sorted(rows, key=lambda place: -rows[place])[:count]


def _read(model: Any, inputs: Mapping[str, Any]) -> list[Any]:
    from manyheads.hosts.taps import record

    with record(model, stack=text_stack(model), kind="self") as calls:
        model(**placed(model, inputs), use_cache=False)
    return list(calls)


def fit_focus(
    model: Any,
    examples: Sequence[tuple[Mapping[str, Any], Span]],
    heads: Heads,
    *,
    steps: int = 60,
    lr: float = 0.05,
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Directions of the given heads that raise the attention which the last place pays the relevant span: minus the log
    of that mass, on average over heads and examples, by AdamW, the model frozen. One example is one step."""
    if not examples or not heads:
        raise ValueError("fit_focus: give examples and heads")
    sites = {site.layer: site for site in choose(model, None, text_stack(model), "self")}
    wrong = [layer for layer, _ in heads if layer not in sites]
    if wrong:
        raise ValueError(f"fit_focus: there is no layer {wrong[0]}; layers are 0 to {max(sites)}")
    device = next(model.parameters()).device
    width = {layer: int(sites[layer].module.head_dim) for layer, _ in heads}  # type: ignore[arg-type]
    made = {
        (int(layer), int(head)): tuple(torch.zeros(width[layer], device=device, requires_grad=True) for _ in range(2))
        for layer, head in heads
    }
    optimizer = torch.optim.AdamW([vector for pair in made.values() for vector in pair], lr=lr, weight_decay=0.0)
    with ExitStack() as left, torch.enable_grad():
        for own in [each for each in model.parameters() if each.requires_grad]:
            left.callback(own.requires_grad_, True)
            own.requires_grad_(False)
        for step in range(steps):
            optimizer.zero_grad()
            loss = _missed(model, *examples[step % len(examples)], made)
            torch.autograd.backward(loss)
            optimizer.step()
    return {place: (pair[0].detach(), pair[1].detach()) for place, pair in made.items()}


def _missed(model: Any, inputs: Mapping[str, Any], span: Span, made: Mapping[tuple[int, int], Any]) -> Tensor:
    losses: list[Tensor] = []
    by_layer: dict[int, list[int]] = {}
    for layer, head in made:
        by_layer.setdefault(layer, []).append(head)

    def reader(call: Any) -> None:
        n = call.query.shape[2]
        weights = call.weights(by_layer[call.layer], slice(n - 1, n))
        places = inside(span, call.key.shape[2], call.query.device)[:, None, None]
        losses.append(-(weights * places).sum(-1).clamp_min(1e-9).log().mean())

    with focused(model, made), tap(model, reader, layers=sorted(by_layer), stack=text_stack(model), kind="self"):
        model(**placed(model, inputs), use_cache=False)
    return torch.stack(losses).mean()


def save_focus(directions: Directions, path: str | Path) -> Path:
    """A safetensors file, a vector per head: the query's direction and the key's behind it."""
    return save_offsets({place: torch.cat(pair) for place, pair in directions.items()}, path)


def load_focus(path: str | Path) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    found = load_offsets(path)
    odd = next((place for place, vector in found.items() if vector.numel() % 2), None)
    if odd is not None:
        raise ValueError(f"{path}: head {odd[0]}.{odd[1]} has no two vectors of one size: give a file of save_focus")
    return {place: (v[: v.numel() // 2], v[v.numel() // 2 :]) for place, v in found.items()}


@steering(
    "focus",
    title="queries and keys of chosen heads turned towards what is relevant",
    source="arXiv 2503.23306",
    kinds=("language", "vision-language"),
    neutral={"scale": 0.0},
    strength="scale",
    reach=(0.0, 4.0),
)
def _open(model: Any, prompt: Prompt, *, file: str, scale: float = 1.0) -> AbstractContextManager[None]:
    """file: what save_focus wrote."""
    return focused(model, load_focus(file), scale)
