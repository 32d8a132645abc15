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
from manyheads.hosts.calls import AttentionCall, Edit
from manyheads.hosts.sites import Site
from manyheads.inner import Inner
from manyheads.mechanism import Mechanism
from manyheads.softmax import SoftmaxAttention, changed_stages
from manyheads.state import State


def is_shell(module: Mechanism) -> bool:
    """Whether the module's pass is that of the shell, stage by stage."""
    return type(module).attend is getattr(SoftmaxAttention, "attend", None)


def offers(module: Mechanism) -> bool:
    """Whether the module tells what its passes do inside; of a forward of its own this is read off its code."""
    return is_shell(module) or "offered" in type(module).attend.__code__.co_names


def inner_call(site: Site, inner: Inner, state: State | None, broken: Tensor | None) -> AttentionCall:
    """broken: [b, n] tokens of this pass that held no numbers, and were not read as such."""
    module: Any = site.module
    if state is not None:
        inner = _kept(inner)
    if broken is not None:
        inner = _as_fed_broken(inner, broken)
    if state is not None and state.places is not None:
        return _in_order(site, inner, state, state.places)
    if is_shell(module) and not module.eager:
        return ShellCall(site, inner)
    return StagedCall(site, inner)


class ShellCall(AttentionCall):
    """A pass of the shell, and what it may attend to made for the rows that are asked for."""

    def __init__(self, site: Site, inner: Inner):
        module: Any = site.module
        super().__init__(site, inner.query, inner.key, inner.value, None, False, Scoring(float(module.scale)))
        self.where: Where = inner.where
        alone = self.where.padding is None and self.where.dense is None
        ruled = not {"select", "mask_mod"}.isdisjoint(changed_stages(type(module)))
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
        return _whole(module.select(self.query[:, :, own], self.key, self.where.rows(own)), stop - start, self.key)


class StagedCall(AttentionCall):
    """given: weights [b, h, n, m] as the mechanism mixed them, or None where its stages are to make them. seen: what
    may be attended to, where `where` no longer tells."""

    shares = False

    def __init__(self, site: Site, inner: Inner, seen: Tensor | None = None):
        super().__init__(site, inner.query, inner.key, inner.value, None, False, Scoring(1.0))
        self.where: Where | None = inner.where
        self.given, self._seen = inner.weights, seen
        self._gradient: Tensor | None = None
        module: Any = site.module
        self._mixes = is_shell(module) and "mix" in changed_stages(type(module))

    @property
    def _name(self) -> str:
        module: Any = self.site.module
        return f"{self.site.path or type(module).__name__} is {module.card.name!r}"

    @property
    def scoring(self) -> Scoring:
        raise ValueError(
            f"{self._name}, whose weights are no softmax of its queries with its keys alone: they can be read and "
            "edited, but not be made anew from other queries or keys"
        )

    @property
    def mask(self) -> Tensor | None:
        return self.allowed(slice(None))

    def allowed(self, rows: slice) -> Tensor | None:
        if self.where is None:
            return None if self._seen is None else self._seen[:, :, rows]
        module: Any = self.site.module
        shell = is_shell(module)
        seen = module.select(self.query, self.key, self.where) if shell else self.where.allowed()
        seen = _whole(seen, self.query.shape[2], self.key)
        return None if seen is None else seen[:, :, rows]

    def weights(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Tensor:
        if self.given is None:
            module: Any = self.site.module
            self.given = module.weigh(self.query, self.key, self.where)
        found = self.given if heads is None else self.given[:, self.check_heads(heads)]
        return found[:, :, rows].to(torch.promote_types(found.dtype, torch.float32))

    def blocks(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Iterator[slice]:
        start, stop, _ = rows.indices(self.query.shape[2])
        yield slice(start, stop)

    def mix(self, edit: Edit, heads: Sequence[int] | None = None) -> Tensor:
        if not self._mixes:
            return super().mix(edit, heads)
        chosen = self.check_heads(heads)
        every = slice(0, self.query.shape[2])
        whole = self.weights()
        edited = whole.index_copy(
            1, torch.tensor(chosen, device=whole.device), edit(self.weights(chosen), every).to(whole.dtype)
        )
        # A stage of its own may join heads, so that all of what it gives counts.
        return self._mixed(edited.to(self.value.dtype))

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
            raise ValueError(f"{self._name}, and tokens of its state were hidden anew: feed the text again to edit it")
        mixed: Tensor = module.mix(weights, self.value, self.where)
        return mixed

    def check_values(self) -> None:
        if self._mixes:
            raise ValueError(
                f"{self._name}, whose heads give more than their weights times their values (a `mix` of its own): what "
                "a token's values add is not known"
            )

    def narrowed(self, stop: int) -> AttentionCall:
        return self


def _whole(seen: Tensor | None, n: int, key: Tensor) -> Tensor | None:
    """A rule that broadcasts to [b, h, n, m], with all four axes."""
    if seen is None:
        return None
    seen = seen[(None,) * (4 - seen.ndim)]
    return seen.expand(*seen.shape[:2], n, key.shape[2])


def _kept(inner: Inner) -> Inner:
    """Copies of what a state holds: its buffers are written over by later passes."""
    where: Where = inner.where
    padding = None if where.padding is None else where.padding.clone()
    where = replace(where, padding=padding, key_positions=where.key_positions.clone())
    return inner._replace(key=inner.key.clone(), value=inner.value.clone(), where=where)


def _as_fed_broken(inner: Inner, broken: Tensor) -> Inner:
    """A pass blanks tokens that hold NaN or infinity, and tells of them at its end. Inside they are what they were:
    NaN, but for padding, which nothing reads."""
    where: Where = inner.where
    n, m = broken.shape[1], inner.key.shape[2]
    if where.padding is not None:
        broken = broken & where.padding[:, -n:]
    if not where.causal or m < n:
        return inner
    rows = {"query": inner.query.masked_fill(broken[:, None, :, None], torch.nan)}
    keys = torch.nn.functional.pad(broken, (m - n, 0))[:, None, :, None]
    rows |= {name: getattr(inner, name).masked_fill(keys, torch.nan) for name in ("key", "value")}
    reached = (broken.cumsum(1) > 0)[:, None, :, None]
    weights = None if inner.weights is None else inner.weights.masked_fill(reached, torch.nan)
    return inner._replace(**rows, weights=weights)


def _in_order(site: Site, inner: Inner, state: State, places: Tensor) -> StagedCall:
    """Keys of a state that was told of hidden tokens lie in another order than that of the text."""
    module: Any = site.module
    where, keys = inner.where, inner.key
    weights = inner.weights if inner.weights is not None else module.weigh(inner.query, keys, where)
    shell = is_shell(module)
    seen = _whole(module.select(inner.query, keys, where) if shell else where.allowed(), inner.query.shape[2], keys)
    if seen is not None:
        seen = state.as_fed(seen.expand(keys.shape[0], -1, -1, -1), places)
    key, value = (state.as_fed(rows.mT, places).mT for rows in (keys, inner.value))
    return StagedCall(site, Inner(inner.query, key, value, inner.output, state.as_fed(weights, places), None), seen)
