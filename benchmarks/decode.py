"""GQA decoding: one token against a long cache, packed queries against enable_gqa=True on the same tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common import device_argument, pair, save
from manyheads import create_attention
from manyheads.functional.grouped import attend_grouped

MEASURES = (
    "src/manyheads/mechanism.py",
    "src/manyheads/finite.py",
    "src/manyheads/shell.py",
    "src/manyheads/softmax.py",
    "src/manyheads/state.py",
    "src/manyheads/functional",
)

HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 32, 8, 128, 32768


def main() -> None:
    device, rows = device_argument(), []
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.randn(1, HEADS, 1, HEAD_DIM, device=device, dtype=dtype)
        k, v = (torch.randn(1, KV_HEADS, CONTEXT, HEAD_DIM, device=device, dtype=dtype) for _ in range(2))
        ours = attend_grouped(q, k, v, scale=HEAD_DIM**-0.5)
        theirs = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)
        found = pair(
            lambda: attend_grouped(q, k, v, scale=HEAD_DIM**-0.5),  # noqa: B023
            lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),  # noqa: B023
            device=device,
        )
        rows.append({"what": "attention", "dtype": str(dtype), **found, "target": 1 / 3})
    rows.append(whole_step(device))
    save("decode", device, rows)


@torch.no_grad()
def whole_step(device: str) -> dict[str, object]:
    """A decode step of the module (projections, append, attention), and how often its cache was moved."""
    module = create_attention("gqa", 4096, HEADS, kv_heads=KV_HEADS, causal=True).to(device).eval()
    state = module.init_state(1)
    rows = torch.randn(1, KV_HEADS, CONTEXT, HEAD_DIM, device=device)
    state.append("keys", rows)
    state.append("values", rows)
    state.advance(CONTEXT)
    token, places = torch.randn(1, 1, 4096, device=device), set()
    keys, values = rows.clone(), rows.clone()

    def ours() -> None:
        module(token, state=state)
        buffer = state.grown["keys"].data
        assert buffer is not None
        places.add(buffer.data_ptr())

    def concatenating() -> None:
        nonlocal keys, values
        q, k, v = module.project(token, token)  # type: ignore[operator]
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        mixed = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        module.o_proj(mixed.transpose(1, 2).flatten(-2))  # type: ignore[operator]

    found = pair(ours, concatenating, device=device)
    return {"what": "whole step, against torch.cat", **found, "buffers_used": len(places)}


if __name__ == "__main__":
    main()
