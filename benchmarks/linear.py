"""Mechanisms that are linear in the length: the exponent of forward time, decoding at 64k against 1k, state bytes."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from common import device_argument, exponent, once, save
from manyheads import Mechanism, create_attention

DIM, HEADS = 256, 4
LENGTHS = [2048, 4096, 8192, 16384, 32768]
SETTINGS: dict[str, dict[str, Any]] = {
    "hedgehog": {},
    "based": {},
    "lightning": {},
    "aaren": {},
    "mega": {"chunk": 128},
    "dynamic-convolution": {},
    "flow": {},
    "lln": {},
    "transnormerllm": {},
    "fastmax": {"p": 1},
    "h3": {"state_dim": 16},
    "titans": {"form": "mag"},
}


def forward_exponent(module: Mechanism, device: str) -> tuple[float, dict[int, float]]:
    """Slope over LENGTHS of the least of a few times: what disturbs a run only adds to it."""
    seconds = {}
    for n in LENGTHS:
        x = torch.randn(1, n, DIM, device=device)
        with torch.no_grad():
            module(x)
            seconds[n] = min(once(lambda: module(x), device) for _ in range(5))  # noqa: B023
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
    for name, config in SETTINGS.items():
        module = create_attention(name, DIM, HEADS, causal=True, **config).to(device).eval()
        slope, seconds = forward_exponent(module, device)
        times = {f"ms_{n}": 1e3 * s for n, s in seconds.items()}
        rows.append({"mechanism": name, "exponent": slope, "target": 1.15, **times, **decode(module, device)})
    save("linear", device, rows)


if __name__ == "__main__":
    main()
