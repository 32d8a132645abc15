"""A training step whose attention is computed within drawn windows, against the same step on all keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import device_argument, pair, peak_bytes, save
from manyheads import create_attention
from manyheads.training import LocallySubsampled, SubsampledAttention, locally_subsampled

MEASURES = (
    "src/manyheads/training/subsampled.py",
    "src/manyheads/functional/shuffled.py",
    "src/manyheads/hosts/sampled.py",
    "src/manyheads/hosts/attend.py",
    "src/manyheads/softmax.py",
)

DIM, HEADS, N = 256, 4, 2048

# Peak of one step of a Llama of two layers, over what it holds before: its own eager attention, its sdpa, or windows.
HOST_PEAK = """
import sys
sys.path.insert(0, {path!r})
import torch
from common import peak_reset, peak_since
from subsampled import host
step = host(sys.argv[1], n=2048)
step(64)
baseline = peak_reset()
step(2048)
print(peak_since(baseline))
"""


def host(kind: str, n: int, device: str = "cpu") -> Callable[[int], Any]:
    """A training step on two texts of so many tokens, one of them padded: all keys (eager, sdpa), or a quarter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=DIM, intermediate_size=DIM, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=n,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa" if kind == "windows" else kind)
    model.to(device).train()
    ids, real = torch.randint(64, (2, n), device=device), torch.ones(2, n, dtype=torch.long, device=device)
    real[1, : n // 8] = 0

    def step(length: int) -> None:
        # The last tokens, so that a short step has some that are real.
        batch = {"input_ids": ids[:, -length:], "attention_mask": real[:, -length:], "labels": ids[:, -length:]}
        if kind == "windows":
            with locally_subsampled(model, keep=0.25):
                loss = model(**batch).loss
        else:
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad()

    return step


def attention(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        module(x).output.sum().backward()
        module.zero_grad()

    return step


def check(device: str) -> None:
    """The gate: one window is all keys."""
    module = create_attention("softmax", DIM, HEADS, causal=True).to(device)
    x = torch.randn(2, 70, DIM, device=device)
    torch.testing.assert_close(LocallySubsampled(module, keep=1.0).train()(x).output, module(x).output)


def main() -> None:
    device, rows = device_argument(), []
    check(device)
    x = torch.randn(1, N, DIM, device=device)
    for causal in (False, True):
        module = create_attention("softmax", DIM, HEADS, causal=causal).to(device).train()
        for keep in (0.25, 0.125) if causal else (0.25,):
            ours = LocallySubsampled(module, keep=keep).train()
            found = pair(attention(ours, x), attention(module, x), rounds=3, device=device)
            rows.append(
                {"what": f"attention step, n={N}", "causal": causal, "keep": keep, "against": "all keys", **found}
            )
    masked = SubsampledAttention(module, keep=0.25).train()
    found = pair(attention(LocallySubsampled(module).train(), x), attention(masked, x), rounds=3, device=device)
    rows.append({"what": f"attention step, n={N}", "causal": True, "keep": 0.25, "against": "keys masked", **found})
    ours, theirs = host("windows", N, device), host("sdpa", N, device)
    found = pair(lambda: ours(N), lambda: theirs(N), rounds=2, device=device)
    rows.append({"what": f"llama step, n={N}, padded", "keep": 0.25, "against": "sdpa", **found})
    if device == "cpu":
        script = HOST_PEAK.format(path=str(Path(__file__).parent))
        peaks = {kind: peak_bytes(script, kind) for kind in ("windows", "sdpa", "eager")}
        rows += [
            {
                "what": f"llama step, n={N}, padded: peak bytes", "keep": 0.25, "against": kind,
                "ours": peaks["windows"], "theirs": peaks[kind], "ratio": peaks["windows"] / peaks[kind],
            }
            for kind in ("sdpa", "eager")
        ]  # fmt: skip
    save("subsampled", device, rows)


if __name__ == "__main__":
    main()
