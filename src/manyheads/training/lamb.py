"""LAMB: Adam whose step in each tensor is as long as the tensor itself, for batches too large for Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lamb(Optimizer):
    """Layer-wise adaptive moments: every tensor w of parameters moves by lr times its own norm.

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  m' = m / (1 - b1^t),  v' = v / (1 - b2^t)
        u = m' / (sqrt(v') + eps) + weight_decay w
        w = w - lr ratio u,  ratio = phi(|w|) / |u|, one where either norm is zero;  phi(z) = clamp(z, *bounds)

    A layer's gradients times a constant change nothing but through eps. bias_correction=False takes m and v as they
    are, which the paper reports to do as well with a warm-up. bounds=None: phi is the identity, as in the authors'
    code; the paper allows a clamp. Weight decay is in u, and so in its norm. A group of parameters with adapt=False has
    ratio one, which is AdamW: the released code leaves out biases and norms by name, and `lamb_groups` so makes two
    groups. The gradient's global norm is not clipped here (timm's is): clip it before.
    Scale lr by the square root of the batch size. Parameters below float32 are refused: keep those in float32 and
    compute under autocast, as sums of steps do not fit into less.
    Source: You et al., Large Batch Optimization for Deep Learning, arXiv:1904.00962, algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        bounds: tuple[float, float] | None = None,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "bounds": bounds,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure, called with gradients on, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)
        return loss

    def _move(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if g.is_sparse:
            raise ValueError("Lamb: a sparse gradient was given; want dense ones: nn.Embedding(..., sparse=False)")
        state = self.state[p]
        if not state:
            # On the CPU, as those of torch's optimizers: a checkpoint of either holds the same kinds of things.
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        m, v = state["exp_avg"], state["exp_avg_sq"]
        first, second = group["betas"]
        m.lerp_(g, 1 - first)
        v.mul_(second).addcmul_(g, g, value=1 - second)
        t = state["step"].item() if group["bias_correction"] else float("inf")
        u = (m / (1 - first**t)) / ((v / (1 - second**t)).sqrt() + group["eps"]) + group["weight_decay"] * p
        if group["adapt"]:
            u = u * trust_ratio(p, u, group["bounds"])
        p.sub_(u, alpha=group["lr"])


def trust_ratio(w: Tensor, u: Tensor, bounds: tuple[float, float] | None = None) -> Tensor:
    """phi(|w|) / |u|, one where either norm is zero: a tensor of no dimensions, so that a device need not wait."""
    long, step = torch.linalg.vector_norm(w), torch.linalg.vector_norm(u)
    size = long if bounds is None else long.clamp(*bounds)
    moves = (long > 0) & (step > 0)
    return torch.where(moves, size / step, 1.0)


def lamb_groups(model: torch.nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """The parameters of a model in two groups, as the authors train BERT: matrices and more adapt and decay; vectors
    (biases, the scales of norms) do neither."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[tuple[Iterable[Tensor], dict[str, Any]]] = [
        ([p for p in trained if p.ndim > 1], {"weight_decay": weight_decay, "adapt": True}),
        ([p for p in trained if p.ndim <= 1], {"weight_decay": 0.0, "adapt": False}),
    ]
    return [{"params": params, **options} for params, options in groups if params]


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if isinstance(group[name], str) or not group[name] >= 0:
            raise ValueError(f"Lamb: {name}={group[name]!r} was given; want a number, zero or more")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"Lamb: betas={group['betas']} were given; want two numbers in [0, 1)")
    bounds = group["bounds"]
    if bounds is not None and not 0 < bounds[0] <= bounds[1]:
        raise ValueError(f"Lamb: bounds={bounds} were given; want 0 < low <= high, or None for the norm as it is")
    narrow = {p.dtype for p in group["params"]} - {torch.float32, torch.float64}
    if narrow:
        raise ValueError(
            f"Lamb: parameters of {', '.join(sorted(map(str, narrow)))} were given; want float32 or float64: keep the "
            "parameters in float32 and compute under torch.autocast"
        )
