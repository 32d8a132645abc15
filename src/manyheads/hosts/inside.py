"""Calls inside of manyheads mechanisms: those that offer what their pass does (`Mechanism.listener`).

A `ShellCall` is softmax(scale q k^T) v under a mask, and reads like a call of any other model. A `StagedCall` has
weights that its mechanism makes in another way: they are read and edited whole, as the mechanism itself uses them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manyheads.functional.where import Where
from manyheads.hosts.attend import Scoring
from manyheads.hosts.calls import AttentionCall, Edit, opened
from manyheads.hosts.sites import Site
from manyheads.inner import Inner
from manyheads.mechanism import Mechanism
from manyheads.softmax import STAGES, SoftmaxAttention
from manyheads.state import State


def is_shell(module: Mechanism) -> bool:
    """Whether the module's passes are the shell's, with something before or after them at most."""
    own = type(module).attend
    return isinstance(module, SoftmaxAttention) and (own is SoftmaxAttention.attend or "super" in _names(own))


def _own_stages(module: Mechanism) -> set[str]:
    return {
        s for s in (*STAGES, "score_mod", "mask_mod") if getattr(type(module), s) is not getattr(SoftmaxAttention, s)
    }


def tells_weights(module: Mechanism) -> bool:
    """Whether the module has a forward of its own that offers what it does inside, for which it needs its weights."""
    return any("offered" in _names(member) for member in vars(type(module)).values())


def _names(member: Any) -> tuple[str, ...]:
    return getattr(getattr(member, "__code__", None), "co_names", ())


def is_open(site: Site) -> bool:
    """Whether calls of the site have queries, keys, values and head outputs."""
    return not isinstance(site.module, Mechanism) or is_shell(site.module) or tells_weights(site.module)


def softmax_call(call: Any, who: str) -> AttentionCall:
    """The call, if its weights are a softmax of scores, whatever its scores are; ValueError of `who` needs that."""
    found, module = opened(call, who), call.site.module
    if isinstance(module, Mechanism) and not (is_shell(module) and "normalise" not in _own_stages(module)):
        raise ValueError(f"{who}: {call.site.name} has weights that are no softmax of scores, to which one could add")
    return found


def adds_values(site: Site) -> bool:
    """Whether what a token adds at the site is known to be its values by weights, through one linear map."""
    module = site.module
    plain = isinstance(module, Mechanism) and is_shell(module) and _own_stages(module).isdisjoint(("mix", "output"))
    return plain or not isinstance(module, Mechanism)


def inner_call(site: Site, inner: Inner, state: State | None, broken: Tensor | None, cross: bool) -> AttentionCall:
    """broken: [b, n] tokens of this pass that held no numbers, of a mechanism that did not read them as such."""
    module: Any = site.module
    if state is not None:
        inner = _kept(inner)
    if broken is not None:
        inner = _as_fed_broken(inner, broken, cross)
    if state is not None and state.places is not None and not cross:
        return _in_order(site, inner, state, state.places)
    if is_shell(module) and _own_stages(module).isdisjoint(("score", "score_mod", "normalise", "mix")):
        return ShellCall(site, inner)
    return StagedCall(site, inner, _may_see(module, inner))


def _may_see(module: Any, inner: Inner) -> Tensor | None:
    """[b or 1, 1 or h, n, m], True = may attend; None: everything."""
    where, n, m = inner.where, inner.query.shape[2], inner.key.shape[2]
    if is_shell(module):
        seen = module.select(inner.query, inner.key, where)
    else:
        seen = where.allowed() if isinstance(where, Where) else where
    if seen is None:
        return None
    seen = seen[(None,) * (4 - seen.ndim)]
    return seen.expand(*seen.shape[:2], n, m)


class ShellCall(AttentionCall):
    """A pass of the shell, and what it may attend to made for the rows that are asked for."""

    def __init__(self, site: Site, inner: Inner):
        module: Any = site.module
        super().__init__(site, inner.query, inner.key, inner.value, None, False, Scoring(float(module.scale)))
        self.where: Where = inner.where
        alone = self.where.padding is None and self.where.dense is None
        ruled = not _own_stages(module).isdisjoint(("select", "mask_mod"))
        n, m = inner.query.shape[2], inner.key.shape[2]
        self._by_rule = ruled or not alone or (self.where.causal and n != m and n > 1)
        self.causal = self.where.causal and not self._by_rule and n == m and n > 1

    @property
    def mask(self) -> Tensor | None:
        return self.allowed(slice(None)) if self._by_rule else None

    def allowed(self, rows: slice) -> Tensor | None:
        if not self._by_rule:
            return super().allowed(rows)
        module: Any = self.site.module
        start, stop, _ = rows.indices(self.query.shape[2])
        own = slice(start, stop)
        part = Inner(self.query[:, :, own], self.key, self.value, self.value, None, self.where.rows(own))
        return _may_see(module, part)


class StagedCall(AttentionCall):
    """given: weights [b, h, n, m] as the mechanism mixed them, or None where its stages are to make them. seen: what
    may be attended to. where None: it is not known to the mechanism's own stages."""

    shares = False

    def __init__(self, site: Site, inner: Inner, seen: Tensor | None):
        super().__init__(site, inner.query, inner.key, inner.value, seen, False, Scoring(1.0))
        self.where, self.given = inner.where, inner.weights
        self._gradient: Tensor | None = None
        module: Any = site.module
        self._mixes = is_shell(module) and "mix" in _own_stages(module)

    @property
    def scoring(self) -> Scoring:
        raise ValueError(
            f"{self.site.name} has weights that are no softmax of its queries with its keys alone: they can be read "
            "and edited, but not be made anew from other queries or keys"
        )

    def weights(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Tensor:
        if self.given is None:
            module: Any = self.site.module
            self.given = module.weigh(self.query, self.key, self.where)
        found = self.given if heads is None else self.given[:, self.check_heads(heads)]
        return found[:, :, rows].to(torch.promote_types(found.dtype, torch.float32))

    def blocks(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Iterator[slice]:
        start, stop, _ = rows.indices(self.query.shape[2])
        yield slice(start, stop)

    def mix(self, edit: Edit, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Tensor:
        if not self._mixes:
            return super().mix(edit, heads, rows)
        chosen, whole = self.check_heads(heads), self.weights()
        start, stop, _ = rows.indices(self.query.shape[2])
        here = slice(start, stop)
        edited = self._told(edit(self.weights(chosen, here), here), chosen, here).to(whole.dtype)
        lines = whole[:, :, here].index_copy(1, torch.tensor(chosen, device=whole.device), edited)
        whole = torch.cat([whole[:, :, :start], lines, whole[:, :, stop:]], 2)
        # A stage of its own may join heads, so that all of what it gives counts.
        return self._mixed(whole.to(self.value.dtype))

    def mix_rows(self, edit: Edit, batch: Sequence[int]) -> Tensor:
        return self._mix_whole(edit, batch)

    def biased(self, bias: Tensor) -> Tensor | None:
        return None  # not by scores: the weights can be edited

    def weight_gradients(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Tensor:
        if not self._mixes:
            return super().weight_gradients(heads, rows)
        upstream = self.upstream()
        if self._gradient is None:
            with torch.enable_grad():
                weights = self.weights().detach().to(self.value.dtype).requires_grad_()
                self._gradient = torch.autograd.grad(self._mixed(weights), weights, upstream)[0]
        return self._gradient[:, self.check_heads(heads)][:, :, rows]

    def _mixed(self, weights: Tensor) -> Tensor:
        module: Any = self.site.module
        if self.where is None:
            raise ValueError(f"{self.site.name}: tokens of its state were hidden anew: feed the text again to edit it")
        mixed: Tensor = module.mix(weights, self.value, self.where)
        return mixed

    def check_values(self) -> None:
        if self._mixes:
            raise ValueError(
                f"{self.site.name} has heads that give more than their weights times their values (a `mix` of its "
                "own): what a token's values add is not known"
            )

    def narrowed(self, stop: int) -> AttentionCall:
        return self


def _kept(inner: Inner) -> Inner:
    """Copies of what a state holds: its buffers are written over by later passes."""
    where = inner.where
    if isinstance(where, Where):
        padding = None if where.padding is None else where.padding.clone()
        where = replace(where, padding=padding, key_positions=where.key_positions.clone())
    return inner._replace(key=inner.key.clone(), value=inner.value.clone(), where=where)


def _as_fed_broken(inner: Inner, broken: Tensor, cross: bool) -> Inner:
    """A pass blanks tokens that hold NaN or infinity and tells of them at its end. Inside, a query reads what it would
    have read: NaN, from the first of them on."""
    reached = (broken.cumsum(1) > 0)[:, None, :, None]
    weights = None if inner.weights is None else inner.weights.masked_fill(reached, torch.nan)
    inner = inner._replace(query=inner.query.masked_fill(reached, torch.nan), weights=weights)
    if cross:
        return inner
    rows = torch.nn.functional.pad(broken, (inner.key.shape[2] - broken.shape[1], 0))[:, None, :, None]
    key, value = (tokens.masked_fill(rows, torch.nan) for tokens in (inner.key, inner.value))
    return inner._replace(key=key, value=value)


def _in_order(site: Site, inner: Inner, state: State, places: Tensor) -> StagedCall:
    """Keys of a state that was told of hidden tokens lie in another order than that of the text."""
    module: Any = site.module
    weights = module.weigh(inner.query, inner.key, inner.where) if inner.weights is None else inner.weights
    seen = _may_see(module, inner)
    if seen is not None:
        seen = state.as_fed(seen.expand(len(inner.key), -1, -1, -1), places)
    key, value = (state.as_fed(rows.mT, places).mT for rows in (inner.key, inner.value))
    weights = state.as_fed(weights, places)
    return StagedCall(site, inner._replace(key=key, value=value, weights=weights, where=None), seen)
