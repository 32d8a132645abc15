"""A model with an intervention and without, on the same prompt: answers, distributions, attention, cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from manyheads.cache_names import cache_of, with_cache
from manyheads.hosts.calls import AttentionCall, edits_heard, opened
from manyheads.hosts.loading import Loaded
from manyheads.hosts.sites import text_stack
from manyheads.hosts.taps import tap
from manyheads.steer.calibrate import column_means, real_keys
from manyheads.steer.method import Prompt

# Opens the intervention anew; as a context manager it can be entered once.
Opener = Callable[[], AbstractContextManager[Any]]
# A key that gets so many times its share of the attention of all later queries is a sink, as in ACT (2406.15765).
SINK = 5.0
TOP = 8


@dataclass
class Looked:
    """logits [v] of the prompt's last place; shares: span -> a number per layer, the attention that the last place pays
    it on average over the heads; rows: layer -> [h, m] that attention."""

    logits: Tensor
    shares: dict[str, list[float]] = field(default_factory=dict)
    sinks: dict[int, Tensor] = field(default_factory=dict)


@torch.no_grad()
def look(model: Any, prompt: Prompt, make: Opener, sinks: Mapping[int, Tensor] | None = None) -> Looked:
    """One pass over the prompt. sinks: layer -> [h, m] bool of an earlier look; found where none are given. What an
    intervention does to heads' outputs alone shows in the layers behind it."""
    rows: dict[int, Tensor] = {}
    found: dict[int, Tensor] = {}
    edited: dict[str, list[tuple[list[int], Tensor]]] = {}

    def hear(call: AttentionCall, heads: list[int], part: slice, weights: Tensor) -> None:
        if part.stop == call.query.shape[2]:
            edited.setdefault(call.site.path, []).append((heads, weights[0, :, -1]))

    def reader(call: Any) -> None:
        own = opened(call, "steer")
        last = own.query.shape[2] - 1
        row = own.weights(rows=slice(last, last + 1))[0, :, 0].clone()
        for heads, weights in edited.pop(own.site.path, []):
            row[heads] = weights.to(row)
        # Where tokens leave, later layers have fewer columns: back to the prompt's places.
        spread = getattr(change, "spread", lambda columns: columns)
        rows[own.layer] = spread(row)
        if sinks is None:
            drained = column_means(own, None) > SINK / real_keys(own)[:, :1].sum(-1, keepdim=True)
            found[own.layer] = spread(drained[0])

    with ExitStack() as inside:
        inside.enter_context(edits_heard(hear))
        change = inside.enter_context(make())
        inside.enter_context(tap(model, reader, stack=text_stack(model), kind="self"))
        logits = model(**prompt.inputs, use_cache=False).logits[0, -1].float()
    drains = found if sinks is None else dict(sinks)
    shares = {
        name: [float(row[:, prompt.places(name)].sum(-1).mean()) for row in _ordered(rows)] for name in _told(prompt)
    }
    shares["sinks"] = [float((rows[layer] * drains[layer]).sum(-1).mean()) for layer in sorted(rows)]
    return Looked(logits, shares, drains)


def _ordered(rows: Mapping[int, Tensor]) -> list[Tensor]:
    return [rows[layer] for layer in sorted(rows)]


def _told(prompt: Prompt) -> list[str]:
    """The image, all marks together, and each of several."""
    marks = [f"text{i + 1}" for i in range(len(prompt.marked()))]
    return [
        *(["image"] if "image" in prompt.spans else []),
        *(["text"] if marks else []),
        *(marks if marks[1:] else []),
    ]


def kl_bits(wanted: Tensor, given: Tensor) -> float:
    """sum p log2 (p / q) over the vocabulary, p of wanted; on average over rows [..., v] of logits."""
    p, q = wanted.float().log_softmax(-1), given.float().log_softmax(-1)
    each = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
    return float(each.mean().clamp_min(0)) / 0.6931471805599453


@torch.no_grad()
def answer(model: Any, prompt: Prompt, make: Opener, new: int) -> list[int]:
    """Greedy tokens, up to the model's own end."""
    length = prompt.inputs["input_ids"].shape[1]
    with make():
        out = model.generate(**prompt.inputs, max_new_tokens=new, do_sample=False, num_beams=1)
    return [int(i) for i in out[0, length:]]


def followed(prompt: Prompt, ids: list[int]) -> dict[str, Any]:
    """The prompt's inputs with more tokens of text behind them."""
    tokens = prompt.inputs["input_ids"]
    more = torch.tensor([ids], dtype=tokens.dtype, device=tokens.device)
    inputs = dict(prompt.inputs)
    inputs["input_ids"] = torch.cat([tokens, more], 1)
    for name, own in prompt.inputs.items():
        if name != "input_ids" and isinstance(own, Tensor) and own.shape == tokens.shape:
            fill = torch.ones_like if name == "attention_mask" else torch.zeros_like
            inputs[name] = torch.cat([own, fill(more).to(own.dtype)], 1)
    return inputs


@torch.no_grad()
def along(model: Any, prompt: Prompt, make: Opener, ids: list[int]) -> Tensor:
    """[len(ids), v] logits: what the model expects at every one of these tokens behind the prompt."""
    with make():
        logits = model(**followed(prompt, ids), use_cache=False).logits[0]
    return logits[-len(ids) - 1 : -1].float()


def bits_per_byte(loaded: Loaded, prompt: Prompt, make: Opener, ids: list[int]) -> float:
    """Of a text that is read behind the prompt, so that the prompt's places mean what they meant."""
    logits = along(loaded.model, prompt, make, ids).log_softmax(-1)
    nats = -logits.gather(1, torch.tensor(ids, device=logits.device)[:, None]).sum()
    return float(nats) / 0.6931471805599453 / max(1, len(loaded.decode(ids).encode()))


def top(loaded: Loaded, without: Tensor, given: Tensor, count: int = TOP) -> list[dict[str, Any]]:
    """The likeliest tokens of both sides, by what they have with the intervention."""
    p, q = without.softmax(-1), given.softmax(-1)
    ids = dict.fromkeys(
        [*q.topk(min(count, q.numel())).indices.tolist(), *p.topk(min(count, p.numel())).indices.tolist()]
    )
    names = loaded.tokens(list(ids))
    rows = [
        {"token": name, "id": i, "without": float(p[i]), "with": float(q[i])}
        for i, name in zip(ids, names, strict=True)
    ]
    return sorted(rows, key=lambda row: -max(row["with"], row["without"]))


@torch.no_grad()
def cost(model: Any, prompt: Prompt, make: Opener, ids: list[int], turns: int = 3) -> dict[str, Any]:
    """Milliseconds of the prompt's pass and of a token behind it, without and with in turns within one run, so that a
    busy machine slows both; ratio: the median of the turns' ratios. Opening the intervention is not counted."""
    forced = (ids or [int(prompt.inputs["input_ids"][0, -1])])[:16]
    rounds = []
    for turn in range(turns + 1):
        pair = [_timed(model, prompt, how, forced) for how in (nullcontext, make)]
        if turn:  # the first warms up
            rounds.append(pair)
    held = {side: pair[2] for side, pair in zip(("without", "with"), rounds[-1], strict=True)}
    found: dict[str, Any] = {"tokens": len(forced), "turns": turns, "cache_bytes": held}
    for place, name in enumerate(("prompt", "token")):
        found[f"{name}_ms"] = {
            side: statistics.median(pair[i][place] for pair in rounds) for i, side in enumerate(("without", "with"))
        }
        found[f"{name}_ratio"] = statistics.median(pair[1][place] / pair[0][place] for pair in rounds)
    return found


def _timed(model: Any, prompt: Prompt, make: Opener, ids: list[int]) -> tuple[float, float, int]:
    """Milliseconds of the prompt and of a token, and bytes of keys and values that are held at the end."""
    tokens = prompt.inputs["input_ids"]
    seen = torch.ones(1, tokens.shape[1] + len(ids), dtype=torch.long, device=tokens.device)
    with make():
        begun = time.perf_counter()
        cache = cache_of(model(**prompt.inputs, use_cache=True, logits_to_keep=1))
        middle = time.perf_counter()
        for i, own in enumerate(ids):
            model(
                input_ids=tokens.new_tensor([[own]]),
                attention_mask=seen[:, : tokens.shape[1] + i + 1],
                use_cache=True,
                **with_cache({}, cache),
            )
        ended = time.perf_counter()
    held = sum(own.nbytes for layer in cache.layers for own in (layer.keys, layer.values) if own is not None)
    return (middle - begun) * 1e3, (ended - middle) * 1e3 / len(ids), held
