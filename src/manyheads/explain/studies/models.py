"""Studies of a trained model's heads: the model is a setting, `--model` on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from manyheads.explain.studies.study import Study
from manyheads.hosts.fingerprint import fingerprint
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.probes import Inputs, Needles
from manyheads.tasks.draw import generator


@lru_cache(maxsize=1)
def opened_model(name: str) -> Loaded:
    """One at a time; "" is the packaged byte-level model."""
    return load_model(name or None)


class ModelStudy(Study):
    """A study with a field `model`: a folder, hub name, .gguf file or smollm2; "": the packaged byte-level model."""

    model: str

    @property
    def loaded(self) -> Loaded:
        return opened_model(self.model)

    def identity(self) -> dict[str, Any]:
        return {"weights": fingerprint(self.loaded.model, "").weights}


@torch.no_grad()
def needle_recall(loaded: Loaded, needles: Sequence[Needles]) -> float:
    """Of the hidden keys' tokens the share that is the likeliest next one, each after the key's tokens before it."""
    found = []
    for needle in needles:
        logits = loaded.model(input_ids=needle.ids[None], use_cache=False).logits[0]
        said = logits.argmax(-1)
        found += [float((said[a - 1 : b - 1] == needle.ids[a:b]).double().mean()) for a, b in needle.asked]
    return sum(found) / len(found)


def hidden_keys(loaded: Loaded, length: int, count: int, seed: int, purpose: str) -> list[Needles]:
    """`count` inputs with a key each, told evenly from the start to the end; other keys for another purpose."""
    inputs = Inputs(loaded, seed=generator(purpose, seed).initial_seed())
    return [inputs.needles(length, i, depth=i / max(1, count - 1)) for i in range(count)]
