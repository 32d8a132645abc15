"""One run of `manyheads steer`: everything that is measured, as plain numbers fit for JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.loading import Loaded
from manyheads.hosts.questions import held_out, split
from manyheads.steer.measuring import Opener, along, answer, bits_per_byte, cost, kl_bits, look, top
from manyheads.steer.method import Method, Prompt

# Tokens of held-out text that damage is measured on.
HELD_OUT = 128


def steered(
    loaded: Loaded,
    chosen: Method,
    arguments: Mapping[str, Any],
    prompt: Prompt,
    *,
    kind: str,
    new: int = 24,
    wanted: tuple[str, int] | None = None,
    sweep: tuple[str, Sequence[Any]] | None = None,
    timed: bool = True,
    tell: Callable[[str, float], None] = lambda what, share: None,
) -> dict[str, Any]:
    """Runs without and with. wanted: a text that the answer might begin with, and its first token. sweep: an argument
    and the values that it takes, all others as they are."""
    if kind not in chosen.kinds:
        raise ValueError(f"{chosen.name} takes {', '.join(chosen.kinds)} models; {loaded.name} is a {kind} model")
    model = loaded.model

    def make() -> Any:
        return chosen.open(model, prompt, **arguments)

    tell("reading the prompt", 0.0)
    before = look(model, prompt, nullcontext)
    after = look(model, prompt, make, before.sinks)
    tell("answering", 0.2)
    plain, given = answer(model, prompt, nullcontext, new), answer(model, prompt, make, new)
    follow = kl_bits(along(model, prompt, nullcontext, plain), along(model, prompt, make, plain)) if plain else 0.0
    chosen.check_changed(arguments, plain != given or follow > 0 or not torch.equal(before.logits, after.logits))
    report: dict[str, Any] = {
        "model": {"name": loaded.name, "class": type(model).__name__, "kind": kind},
        "method": {
            "name": chosen.name,
            "title": chosen.title,
            "source": chosen.source,
            "arguments": _all(chosen, arguments),
        },
        "prompt": {"tokens": _tokens(loaded, prompt), "spans": {name: prompt.places(name) for name in prompt.spans}},
        "answers": {"without": loaded.decode(plain), "with": loaded.decode(given), "same": plain == given},
        "next": {"kl_bits": kl_bits(before.logits, after.logits), "tokens": top(loaded, before.logits, after.logits)},
        "answer_kl_bits": follow,
        "attention": _attention(before.shares, after.shares),
    }
    if wanted is not None:
        report["wanted"] = _wanted(wanted, before.logits, after.logits)
    if timed:
        tell("timing", 0.5)
        report["cost"] = cost(model, prompt, make, plain)
    if sweep is not None:
        report["sweep"] = swept(loaded, chosen, arguments, prompt, sweep, plain, wanted, tell)
    tell("done", 1.0)
    return report


def swept(
    loaded: Loaded,
    chosen: Method,
    arguments: Mapping[str, Any],
    prompt: Prompt,
    sweep: tuple[str, Sequence[Any]],
    plain: list[int],
    wanted: tuple[str, int] | None = None,
    tell: Callable[[str, float], None] = lambda what, share: None,
) -> dict[str, Any]:
    """A point per value: effect (KL at the next token, and what happened to the wanted token) and damage (bits per byte
    of held-out text behind the prompt, and whether the answer is another)."""
    key, values = sweep
    model, ids = loaded.model, _held_out(loaded, prompt)
    base = last_logits(model, prompt, nullcontext)
    level = bits_per_byte(loaded, prompt, nullcontext, ids)
    points = []
    for number, value in enumerate(values):
        tell(f"{key}={value}", 0.6 + 0.4 * number / len(values))
        own = {**arguments, key: value}

        def make(own: Mapping[str, Any] = own) -> Any:
            return chosen.open(model, prompt, **own)

        logits, given = last_logits(model, prompt, make), answer(model, prompt, make, max(1, len(plain)))
        bits = bits_per_byte(loaded, prompt, make, ids)
        point: dict[str, Any] = {"value": value, "kl_bits": kl_bits(base, logits), "bits_per_byte": bits}
        point |= {"lost": bits - level, "answer": loaded.decode(given), "changed": given != plain}
        if wanted is not None:
            point["wanted"] = _wanted(wanted, base, logits)
        points.append(point)
    return {"argument": key, "points": points, "bits_per_byte": level, "held_out_tokens": len(ids)}


@torch.no_grad()
def last_logits(model: Any, prompt: Prompt, make: Opener) -> Tensor:
    with make():
        logits: Tensor = model(**prompt.inputs, use_cache=False).logits[0, -1].float()
    return logits


def wanted_token(loaded: Loaded, text: str | None, wanted: str | None) -> tuple[str, int] | None:
    """The first token of a text behind the prompt, cut as the tokenizer cuts the two together."""
    if wanted is None:
        return None
    ids = split(loaded, text or "", wanted)[1]
    if not ids:
        raise ValueError("--wanted is empty: give the words that the answer might begin with")
    return wanted, ids[0]


def _wanted(wanted: tuple[str, int], before: Tensor, after: Tensor) -> dict[str, Any]:
    p, q = float(before.softmax(-1)[wanted[1]]), float(after.softmax(-1)[wanted[1]])
    return {"text": wanted[0], "id": wanted[1], "without": p, "with": q}


def _attention(before: Mapping[str, list[float]], after: Mapping[str, list[float]]) -> dict[str, Any]:
    return {name: {"without": before[name], "with": after[name]} for name in before}


def _all(chosen: Method, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: arguments.get(name, default) for name, default in chosen.arguments.items()}


def _tokens(loaded: Loaded, prompt: Prompt) -> list[str]:
    return loaded.tokens(prompt.inputs["input_ids"][0].tolist())


def _held_out(loaded: Loaded, prompt: Prompt) -> list[int]:
    """As much as fits behind the prompt."""
    most = getattr(loaded.config, "max_position_embeddings", None) or HELD_OUT + 10**9
    room = min(HELD_OUT, most - prompt.inputs["input_ids"].shape[1] - 1)
    if room < 8:
        raise ValueError("the prompt leaves no room for held-out text behind it: give a shorter one to sweep")
    return loaded.encode(held_out()[: 8 * HELD_OUT])[:room]
