"""Token-aware average pooling before attention, and the attention diversification loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.functional.deferred import recomputing
from manyheads.mechanism import Mechanism, Result
from manyheads.training.given import check_mechanism_given


class _Norm(nn.BatchNorm2d):
    """Batch norm whose averages a pass moves once, also where it is checkpointed and runs again in backward."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and recomputing():
            assert self.running_mean is not None
            assert self.running_var is not None
            thrown_away = self.running_mean.clone(), self.running_var.clone()
            return F.batch_norm(input, *thrown_away, self.weight, self.bias, training=True, eps=self.eps)
        return super().forward(input)


class TokenAwarePooling(nn.Module):
    """Attention over an image whose tokens are averages of their surroundings, each over a span of its own choice.

        x'_p = sum over s of softmax(conv(norm(conv(x))))_ps mean of x on the 3x3 grid of step s around p
        result = mechanism(norm(x'))

    s = 0 (the token itself) to `scales` - 1; cells beyond the border count as zeros. x: [b, height, width, dim] for a
    mechanism on grids, else [b, n, dim] read in rows of `width` (by default a square). Padded cells are zeros and
    stay out. threshold: where given, losses["attention_diversification"] is added in training.

    Source: Guo et al., Robustifying Token Attention for Vision Transformers, arXiv:2303.11126, and its released
    tap_robust_models.py (3x3 convolutions without bias and a batch norm between). There pooling comes before the norm
    of the block, which is given here as `norm`, and the residual carries the tokens that are neither pooled nor normed.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        *,
        scales: int = 4,
        temperature: float = 1.0,
        width: int | None = None,
        threshold: float | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_mechanism_given("TokenAwarePooling", mechanism)
        if mechanism.causal:
            raise ValueError(f"TokenAwarePooling: {mechanism.card.name} is causal, and pooling reads later tokens")
        if scales < 1 or temperature <= 0:
            raise ValueError(f"TokenAwarePooling: scales={scales} and temperature={temperature} must be positive")
        self.mechanism, self.scales, self.temperature = mechanism, scales, temperature
        self.width, self.threshold = width, threshold
        self.norm = nn.Identity() if norm is None else norm
        self.predictor = nn.Sequential(
            nn.Conv2d(mechanism.dim, scales, 3, padding=1, bias=False),
            _Norm(scales),
            nn.Conv2d(scales, scales, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor, *, mask: Tensor | None = None, need_weights: bool = False) -> Result:
        real = mask if mask is not None and mask.dtype == torch.bool and mask.shape == x.shape[:-1] else None
        grid = x if real is None else x.masked_fill(~real[..., None], 0.0)
        grid = grid if x.ndim == 4 else grid.unflatten(1, (-1, self._width(x.shape[1])))
        pooled = self.pool(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(x.shape)
        diversify = self.training and self.threshold is not None
        result: Result = self.mechanism(self.norm(pooled), mask=mask, need_weights=need_weights or diversify)
        if not diversify:
            return result
        if result.weights is None:
            raise ValueError(
                f"TokenAwarePooling: {self.mechanism.card.name} has no weights to diversify; leave threshold out"
            )
        queries = None if real is None else real.flatten(1)
        loss = attention_diversification(result.weights, threshold=self.threshold or 0.0, queries=queries)
        losses = {**result.losses, "attention_diversification": loss}
        return Result(result.output, result.weights if need_weights else None, losses)

    def pool(self, grid: Tensor) -> Tensor:
        """[b, dim, height, width] -> the same shape, pooled."""
        choice = (self.predictor(grid) / self.temperature).softmax(1)
        pooled = grid * choice[:, :1]
        ninth = grid.new_full((grid.shape[1], 1, 3, 3), 1 / 9)
        for s in range(1, self.scales):
            mean = F.conv2d(grid, ninth, padding=s, dilation=s, groups=grid.shape[1])
            pooled = pooled + mean * choice[:, s : s + 1]
        return pooled

    def _width(self, n: int) -> int:
        width = round(n**0.5) if self.width is None else self.width
        if width < 1 or n % width or (self.width is None and width * width != n):
            raise ValueError(
                f"TokenAwarePooling: {n} tokens do not fill rows of width {self.width or 'n^0.5'}; give width=, and no "
                "class token among the tokens"
            )
        return width


def attention_diversification(
    weights: Tensor | Sequence[Tensor], *, threshold: float = 2.0, queries: Tensor | None = None
) -> Tensor:
    """Mean over queries, and layers, of the cosine of a query's attention and the mean attention of all queries.

    weights: [b, heads, n, m], or one such per layer; heads are averaged first, and weights up to threshold / m are
    taken for zero, in both. queries: [b, n] bool, True = counts (padded queries do not), for self attention.

    Source: Guo et al., arXiv:2303.11126, and its released engine.py.
    """
    layers = [weights] if isinstance(weights, Tensor) else list(weights)
    if not layers:
        raise ValueError("attention_diversification: no weights given; want one tensor [b, heads, n, m] per layer")
    # In half precision tokens cannot be counted.
    wide = [layer.to(torch.promote_types(layer.dtype, torch.float32)) for layer in layers]
    return torch.stack([_one_layer(layer.mean(1), threshold, queries) for layer in wide]).mean()


def _one_layer(rows: Tensor, threshold: float, queries: Tensor | None) -> Tensor:
    real = rows.new_ones(rows.shape[:2]) if queries is None else queries.to(rows)
    count = real.sum(1).clamp_min(1)
    mean = (rows * real[..., None]).sum(1, keepdim=True) / count[:, None, None]
    keys = rows.shape[2] if queries is None else count[:, None, None]
    cut_rows, cut_mean = (t * (t > threshold / keys) for t in (rows, mean))
    cosine = F.cosine_similarity(cut_mean, cut_rows, dim=-1)
    return (cosine * real).sum() / real.sum().clamp_min(1)
