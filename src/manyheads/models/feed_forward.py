"""What stands behind each mixer: an MLP, several of which a router or the kind of a token chooses, adapters before it.

Shapes: b batch, n tokens, e hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.functional.layers import RMSNorm, rms_norm
from manyheads.functional.routing import balance_loss, top_k_mask
from manyheads.models.configuration import ManyheadsConfig

GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
}


def sublayer_norms(config: ManyheadsConfig) -> tuple[nn.Module, nn.Module]:
    """Of a sublayer, before and after it; one that is not there gives back what it gets."""
    here = {"before": (True, False), "after": (False, True), "around": (True, True)}[config.norm_placement]
    before, after = (model_norm(config) if wanted else nn.Identity() for wanted in here)
    return before, after


def model_norm(config: ManyheadsConfig) -> nn.RMSNorm:
    return rms_norm(config.hidden_size, config.rms_norm_eps, config.norm_offset)


def layer_scale(config: ManyheadsConfig) -> nn.Module:
    """Gains on what a sublayer adds, or nothing."""
    return nn.Identity() if config.layer_scale is None else Scale(config.hidden_size, config.layer_scale)


class Scale(nn.Module):
    """x times a gain for each feature, all of them `start` at first."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.start, self.weight = start, nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x.dtype)


def by_kind(modules: Iterable[nn.Module], x: Tensor, kinds: Tensor) -> Tensor:
    """x [b, n, e], of which each token goes through the module of its kind, kinds [b, n] -> [b, n, ..].

    A kind that no token has passes nothing through its module, whose gradient is zero and not missing.
    """
    each, of = list(modules), kinds.flatten()
    order = of.argsort(stable=True)
    sizes = torch.bincount(of, minlength=len(each)).tolist()
    parts = [module(rows) for module, rows in zip(each, x.flatten(0, 1)[order].split(sizes), strict=True)]
    return torch.cat(parts)[order.argsort()].unflatten(0, kinds.shape)


class Adapter(nn.Module):
    """W_u (silu(W_g x) * W_d x), nothing at first: W_u is 0."""

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__()
        self.gate_proj, self.down_proj = (
            nn.Linear(config.hidden_size, config.adapter_size, bias=False) for _ in range(2)
        )
        self.up_proj = ZeroLinear(config.adapter_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up_proj(F.silu(self.gate_proj(x)) * self.down_proj(x))
        return out


class ZeroLinear(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class MLP(nn.Module):
    """norm -> gated by SiLU or GELU, or two layers with GELU. normed: False where what is around it norms."""

    def __init__(self, config: ManyheadsConfig, *, normed: bool = True) -> None:
        super().__init__()
        self.gate = GATES.get(config.hidden_act)
        self.norm, self.norm_after = sublayer_norms(config) if normed else (nn.Identity(), nn.Identity())
        dim, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(dim, inner, bias=bias) if self.gate else None
        self.up_proj = nn.Linear(dim, inner, bias=bias)
        self.norm_inner = RMSNorm(inner, eps=config.rms_norm_eps) if config.mlp_norm else nn.Identity()
        self.down_proj = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor, kinds: Tensor | None = None) -> Tensor:
        return self.on_normed(self.norm(x))

    def on_normed(self, x: Tensor) -> Tensor:
        if self.gate is None or self.gate_proj is None:
            inner = F.gelu(self.up_proj(x))
        else:
            inner = self.gate(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.norm_after(self.down_proj(self.norm_inner(inner)))
        return out

    def losses(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        return []


class MLPByKind(nn.Module):
    """Each token through the MLP of its kind, with that one's norms (Mixture-of-Transformers, arXiv:2411.04996;
    ONE-PEACE, arXiv:2305.11172, whose kinds share the norm before it)."""

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__()
        each = AdaptedMLP if config.adapter_size else MLP
        self.kinds = nn.ModuleList(each(config) for _ in range(config.num_token_kinds))

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        return by_kind(self.kinds, x, kinds)

    def losses(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        return []


class AdaptedMLP(MLP):
    """mlp(h + A(h)) of h = norm(x), A an adapter, or that of the token's kind: PILL's mixture of modality adapters,
    arXiv:2311.02126, as in its released code."""

    def __init__(self, config: ManyheadsConfig, kinds: int = 1) -> None:
        super().__init__(config)
        self.adapters = nn.ModuleList(Adapter(config) for _ in range(kinds))

    def forward(self, x: Tensor, kinds: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        added = self.adapters[0](x) if kinds is None or len(self.adapters) == 1 else by_kind(self.adapters, x, kinds)
        return self.on_normed(x + added)


class ExpertMLP(nn.Module):
    """norm -> the best k of several MLPs, whose shares, a softmax over the chosen ones' scores, sum to one."""

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__()
        self.active = config.num_experts_per_tok
        self.norm, self.norm_after = sublayer_norms(config)
        self.router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config, normed=False) for _ in range(config.num_local_experts))

    def forward(self, x: Tensor, kinds: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        best, chosen = self._scores(x).flatten(0, -2).topk(self.active, -1)
        shares, rows = best.softmax(-1).to(x.dtype), x.flatten(0, -2)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, row, expert(rows[row]) * shares[row, place, None])
        return self.norm_after(out.view_as(x))

    def losses(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        """See `balance_loss`: k where all experts get as many of the real tokens. mask: [b, n], or a dense one, which
        does not say what is real."""
        probs = self._scores(self.norm(x)).softmax(-1)
        real = mask if mask is not None and mask.ndim == 2 else None
        return [balance_loss(probs, top_k_mask(probs, self.active), real)]

    def _scores(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def feed_forward(config: ManyheadsConfig) -> MLP | MLPByKind | ExpertMLP | None:
    """What the configuration asks for behind each mixer; None without an MLP."""
    if not config.intermediate_size:
        return None
    if config.num_local_experts > 1:
        return ExpertMLP(config)
    if "mlp" in config.by_kind:
        return MLPByKind(config)
    if config.adapter_size:
        return AdaptedMLP(config, config.num_token_kinds if "adapter" in config.by_kind else 1)
    return MLP(config)
