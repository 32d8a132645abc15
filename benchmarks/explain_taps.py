"""Taps: what they cost while nothing is read, and the memory of one head's weights at a length of 8,192."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import device_argument, pair, peak_bytes, save
from manyheads.hosts.taps import tap

MEASURES = ("src/manyheads/hosts/taps.py",)


def llama(layers: int, device: str, width: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=8192, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device).eval()


@torch.no_grad()
def idle(device: str, length: int) -> dict[str, Any]:
    """A forward pass with a tap on every layer whose reader looks at nothing, against the model alone."""
    model = llama(8, device)
    tokens = torch.arange(length, device=device)[None] % 256

    with tap(model, lambda call: None):
        given = model(tokens).logits
    torch.testing.assert_close(given, model(tokens).logits, atol=0, rtol=0)
    twin = copy.deepcopy(model)
    with tap(twin, lambda call: None):
        found = pair(lambda: twin(tokens), lambda: model(tokens), rounds=21, device=device)
    return {"what": "taps that read nothing", "length": length, **found, "target": 1.02}


ONE_HEAD = """
import ctypes, sys, torch
sys.path.insert(0, {path!r})
from common import peak_reset, peak_since
from explain_taps import llama
from manyheads.hosts.taps import record
torch.set_num_threads(1)
model = llama(1, "cpu", 128)
tokens = torch.arange(8192)[None] % 256
with torch.no_grad(), record(model) as calls:
    model.model(tokens)
    call = calls[0]
    call.weights([0], slice(0, 64))
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the model's pass gave back is no part of the baseline
    baseline = peak_reset()
    share = torch.zeros(8192)
    for rows in call.blocks([0]):
        share += call.weights([0], rows)[0, 0].sum(0)
    assert abs(float(share.sum()) - 8192) < 1
    print(peak_since(baseline))
"""


def main() -> None:
    device = device_argument()
    rows: list[dict[str, Any]] = [idle(device, length) for length in (256, 1024)]
    if device == "cpu":
        held = peak_bytes(ONE_HEAD.format(path=str(Path(__file__).parent)))
        rows.append({"what": "one head at 8192", "peak_bytes": held, "matrix_bytes": 8192**2 * 4, "target": 64 * 2**20})
    save("explain_taps", device, rows)


if __name__ == "__main__":
    main()
