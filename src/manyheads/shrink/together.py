"""Dropping once a whole context is there, with all layers and heads in view: for KVzip and its fast form.

Legend: b batch, H KV heads, m tokens of the context.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manyheads.cache_names import given_cache
from manyheads.hosts.attend import Scoring
from manyheads.hosts.visibility import Visibility
from manyheads.shrink.compress import Pass, _views
from manyheads.shrink.lasting import lasting
from manyheads.shrink.policy import Policy
from manyheads.shrink.textorder import whole_number

# What a policy notes in `cache.shared` while a context comes, and what of it came.
NOTED, FED = "noted", "fed"


@dataclass(kw_only=True)
class Together(Policy):
    """Base of policies that score all tokens of a context in all layers, `score_all`, when the last of them has come:
    with the first pass of several tokens, or with the chunk that ends what `cache.expect` or generate's
    prefill_chunk_size announced. The best of all layers and heads stay (per_layer: of each layer), the first sink_size
    always; decoded tokens all do."""

    sink_size: int = 4
    per_layer: bool = False
    when: str = "prefill"

    # What the policy does to a context, and what it cannot do where a first pass holds guesses.
    does: ClassVar[str]
    why: ClassVar[str]

    def __post_init__(self) -> None:
        name = type(self).__name__
        whole_number(name, "sink_size", self.sink_size, 0)
        if self.when != "prefill":
            raise ValueError(f"{name} {self.does}: when={self.when!r} is not possible; use H2O or TOVA")
        if self.allocation is not None:
            raise ValueError(f"{name}: scores of all layers and heads compete, which is its allocation; leave it out")
        super().__post_init__()

    def score_all(self, module: Any, cache: Any, fed: Fed, alive: Tensor) -> list[Tensor]:
        """[b, H, m] for every layer, of tokens alive [b, m]."""
        raise NotImplementedError

    @property
    def smallest(self) -> int:
        return self.sink_size + 1

    def acts(self, *, decoding: bool, context: bool = False) -> bool:
        """Entries leave once the whole context is there, never by a pass' own scores."""
        return False

    def prepare(self, model: Any, cache: Any) -> None:
        if self.is_full:
            return
        if any(layer.window is not None for layer in cache.layers):
            raise ValueError(
                f"{type(model).__name__} has layers with a sliding window, which do not see all of their context; "
                f"{type(self).__name__} needs full attention in all layers"
            )
        own = weakref.ref(cache)
        cache.shared.setdefault(FED, Fed())

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], *output: Any) -> None:
            if not output:
                # Of another cache, in another thread that is just registering or removing it: no kwargs are told then.
                return
            held = given_cache(kwargs)
            if held is not own():
                return
            if held is None or held.shared.get("repeating"):
                return
            fed = held.shared[FED]
            if fed.take(kwargs, held):
                self._compress(module, held, fed, real_tokens(type(self).__name__, kwargs, held.get_seq_length()))
                fed.parts.clear()

        hook = model.base_model.register_forward_hook(after, with_kwargs=True)
        weakref.finalize(cache, hook.remove)

    @lasting
    @torch.no_grad()
    def _compress(self, module: Any, cache: Any, fed: Fed, alive: Tensor) -> None:
        if bool((budget(self, cache.layers[0], alive) >= alive.sum(1)).all()):
            cache.shared.pop(NOTED, None)
            return
        if cache.layers[0].record_past:
            raise ValueError(
                f"{type(self).__name__} {self.why}, which it cannot where the first pass holds guesses: generate "
                "without assistant_model and prompt_lookup_num_tokens, or fill the cache by a call of the model first"
            )
        drop_together(self, cache, self.score_all(module, cache, fed, alive), alive)


class Fed:
    """The tokens of a context, ids [b, n] or embeddings [b, n, e], as they came."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def take(self, kwargs: dict[str, Any], cache: Any) -> bool:
        """After a call: whether the context is whole now."""
        given = kwargs.get("input_ids")
        part = kwargs["inputs_embeds"] if given is None else given
        seen, count = cache.get_seq_length(), part.shape[1]
        before = seen - count
        if not before:
            self.parts.clear()
        if before >= cache.context:
            return False
        self.parts.append(part)
        return bool(seen >= cache.context and seen > 1)

    def embedded(self, module: Any) -> Tensor:
        """[b, m, e]."""
        embed = module.get_input_embeddings()
        return torch.cat([part if part.is_floating_point() else embed(part) for part in self.parts], 1)


def real_tokens(name: str, kwargs: dict[str, Any], count: int) -> Tensor:
    """[b, m] of what was fed, from the arguments of the latest call."""
    padding, given = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if not isinstance(padding, Tensor):
        fed = kwargs["inputs_embeds"] if given is None else given
        return torch.ones((fed.shape[0], count), dtype=torch.bool, device=fed.device)
    if padding.dim() != 2 or padding.shape[1] != count:
        raise ValueError(
            f"{name} compares whole rows of text; give a 2-D attention_mask [batch, tokens], here of {count} tokens; "
            f"got {tuple(padding.shape)}"
        )
    return padding.bool()


def budget(policy: Any, layer: Any, alive: Tensor) -> Tensor:
    """[b]: entries per head, on average."""
    count = alive.sum(1)
    if policy.compression_ratio is not None:
        found = (count.double() * (1 - policy.compression_ratio) + 1e-9).floor().long()
    else:
        found = torch.full_like(count, int(policy.fixed_target(layer)))
    return found.clamp_min(policy.smallest)


def drop_together(policy: Any, cache: Any, scores: list[Tensor], alive: Tensor) -> None:
    """The best scores [b, H, m] of all layers stay, or of each where the policy says per_layer; its sinks always."""
    first = alive & (alive.long().cumsum(1) <= policy.sink_size)
    if (kept := cache.layers[0].protected) is not None:
        first = first | (kept & alive)
        least = int(budget(policy, cache.layers[0], alive).min())
        if int(first.sum(1).max()) > least:
            raise ValueError(
                f"{type(policy).__name__}: protect and sink_size name {int(first.sum(1).max())} tokens that are never "
                f"dropped, and the budget is {least} for each head: give a larger one"
            )
    ranked = [own.masked_fill(first[:, None], torch.inf).masked_fill(~alive[:, None], -torch.inf) for own in scores]
    counts = [budget(policy, layer, alive) * own.shape[1] for layer, own in zip(cache.layers, ranked, strict=True)]
    if policy.per_layer:
        keeps = [_best(own.flatten(1), each).view_as(own) for own, each in zip(ranked, counts, strict=True)]
    else:
        together = _best(torch.cat([own.flatten(1) for own in ranked], 1), torch.stack(counts).sum(0))
        parts = together.split([own.shape[1] * own.shape[2] for own in ranked], 1)
        keeps = [part.view_as(own) for part, own in zip(parts, ranked, strict=True)]
    for layer, keep in zip(cache.layers, keeps, strict=True):
        keep = keep & alive[:, None]
        if not bool(keep.all()):
            layer.store.evict([keep], layer.spare, layer.slack)
            for view in _views(layer, [_without_queries(layer, alive)]):
                layer.placed(policy, view)


def _without_queries(layer: Any, alive: Tensor) -> Pass:
    """As of a pass that nothing is asked of any more."""
    keys = layer.store.groups[0].view("keys")
    queries = keys.new_empty((keys.shape[0], len(layer.store.lengths()), 1, 0, keys.shape[3]))
    return Pass(queries, Scoring(1.0), Visibility(None, None if bool(alive.all()) else alive, layer.seen))


def _best(scores: Tensor, count: Tensor) -> Tensor:
    """[b, x] True at the count [b] highest scores of each row."""
    ranks = scores.argsort(-1, descending=True).argsort(-1)
    return ranks < count[:, None]
