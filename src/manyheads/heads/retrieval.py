"""Retrieval score: how often a head looks at the very token of the needle that the model then says.

Claim: a few heads copy from far back, and they are the same for every context length.
While a hidden key is answered greedily, a head scores 1 / |needle| at a step where one of the top_k keys that it
attends to most, position i, lies in the needle and the token generated is token i. A trial counts if more than half of
the needle's tokens are in the answer (ROUGE-1 recall); the score is the mean over the trials that count, over lengths
and depths. Source: arXiv 2404.15574, nightdessert/Retrieval_Head. As in the code, the token compared is the one that
the step generates, the divisor is the needle's length, and a step scores once, however many of its top_k keys fit (the
paper and the released scores have top_k = 1). Here the needle is a number of five digits (theirs: a sentence), recall
is over tokens (theirs: stemmed words), and an answer ends at a newline or 8 tokens after the needle's length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.cache_names import cache_of, with_cache
from manyheads.heads.scores import by_layer
from manyheads.hosts.device import device_of
from manyheads.hosts.probes import Inputs, Needles
from manyheads.runs.steps import Tell, silent

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_BEYOND = 8


def retrieval(
    inputs: Inputs,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    repeats: int = 1,
    top_k: int = 1,
    tell: Tell = silent,
) -> tuple[Tensor, int]:
    """Scores of the trials that count [layers, query heads, trials], and how many trials there were. ValueError for a
    top_k below 1."""
    if top_k < 1:
        raise ValueError(f"retrieval: top_k={top_k}; want how many keys a head is asked for, at least 1")
    trials = [(length, depth, number) for number in range(repeats) for length in lengths for depth in depths]
    found: list[Tensor] = []
    for done, (length, depth, number) in enumerate(trials):
        tell(done, len(trials), f"{len(found)} of {done} needles found" if done else "")
        needle = inputs.needles(length, 1000 * number + round(100 * depth), depth=depth)
        best, said = answer(inputs, needle, top_k)
        own = needle.ids[slice(*needle.told[0])].tolist()
        if recall(own, said) > 0.5:
            found.append(score(best, said, needle.ids.tolist(), needle.told[0]))
    if not found:
        config = inputs.loaded.config
        return torch.zeros(config.num_hidden_layers, config.num_attention_heads, 0), len(trials)
    return torch.stack(found, -1), len(trials)


def score(best: Tensor, said: Sequence[int], prompt: Sequence[int], needle: tuple[int, int]) -> Tensor:
    """best [steps, layers, heads, k]: the keys that each head attends to most. [layers, heads]."""
    start, end = needle
    inside = (best >= start) & (best < end)
    tokens = torch.tensor(prompt)[best.clamp(max=len(prompt) - 1)]
    hits = inside & (tokens == torch.tensor(said)[:, None, None, None])
    return hits.any(-1).sum(0) / (end - start)


def recall(wanted: Sequence[int], said: Sequence[int]) -> float:
    """ROUGE-1 recall: the share of the wanted tokens that were said, each counted as often as it is in both."""
    return (Counter(wanted) & Counter(said)).total() / len(wanted)


@torch.no_grad()
def answer(inputs: Inputs, needle: Needles, top_k: int = 1) -> tuple[Tensor, list[int]]:
    """The keys that each head attends to most at every step [steps, layers, heads, top_k], and the tokens generated."""
    from manyheads.hosts.taps import tap

    model, device = inputs.loaded.model, device_of(inputs.loaded.model)
    prompt = needle.ids[: needle.asked[0][0]].to(device)
    limit = needle.told[0][1] - needle.told[0][0] + _BEYOND
    past = cache_of(model.base_model(input_ids=prompt[None, :-1], use_cache=True))
    best: list[Tensor] = []
    said: list[int] = []
    step: dict[int, Tensor] = {}

    def read(call: Any) -> None:
        weights = call.weights()[0, :, -1]
        # A stable order: of keys that weigh the same, which bfloat16 has many of, the earlier ones on every device.
        step[call.layer] = weights.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].cpu()

    token = prompt[None, -1:]
    with tap(model, read, kind="self"):
        while len(said) < limit:
            out = model(input_ids=token, use_cache=True, **with_cache({}, past))
            past, token = cache_of(out), out.logits[:, -1:].argmax(-1)
            best.append(by_layer([step[layer] for layer in sorted(step)]))
            said.append(int(token))
            if "\n" in inputs.loaded.decode(said[-1:]):
                break
    return torch.stack(best), said
