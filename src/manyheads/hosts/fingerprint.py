"""Which model a measurement was taken on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

# Values of every parameter that the digest looks at.
_SAMPLES = 64


@dataclass(frozen=True)
class Fingerprint:
    """Which model: its name for people, the rest for the comparison. weights: a digest of some values of every
    parameter, rounded to bfloat16, so that it does not depend on the dtype that the model was loaded in."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    weights: str

    def differences(self, other: Fingerprint) -> list[str]:
        """What tells the two apart, in words; a folder may be called anything."""
        pairs = ((key, getattr(self, key), getattr(other, key)) for key in ("layers", "heads", "kv_heads", "weights"))
        return [f"{key.replace('_', ' ')} {mine} and {theirs}" for key, mine, theirs in pairs if mine != theirs]


def fingerprint(model: Any, name: str) -> Fingerprint:
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    digest = hashlib.sha256()
    for key, value in sorted(model.named_parameters()):
        flat = value.detach().flatten()
        at = torch.linspace(0, len(flat) - 1, min(_SAMPLES, len(flat)), dtype=torch.float64).long()
        some = flat[at.to(flat.device)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{key} {list(value.shape)} {some.tolist()}\n".encode())
    return Fingerprint(name, config.num_hidden_layers, heads, kv_heads, digest.hexdigest()[:16])
