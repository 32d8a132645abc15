"""Q-Filters: one direction per head tells which keys its queries will meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.shrink.compress import View
from manyheads.shrink.policy import Policy
from manyheads.shrink.textorder import wide

# The name of the table in released files.
_TABLE = "q_filters"


@dataclass(kw_only=True)
class QFilters(Policy):
    """Claim: a head's queries lie along one direction, and how far a key lies along it tells, with no query, how much
    attention it will get.

    score(t) = -<k_t, f>, [b, g, m], f the head's filter: filters is a table [layers, KV heads, d], a list of such, or a
    path of a .safetensors file (or the folder of one) that holds it as "q_filters", as released ones do.
    `fit_q_filters(model, ids)` makes one. Source: arXiv 2503.02812, NVIDIA/kvpress `qfilter_press.py`, whose sign this
    is: the paper's filter, along which queries lie, is -f.
    """

    filters: Tensor | Sequence[Any] | str | Path = ()

    def __post_init__(self) -> None:
        if isinstance(self.filters, Sequence) and not self.filters:
            raise ValueError("QFilters needs filters: what fit_q_filters(model, ids) gives, or a path of them")
        self.table = _read(self.filters)
        if self.table.dim() != 3 or not bool(self.table.isfinite().all()):
            raise ValueError(
                "QFilters: filters must be a table [layers, KV heads, d] of finite numbers; got "
                f"{tuple(self.table.shape)}"
            )
        super().__post_init__()

    def prepare(self, model: Any, cache: Any) -> None:
        if self.table.shape[0] != cache.depth:
            raise ValueError(
                f"QFilters: filters are of {self.table.shape[0]} layers and {type(model).__name__} has {cache.depth}; "
                "fit_q_filters(model, ids) makes this model's"
            )

    def score(self, view: View) -> Tensor:
        keys, heads = wide(view.keys), view.passes[-1].queries.shape[1]
        if self.table.shape[1:] != (heads, keys.shape[-1]):
            raise ValueError(
                f"QFilters: filters are for {self.table.shape[1]} KV heads of {self.table.shape[2]} features, and "
                f"layer {view.layer} has {heads} of {keys.shape[-1]}; fit_q_filters(model, ids) makes this model's"
            )
        own = self.table[view.layer].to(keys).index_select(0, view.group.index)
        return -(keys @ own[:, :, None])[..., 0]


@torch.no_grad()
def fit_q_filters(model: Any, ids: Tensor | Sequence[Tensor]) -> Tensor:
    """Filters [layers, KV heads, d] from the queries of texts, ids [rows, n] without padding, or several such.

    Each query head's first right singular vector, so turned that its queries' mean lies along it; the mean over a KV
    head's query heads, and its opposite. The paper takes 3,000 queries of a few thousand tokens' texts.
    """
    from manyheads.hosts.device import evaluating
    from manyheads.hosts.sites import only_stack
    from manyheads.hosts.taps import tap

    texts = [ids] if isinstance(ids, Tensor) else list(ids)
    if not texts or any(own.dim() != 2 or not own.numel() for own in texts):
        raise ValueError(f"fit_q_filters: ids must be [rows, n]; got {[tuple(own.shape) for own in texts]}")
    products: dict[int, Tensor] = {}
    sums: dict[int, Tensor] = {}
    heads: dict[int, int] = {}

    def read(call: Any) -> None:
        # d x d per head, whatever the texts' length: the singular vectors are the eigenvectors of the product.
        queries = call.query.double()
        products[call.layer] = products.get(call.layer, 0) + torch.einsum("bhnd,bhne->hde", queries, queries)
        sums[call.layer] = sums.get(call.layer, 0) + queries.sum((0, 2))
        heads[call.layer] = call.key.shape[1]

    with evaluating(model), tap(model, read, stack=only_stack(model), kind="self"):
        for own in texts:
            model(own, use_cache=False)
    found = []
    for layer in sorted(products):
        along = torch.linalg.eigh(products[layer]).eigenvectors[..., -1]
        side = (along * sums[layer]).sum(-1, keepdim=True)
        along = torch.where(side < 0, -along, along)
        found.append(-along.unflatten(0, (heads[layer], -1)).mean(1))
    return torch.stack(found).float()


def _read(given: Any) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach()
    if not isinstance(given, (str, Path)):
        return torch.as_tensor(given, dtype=torch.float32)
    path = Path(given)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"QFilters: filters={str(given)!r} is no file and no folder with a model.safetensors; save a table by "
            'safetensors.torch.save_file({"q_filters": fit_q_filters(model, ids)}, path)'
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"QFilters: filters={str(given)!r} is no .safetensors file: {error}") from error
    if _TABLE not in held:
        raise ValueError(f"QFilters: {path} holds {', '.join(sorted(held)) or 'nothing'}; want {_TABLE}")
    return held[_TABLE]
