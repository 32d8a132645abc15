"""softmax, MQA and GQA against a hand-written module around scaled_dot_product_attention with the same projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import device_argument, pair, peak_bytes, save
from manyheads import create_attention

MEASURES = (
    "src/manyheads/mechanism.py",
    "src/manyheads/finite.py",
    "src/manyheads/shell.py",
    "src/manyheads/softmax.py",
    "src/manyheads/state.py",
    "src/manyheads/functional",
)

DIM, HEADS = 512, 8
KV_HEADS = {"softmax": 8, "mqa": 1, "gqa": 2}


class HandWritten(nn.Module):
    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        width = kv_heads * DIM // HEADS
        self.grouped = kv_heads != HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(DIM, size, bias=False) for size in (DIM, width, width, DIM)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


def sides(name: str, device: str) -> tuple[nn.Module, nn.Module]:
    """Ours and the hand-written one, with the same weights."""
    more = {"kv_heads": KV_HEADS[name]} if name == "gqa" else {}
    ours = create_attention(name, DIM, HEADS, causal=True, **more).to(device)
    theirs = HandWritten(KV_HEADS[name]).to(device)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


MEMORY = """
import sys, torch
sys.path.insert(0, "benchmarks")
from common import peak_reset, peak_since
from softmax import DIM, sides
name, side, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
module = sides(name, "cpu")[side]
x = torch.randn(1, 64, DIM, requires_grad=True)
out = module(x); out = out.output if side == 0 else out
out.sum().backward()
baseline = peak_reset()
x = torch.randn(1, n, DIM, requires_grad=True)
out = module(x); out = out.output if side == 0 else out
out.sum().backward()
print(peak_since(baseline))
"""


def main() -> None:
    device, rows = device_argument(), []
    for name in KV_HEADS:
        ours, theirs = sides(name, device)
        for n in (1024, 4096):
            x = torch.randn(1, n, DIM, device=device, requires_grad=True)
            torch.testing.assert_close(ours(x).output, theirs(x), rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                found = pair(lambda: ours(x), lambda: theirs(x), device=device)  # noqa: B023
            rows.append({"mechanism": name, "n": n, "pass": "forward", **found, "target": 1.05})
            found = pair(
                lambda: ours(x).output.sum().backward(),  # noqa: B023
                lambda: theirs(x).sum().backward(),  # noqa: B023
                device=device,
            )
            rows.append({"mechanism": name, "n": n, "pass": "forward+backward", **found, "target": 1.05})
            if device == "cpu":
                a, b = (peak_bytes(MEMORY, name, str(side), str(n)) for side in (0, 1))
                rows.append(
                    {"mechanism": name, "n": n, "pass": "peak memory", "ratio": a / b, "bytes": a, "target": 1.1}
                )
    save("softmax", device, rows)


if __name__ == "__main__":
    main()
