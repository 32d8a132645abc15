"""Mechanisms below n^2: the exponent of forward time; where the state is of fixed size, decoding at 64k against 1k.

Which are linear in the length, and whose state is of fixed size, is read off the cards: those have targets.
"""

from __future__ import annotations

import re
import statistics
from typing import Any

import torch

from common import device_argument, exponent, keep_pages, once, save
from manyheads import Mechanism, create_attention, mechanism_class

MEASURES = (
    "src/manyheads/mechanism.py",
    "src/manyheads/finite.py",
    "src/manyheads/shell.py",
    "src/manyheads/softmax.py",
    "src/manyheads/state.py",
    "src/manyheads/functional",
    "src/manyheads/mechanisms",
)

DIM, HEADS = 256, 4
LENGTHS = [2048, 4096, 8192, 16384, 32768]
SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},  # what they are to be faster than, from some length on
    "hedgehog": {},
    "based": {},
    "lightning": {},
    "flow": {},
    "lln": {},
    "transnormerllm": {},
    "fastmax": {"p": 1},
    "inline": {},
    "aaren": {},
    "mega": {"chunk": 128},
    "h3": {"state_dim": 16},
    "hyena": {"max_length": 1 << 16},
    "titans": {"form": "mag"},
    "dynamic-convolution": {},
    "lightweight-convolution": {},
    "mossformer": {},
    "neighborhood": {"window": 128},
    "mswa": {"window": 128},
    "dma": {"window": 128},
    "seqboat": {"window": 128},
    "routing-transformer": {"clusters": 64, "window": 512},
    "mosa": {"top_k": 128},
    "multi-scale": {"scales": [1, 3, 16, 128]},
    "sparse-sinkhorn": {"block": 128},
    "linformer": {"max_length": 1 << 15},
    "agent": {},
    "induced-set": {},
    "gaussian-adaptive": {},
    "context-broadcasting": {},
    "sdim": {},
    "tree-cross": {},
    "moba": {"block": 256, "top_k": 4},
    "landmark": {"block": 64, "top_k": 4},
    "combiner": {"block": 256},
    "cca": {},
}


def build(name: str, config: dict[str, Any], device: str) -> Mechanism:
    patterns = {pattern.value for pattern in mechanism_class(name).card.patterns}
    causal = bool(patterns & {"causal-self"})
    return create_attention(name, DIM, HEADS, causal=causal, **config).to(device).eval()


def is_linear(module: Mechanism) -> bool:
    return "^2" not in module.card.time


def holds_a_fixed_state(module: Mechanism) -> bool:
    return module.causal and module.card.decodes and "n" not in re.findall(r"[a-z_]+", module.card.state)


def forward_exponent(module: Mechanism, device: str) -> tuple[float, dict[int, float]]:
    """Slope over LENGTHS of the least of a few times: what disturbs a run only adds to it."""
    seconds = {}
    for n in LENGTHS:
        x = torch.randn(1, n, DIM, device=device)
        context = None if any(not p.cross for p in module.card.patterns) else torch.randn(1, n, DIM, device=device)
        with torch.no_grad():
            module(x, context)
            seconds[n] = min(once(lambda: module(x, context), device) for _ in range(5))  # noqa: B023
    return exponent(LENGTHS, list(seconds.values())), seconds


@torch.no_grad()
def decode(module: Mechanism, device: str) -> dict[str, Any]:
    """A state filled to 1k and one filled to 64k, stepped in turns; and what each of them holds."""
    states = []
    for context in (1024, 65536):
        state = module.init_state(1)
        for _ in range(context // 1024):
            module(torch.randn(1, 1024, DIM, device=device), state=state)
        for _ in range(64):  # a long chunk may leave more room than single steps need
            module(torch.randn(1, 1, DIM, device=device), state=state)
        states.append(state)
    token = torch.randn(1, 1, DIM, device=device)
    ratios, short = [], []
    for _ in range(200):
        near, far = (once(lambda: module(token, state=state), device) for state in states)  # noqa: B023
        ratios.append(far / near)
        short.append(near)
    return {
        "decode_ms": 1e3 * statistics.median(short),
        "decode_ratio": statistics.median(ratios),
        "decode_target": 1.3,
        "state_bytes_1k": states[0].nbytes,
        "state_bytes_64k": states[1].nbytes,
    }


def main() -> None:
    device, rows = device_argument(), []
    keep_pages()
    for name, config in SETTINGS.items():
        module = build(name, config, device)
        slope, seconds = forward_exponent(module, device)
        row = {"mechanism": name, **config, "time": module.card.time, "exponent": slope}
        row |= {"target": 1.15} if is_linear(module) else {}
        row |= {f"ms_{n}": 1e3 * s for n, s in seconds.items()}
        row |= decode(module, device) if holds_a_fixed_state(module) else {}
        print({key: row[key] for key in ("mechanism", "exponent")}, flush=True)
        rows.append(row)
    save("linear", device, rows)


if __name__ == "__main__":
    main()
