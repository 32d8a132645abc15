"""Mixture of h - 1 heads (mixture of attentive experts), with its block coordinate descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.functional.linear import widen
from manyheads.functional.rotary import Rotary
from manyheads.mechanism import Call
from manyheads.registry import register
from manyheads.softmax import SoftmaxAttention


@register
class MixtureOfAllButOne(SoftmaxAttention):
    """h experts, each of all heads but one, mixed by what the input is about.

        out = sum_e g_e f_e,  f_e = h / (h - 1) sum_{j != e} W_o^j head_j,  g = softmax(W_2 tanh(W_1 m + b_1))

    m: mean of the real tokens, and where causal of those up to the query, so that each token has its gates (our reading
    for decoders). Even gates give multi-head attention; the sum is that of heads weighed by h / (h - 1) (1 - g_j).
    phase, in training: "joint" and "gates" mix all experts, "experts" draws one for each mean by its gate, without
    gradient to the gate; BlockCoordinateDescent below sets it. In evaluation all are mixed.
    Weights are those of the heads, without gates. gate_dim: hidden features of the gate, dim by default.
    Source: Peng et al., arXiv:2005.06537; no code was found to compare with. Nothing in the gate depends on the batch.
    """

    card = Card(
        name="mae",
        title="A Mixture of h - 1 Heads is Better than h Heads",
        reference="arXiv:2005.06537",
        family=Family.MIXING,
        patterns={"noncausal-self", "causal-self", "causal-cross"},
        time="n^2",
        state="n",
        notes="All heads are computed. The gates of a causal pass follow the running mean of its queries.",
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        gate_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(dim, heads, causal=causal, bias=bias, rotary=rotary)
        if heads < 2:
            raise ValueError(f"mae: heads={heads}; want at least 2, each expert being all heads but one")
        if gate_dim is not None and gate_dim < 1:
            raise ValueError(f"mae: gate_dim={gate_dim} must be positive")
        self.phase = "joint"
        width = dim if gate_dim is None else gate_dim
        self.gate = nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, heads, bias=False))

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        gates = self.gates(x, call)
        if self.training and self.phase == "experts":
            # Adding Gumbel noise and taking the largest draws by the gates.
            noise = -torch.empty_like(gates).exponential_().log()
            drawn = (gates.detach().log() + noise).argmax(-1, keepdim=True)
            gates = torch.zeros_like(gates).scatter(-1, drawn, 1.0)
        shares = self.heads / (self.heads - 1) * (1 - gates)
        return super().output(mixed * shares.transpose(1, 2)[..., None].to(mixed.dtype), x, call)

    def gates(self, x: Tensor, call: Call) -> Tensor:
        """Responsibilities of the experts, [b, n, h], or [b, 1, h] where all tokens share them."""
        mean = self._running_mean(x, call) if self.causal else self._mean(x, call.padding)
        return widen(self.gate(mean.to(x.dtype))).softmax(-1)

    def _mean(self, x: Tensor, padding: Tensor | None) -> Tensor:
        if padding is None:
            return widen(x).mean(1, keepdim=True)
        total = widen(x.masked_fill(~padding[..., None], 0.0)).sum(1, keepdim=True)
        return total / padding.sum(1).clamp(min=1).to(total.dtype)[:, None, None]

    def _running_mean(self, x: Tensor, call: Call) -> Tensor:
        """Padding of a context is not that of the queries, all of which count then."""
        own = None if call.pattern.cross else call.padding
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if own is None else own
        total = widen(x.masked_fill(~real[..., None], 0.0)).cumsum(1)
        count = real.cumsum(1)
        if call.state is not None:
            held = call.state.fixed
            if "count" in held:
                total, count = total + held["total"], count + held["count"]
            held["total"], held["count"] = total[:, -1:].clone(), count[:, -1:].clone()
        return total / count.clamp(min=1).to(total.dtype)[..., None]


class BlockCoordinateDescent:
    """Trains gates and experts in turn, as Peng et al. do: an epoch for the gates alone, then `every - 1` epochs for
    all else with one expert drawn per input.

    Call `start_epoch(epoch)` before each epoch (it gives the phase, "gates" or "experts") and `finish()` at the end.
    Parameters that a phase leaves alone have requires_grad=False during it, and no stale gradient: any optimiser and
    any trainer will do. Those frozen beforehand stay frozen.
    """

    def __init__(self, model: nn.Module, *, every: int = 5) -> None:
        self.modules = [m for m in model.modules() if isinstance(m, MixtureOfAllButOne)]
        if not self.modules or every < 1:
            raise ValueError(
                f"block coordinate descent: every={every}, and {len(self.modules)} 'mae' modules in the model; want at "
                "least one of each"
            )
        self.every = every
        gates = {id(p) for m in self.modules for p in m.gate.parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        self.blocks = {
            "gates": [p for p in trained if id(p) in gates],
            "experts": [p for p in trained if id(p) not in gates],
        }

    def start_epoch(self, epoch: int) -> str:
        phase = "gates" if epoch % self.every == 0 else "experts"
        self._set(phase, {name: name == phase for name in self.blocks})
        return phase

    def finish(self) -> None:
        self._set("joint", dict.fromkeys(self.blocks, True))

    def _set(self, phase: str, trains: dict[str, bool]) -> None:
        for module in self.modules:
            module.phase = phase
        for name, parameters in self.blocks.items():
            for parameter in parameters:
                parameter.requires_grad_(trains[name])
                parameter.grad = parameter.grad if trains[name] else None
