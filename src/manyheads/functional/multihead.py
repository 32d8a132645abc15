"""Multi-head attention as a layer of its own, for mechanisms that are made of several."""

from __future__ import annotations

from torch import Tensor, nn

from manyheads.functional.weighted import attend_weighted


class Heads(nn.Module):
    """Multi-head attention whose keys and values can be computed once and kept."""

    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))

    def split(self, projected: Tensor) -> Tensor:
        """[.., n, e] -> [.., h, n, d]"""
        return projected.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def join(self, mixed: Tensor) -> Tensor:
        """[.., h, n, d] -> [.., n, e], projected."""
        output: Tensor = self.o_proj(mixed.transpose(-2, -3).flatten(-2))
        return output

    def read(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.k_proj(source)), self.split(self.v_proj(source))

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x [b, n, e], k and v [b, h, m, d], allowed broadcasting to [b, h, n, m] -> [b, n, e] and the weights."""
        q = self.split(self.q_proj(x))
        mixed, weights = attend_weighted(q, k, v, allowed, scale=self.scale, need_weights=need_weights)
        return self.join(mixed), weights


def key_mask(padding: Tensor | None) -> Tensor | None:
    """Key padding [b, m] as it broadcasts to [b, h, n, m]."""
    return None if padding is None else padding[:, None, None, :]
