"""MAPS: what a head's parameters map tokens to, without running the model on any text.

    M_h = E' W_V^h W_O^h W_U   [V, V];   E' = E in the first layer, the first layer's MLP(norm(E)) above it
    relation score of pairs (s, t)   the share of pairs with t among the k greatest of row s of M (of -M: suppression)
    saliency of a source token       |e' W_VO| / |e'|; its mappings are the k greatest of its row
Source: arXiv 2412.11965 (amitelhelo/MAPS). No norm is applied before W_V or W_U, and biases are left out, as there; a
head counts for a relation from a score of 15%. A query head of a group has its group's W_V. Divergences: theirs has
norms' gains folded into W_V by its loader, here W_V is the checkpoint's; in layers whose output is normalised last
(BERT) E' is the first layer's output with silent heads. Matrices are read by what they do, not by their names: W_V from
values of unit vectors, W_O from the map that reads the heads, so that fused and renamed projections work too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.feed import Feed
from manyheads.explain.attributions.writes import Write, writes
from manyheads.explain.detectors.subject import Subject
from manyheads.hosts.calls import opened
from manyheads.hosts.device import evaluating
from manyheads.hosts.loading import Loaded
from manyheads.hosts.taps import Site, record, tap

# Numbers in one block of projected tokens, and rows in one pass.
_BLOCK = 2**24
_ROWS = 256


class _Enough(Exception):
    """The layer that was asked for has run."""


@dataclass(frozen=True)
class Salient:
    """A source token, its saliency, and what the head maps it to, best first."""

    source: int
    saliency: float
    targets: list[int]
    source_text: str = ""
    target_texts: tuple[str, ...] = ()


@dataclass
class Maps:
    """value [layers][g, dim, e], output [layers][h, e, dim]; embedding and unembedding [V, dim]. first: rows of E to
    those of E'. loaded: for tokens' names, or None."""

    value: list[Tensor]
    output: list[Tensor]
    embedding: Tensor
    unembedding: Tensor
    first: Callable[[Tensor], Tensor]
    loaded: Loaded | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module | Loaded, stack: str | None = None, *, first_mlp: bool = True) -> Maps:
        """first_mlp: E' as above; False: E everywhere."""
        subject = Subject(model, stack)
        embedding = _embedding(subject)
        head = subject.model.get_output_embeddings()
        unembedding = embedding if head is None else head.weight.detach()
        with evaluating(subject.model):
            value, output, heads = _parameters(subject)
            if embedding.shape[1] != value[0].shape[1] or unembedding.shape[1] != output[0].shape[2]:
                raise ValueError(f"maps: {subject.name}'s embedding has another width than its layers")
        if not first_mlp:
            return cls(value, output, embedding, unembedding, lambda rows: rows, subject.loaded)
        block = subject.block(subject.sites[0])
        if block is None:
            raise ValueError(f"maps: {subject.name}'s first attention is not part of a layer: use first_mlp=False")
        bias = heads[0].bias
        return cls(value, output, embedding, unembedding, partial(_first_mlp, subject, block, bias), subject.loaded)

    def written(self, layer: int, head: int, sources: Tensor) -> Tensor:
        """e' W_VO of the source tokens, [sources, dim]."""
        if not 0 <= layer < len(self.output) or not 0 <= head < len(self.output[layer]):
            raise ValueError(
                f"there is no head {layer}.{head} among {len(self.output)} layers of {len(self.output[0])}"
            )
        return self._write(layer, head, self._sources(layer, sources))

    def _write(self, layer: int, head: int, rows: Tensor) -> Tensor:
        groups, heads = len(self.value[layer]), len(self.output[layer])
        return rows @ self.value[layer][head // (heads // groups)] @ self.output[layer][head]

    def rows(self, layer: int, head: int, sources: Sequence[int] | Tensor) -> Tensor:
        """Rows of M, [sources, V]."""
        return self.written(layer, head, self._tokens(sources)) @ self.unembedding.T

    def relation(self, pairs: Sequence[tuple[int | str, int | str]], *, k: int = 1, suppress: bool = False) -> Tensor:
        """Scores [layers, heads]. pairs: token ids, or texts, of which those of one token each count. k: 1 for copying
        and 10 otherwise in the paper (3 and 25 for large vocabularies). suppress: of -M."""
        sources, targets = self._pairs(pairs)
        if not 1 <= k <= len(self.unembedding):
            raise ValueError(f"k={k}: a row has 1 to {len(self.unembedding)} greatest tokens")
        sign = -1.0 if suppress else 1.0
        found = torch.full((len(self.output), max(map(len, self.output))), torch.nan)
        below, above = self._sources(0, sources), self._sources(1, sources)
        for layer, heads in enumerate(self.output):
            for head in range(len(heads)):
                best = [
                    (sign * (self._write(layer, head, rows) @ self.unembedding.T)).topk(k, -1).indices
                    for rows in (above if layer else below).split(self._rows)
                ]
                found[layer, head] = (torch.cat(best) == targets[:, None]).any(-1).double().mean()
        return found

    def copying(self, k: int = 1, tokens: int = 256) -> Tensor:
        """The relation of every token (so many, evenly spread) with itself, [layers, heads]."""
        size = len(self.embedding)
        chosen = torch.linspace(0, size - 1, min(tokens, size), dtype=torch.float64).long().tolist()
        return self.relation([(token, token) for token in chosen], k=k)

    def saliency(self, layer: int, head: int) -> Tensor:
        """|e' W_VO| / |e'| of every token, [V]."""
        every = torch.arange(len(self.embedding), device=self.embedding.device)
        parts = []
        for chosen in every.split(self._rows):
            rows = self._sources(layer, chosen)
            parts.append(self._write(layer, head, rows).norm(dim=-1) / rows.norm(dim=-1))
        return torch.cat(parts).nan_to_num(0.0)

    def salient(self, layer: int, head: int, sources: int = 10, targets: int = 5) -> list[Salient]:
        """The most salient source tokens and what the head maps them to."""
        size = self.saliency(layer, head)
        chosen = size.topk(min(sources, len(size))).indices
        best = self.rows(layer, head, chosen).topk(min(targets, len(self.unembedding)), -1).indices
        found = []
        for token, own in zip(chosen.tolist(), best.tolist(), strict=True):
            texts = self.loaded.tokens([token, *own]) if self.loaded is not None else [""] * (1 + len(own))
            found.append(Salient(token, float(size[token]), own, texts[0], tuple(texts[1:])))
        return found

    @property
    def _rows(self) -> int:
        return max(_ROWS, _BLOCK // len(self.unembedding))

    def _sources(self, layer: int, tokens: Tensor) -> Tensor:
        rows = self.embedding[tokens]
        return rows if layer == 0 else self.first(rows)

    def _tokens(self, tokens: Sequence[int] | Tensor) -> Tensor:
        found = torch.as_tensor(tokens, device=self.embedding.device).reshape(-1)
        if (
            found.is_floating_point()
            or not found.numel()
            or not 0 <= int(found.min()) <= int(found.max()) < len(self.embedding)
        ):
            raise ValueError(f"{tokens} are no token ids of a vocabulary of {len(self.embedding)}")
        return found

    def _pairs(self, pairs: Sequence[tuple[int | str, int | str]]) -> tuple[Tensor, Tensor]:
        found = []
        for pair in pairs:
            ids = [self._one(each) for each in pair]
            if len(ids) == 2 and ids[0] is not None and ids[1] is not None:
                found.append(ids)
        if not found:
            raise ValueError(
                "none of the pairs has one token on each side: give pairs (source, target) of single tokens"
            )
        sources, targets = zip(*found, strict=True)
        return self._tokens(torch.tensor(sources)), self._tokens(torch.tensor(targets))

    def _one(self, token: int | str) -> int | None:
        """The id of a text of one token; None if it has more."""
        if isinstance(token, int):
            return token
        if self.loaded is None:
            raise ValueError(f"{token!r} is text, and this model comes without a tokenizer: give token ids")
        ids = self.loaded.encode(token)
        return ids[0] if len(ids) == 1 else None


def _embedding(subject: Subject) -> Tensor:
    own = None
    if hasattr(subject.model, "get_input_embeddings") and not subject.pictures:
        with suppress(NotImplementedError):  # models of text and images at once
            own = subject.model.get_input_embeddings()
    if own is None or getattr(own, "weight", None) is None or own.weight.dim() != 2:
        raise ValueError(f"maps: {subject.name} has no embedding of tokens that its heads could map")
    found: Tensor = own.weight.detach()
    return found


def _parameters(subject: Subject) -> tuple[list[Tensor], list[Tensor], list[Write]]:
    """W_V [g, dim, e] and W_O [h, e, dim] of every layer, from values of the unit vectors less that of zero."""
    dim = _width(subject)
    parts: dict[int, list[Tensor]] = {site.layer: [] for site in subject.sites}
    found: dict[int, Write] = {}
    units = torch.eye(dim, device=subject.device, dtype=subject.model.get_input_embeddings().weight.dtype)
    probe = torch.randn(dim, generator=torch.Generator().manual_seed(0)).to(units)
    for some in units.split(_room(subject) - 2):
        tokens = torch.cat([torch.zeros_like(units[:1]), probe[None], some])
        with _hidden(subject, tokens), record(subject.model, stack=subject.stack, kind="self") as calls:
            if found:
                _run(subject, len(tokens))
            else:
                with writes(subject.model, calls, found):
                    _run(subject, len(tokens))
        last = [call.site.path for call in calls]
        for call in calls:
            opened(call, "maps").check_values()
            parts[call.layer].append(call.value[0] - call.value[0][:, :1])
    missing = [path for index, path in enumerate(last) if index not in found]
    if missing:
        raise ValueError(f"maps: no linear map reads the heads of {', '.join(missing)}")
    values = []
    for layer in sorted(parts):
        weight = torch.cat([part[:, 2:] for part in parts[layer]], 1)
        given = parts[layer][0][:, 1]
        _check_linear(given, probe @ weight, subject)
        values.append(weight)
    heads = [found[index] for index in range(len(values))]
    return values, [write.weight for write in heads], heads


def _check_linear(given: Tensor, expected: Tensor, subject: Subject) -> None:
    far = (given - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny)
    if float(far) > 0.02:
        raise ValueError(
            f"maps: values of {subject.name} are no linear map of what its layers read (a norm in between)"
        )


@torch.no_grad()
def _first_mlp(subject: Subject, block: nn.Module, bias: Tensor | None, rows: Tensor) -> Tensor:
    """The first layer's MLP of its norm of every row: what the layer adds while its heads are silent."""
    parts = []
    with evaluating(subject.model):
        for part in rows.split(_room(subject) - 1):
            # A far greater row tells whether the layer keeps what it reads, or normalises it away.
            far = part[part.norm(dim=-1).argmax()]
            far = far / far.norm().clamp_min(torch.finfo(far.dtype).tiny) * 1e4
            given = _through(subject, block, torch.cat([part, far[None]]))
            keeps = float(given[-1].norm()) > 1e3
            parts.append(given[:-1] - part - (0 if bias is None else bias) if keeps else given[:-1])
    return torch.cat(parts)


def _room(subject: Subject) -> int:
    """Rows that one pass takes."""
    longest = getattr(subject.config, "max_position_embeddings", None)
    return min(_ROWS, longest) if isinstance(longest, int) and longest > 4 else _ROWS


def _through(subject: Subject, block: nn.Module, rows: Tensor) -> Tensor:
    """What the first layer gives for these rows of its residual, with silent heads."""
    kept: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return _replaced(rows, args, kwargs)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).reshape(len(rows), -1))
        raise _Enough

    with ExitStack() as stack, suppress(_Enough):
        stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(leave).remove)
        where: dict[str, Any] = {"layers": [0], "stack": subject.stack, "kind": "self"}
        stack.enter_context(tap(subject.model, lambda call: torch.zeros_like(call.output), **where))
        _run(subject, len(rows))
    return kept[0]


def _replaced(rows: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (rows[None].to(args[0].dtype), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": rows[None].to(kwargs["hidden_states"].dtype)}


@contextmanager
def _hidden(subject: Subject, rows: Tensor) -> Iterator[None]:
    """Every attention of the stack reads these rows [n, dim] instead of its own."""

    def enter(site: Site) -> Callable[..., Any]:
        return lambda module, args, kwargs: _replaced(rows, args, kwargs)

    with ExitStack() as stack:
        for site in subject.sites:
            stack.callback(site.module.register_forward_pre_hook(enter(site), with_kwargs=True).remove)
        yield


def _width(subject: Subject) -> int:
    return int(subject.model.get_input_embeddings().weight.shape[1])


def _run(subject: Subject, n: int) -> None:
    """A pass over so many tokens, whatever they are."""
    padding = getattr(subject.config, "pad_token_id", None)
    ids = torch.full((1, n), 1 if padding == 0 else 0, device=subject.device)
    named: Mapping[str, Tensor] = {"input_ids": ids}
    if Feed(subject.model, {}).takes("decoder_input_ids"):
        named = {**named, "decoder_input_ids": ids}
    subject.feed(named)
