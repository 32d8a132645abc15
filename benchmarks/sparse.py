"""MSWA and MoBA, causal, against full causal scaled_dot_product_attention on the same projections, n = 8192."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common import device_argument, pair, save
from manyheads import SoftmaxAttention, Where, create_attention

MEASURES = (
    "src/manyheads/mechanism.py",
    "src/manyheads/finite.py",
    "src/manyheads/shell.py",
    "src/manyheads/softmax.py",
    "src/manyheads/state.py",
    "src/manyheads/functional",
    "src/manyheads/mechanisms",
)

DIM, HEADS, N = 512, 8, 8192
SETTINGS = {
    "mswa": ({"window": 256}, {"forward": 1 / 5, "forward+backward": 1 / 3}),
    "moba": ({"block": 128, "top_k": 4}, {"forward": 1 / 3, "forward+backward": 1 / 2}),
}


def attention_only(module: SoftmaxAttention, device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """score .. mix of a module, without its projections."""
    i = torch.arange(N, device=device)
    where = Where(i, i, i[None], i[None], causal=True)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = module.fused(q, k, v, where)
        assert mixed is not None
        return mixed

    return call


def check(module: SoftmaxAttention, device: str) -> None:
    """The gate: fast equals eager at a length that is no multiple of a block."""
    x = torch.randn(1, 1100, DIM, device=device)
    torch.testing.assert_close(module(x).output, module(x, need_weights=True).output, rtol=1e-3, atol=1e-4)


def main() -> None:
    device, rows = device_argument(), []
    full = create_attention("softmax", DIM, HEADS, causal=True).to(device)
    assert isinstance(full, SoftmaxAttention)
    for name, (config, targets) in SETTINGS.items():
        module = create_attention(name, DIM, HEADS, causal=True, **config).to(device)
        assert isinstance(module, SoftmaxAttention)
        module.load_state_dict(full.state_dict())
        check(module, device)
        x = torch.randn(1, N, DIM, device=device)
        q, k, v = (t.detach().requires_grad_() for t in full.project(x, x))
        ours, theirs = attention_only(module, device), attention_only(full, device)
        found = {}
        with torch.no_grad():
            found["forward"] = pair(lambda: ours(q, k, v), lambda: theirs(q, k, v), rounds=7, device=device)  # noqa: B023
            whole = pair(lambda: module(x), lambda: full(x), rounds=5, device=device)  # noqa: B023
        found["forward+backward"] = pair(
            lambda: ours(q, k, v).sum().backward(),  # noqa: B023
            lambda: theirs(q, k, v).sum().backward(),  # noqa: B023
            rounds=5,
            device=device,
        )
        rows += [
            {"mechanism": name, "what": f"attention, {kind}", **times, "target": targets[kind]}
            for kind, times in found.items()
        ]
        rows.append({"mechanism": name, "what": "whole module, forward", **whole})
    save("sparse", device, rows)


if __name__ == "__main__":
    main()
