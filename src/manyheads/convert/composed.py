"""CALM: two frozen language models, the one reading the other: Bansal et al., arXiv:2401.02412.

Between chosen layers stands a cross attention (the mechanism `calm`), and only it is trained:

    h_B <- h_B + f(h_B, h_A),  f = W_o concat_h softmax(W_q h_B (W_k p)^T / sqrt(d)) W_v p,  p = W_p h_A

h_A: what a layer of the augmenting model gives, h_B: what a layer of the anchor gives, before its next layer. Both read
the same ids, and a token of the anchor attends to those of the other model that are not behind it. W_o starts at zero,
so that a new composition is its anchor (the paper does not say how it starts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.cache_names import given_cache, with_cache
from manyheads.card import Pattern
from manyheads.convert.adapter import frozen, read_adapter, write_adapter
from manyheads.functional.where import Where
from manyheads.mechanism import Call
from manyheads.mechanisms.cross.calm import Calm

KIND = "calm"
Pair = tuple[int, int]


def compose(
    anchor: Any,
    augmenting: Any,
    pairs: Sequence[Pair],
    *,
    tokenizers: tuple[Any, Any] | None,
    heads: int | None = None,
) -> Composed:
    """The anchor with cross attention to the augmenting model, both transformers causal language models, frozen here.

    pairs: (layer of the augmenting model, layer of the anchor), counted from 0. tokenizers: of the anchor and of the
    augmenting model, which must read a text as the same ids; None says that they do. heads: of the cross attention;
    the anchor's by default.
    """
    _check_ids(anchor, augmenting, tokenizers)
    return Composed(anchor, augmenting, pairs, heads=heads)


def load_composed(
    path: str | Path, anchor: Any, augmenting: Any, *, tokenizers: tuple[Any, Any] | None = None
) -> Composed:
    """What `Composed.save` wrote, between the two models that it was trained with; others are refused."""
    weights, facts = read_adapter(path, KIND, {"anchor": anchor, "augmenting": augmenting})
    pairs = [(int(a), int(b)) for a, b in facts["pairs"]]
    made = compose(anchor, augmenting, pairs, tokenizers=tokenizers, heads=facts["heads"])
    made.bridges.load_state_dict(weights)
    return made


@dataclass
class _Run:
    """One pass: the augmenting model's states by layer, what is real [b, seen + n], and the bridges' part of the
    cache."""

    states: dict[int, Tensor] = field(default_factory=dict)
    real: Tensor | None = None
    cache: Sequence[Any] | None = None


class Composed(nn.Module):
    """See `compose`. forward and generate take what the anchor's take, of text: ids, a mask [b, n], a cache.

    The cache holds the anchor's layers, the augmenting model's and the cross attentions' keys and values; a cache of
    the anchor alone is refused once it holds something.
    """

    anchor: Any
    augmenting: Any

    def __init__(self, anchor: Any, augmenting: Any, pairs: Sequence[Pair], *, heads: int | None = None) -> None:
        super().__init__()
        for part, model in (("anchor", anchor), ("augmenting", augmenting)):
            _check_decoder(part, model)
        if anchor.get_decoder() is augmenting.get_decoder():
            raise ValueError("the anchor and the augmenting model are one: load it twice to let it read itself")
        self.pairs = _checked_pairs(pairs, augmenting, anchor)
        self.anchor, self.augmenting = frozen(anchor), frozen(augmenting)
        wide, source = anchor.config.hidden_size, augmenting.config.hidden_size
        self.heads = anchor.config.num_attention_heads if heads is None else heads
        self.bridges = nn.ModuleList(Calm(wide, self.heads, causal=True, source_dim=source) for _ in self.pairs)
        self.bridges.to(anchor.device, anchor.dtype)
        for bridge in self.bridges:
            nn.init.zeros_(bridge.o_proj.weight)  # type: ignore[union-attr, arg-type]
        self._run: _Run | None = None

    @property
    def config(self) -> Any:
        return self.anchor.config

    @property
    def device(self) -> torch.device:
        return torch.device(self.anchor.device)

    def train(self, mode: bool = True) -> Composed:
        """The augmenting model, of which nothing is trained, stays in eval."""
        super().train(mode)
        self.augmenting.eval()
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The anchor's own output."""
        with self._joined():
            return self.anchor(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **options)

    def generate(self, *args: Any, **options: Any) -> Any:
        """As the anchor generates: sampling, beams, a configuration of its own."""
        with self._joined():
            return self.anchor.generate(*args, **options)

    def save(self, path: str | Path) -> Path:
        """The cross attentions alone, and which models they stand between, in one safetensors file."""
        facts = {"pairs": self.pairs, "heads": self.heads}
        return write_adapter(
            path, KIND, self.bridges.state_dict(), facts, {"anchor": self.anchor, "augmenting": self.augmenting}
        )

    # -- one pass ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _joined(self) -> Iterator[None]:
        """Calls of the anchor go through the bridges. Its layers are wrapped from outside: what the anchor computes
        anew for gradient checkpointing in backward has no part of the bridges in it."""
        layers = self.anchor.get_decoder().layers
        plain = dict(layers._modules)
        hook = self.anchor.register_forward_pre_hook(self._read, with_kwargs=True)
        try:
            for number, (_, layer) in enumerate(self.pairs):
                layers._modules[str(layer)] = _Bridged(layers[layer], self, number)
            yield
        finally:
            hook.remove()
            layers._modules.update(plain)
            self._run = None

    def _read(self, module: Any, args: Any, options: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Before the anchor reads its ids, the augmenting model does."""
        options = _checked_call(args, options)
        cache, options["use_cache"] = self._cache(options)
        options = with_cache(options, cache)
        ids, mask = options["input_ids"], options.get("attention_mask")
        seen, tower = 0 if cache is None else cache.get_seq_length(), self.augmenting.get_decoder()
        real = None if mask is None else mask[:, : seen + ids.shape[1]].bool()
        run = _Run({}, real, None if cache is None else cache.layers[self._own_layers :])
        with torch.no_grad(), _listening(tower, {layer for layer, _ in self.pairs}, run.states):
            where = self.augmenting.device
            given = {"attention_mask": mask, "position_ids": options.get("position_ids")}
            given = {key: value.to(where) for key, value in given.items() if value is not None}
            tower(input_ids=ids.to(where), use_cache=cache is not None, **with_cache(given, self._view(cache)))
        self._run = run
        return (), options

    def _add(self, number: int, hidden: Tensor) -> Tensor:
        """hidden [b, n, e] with what its bridge adds."""
        assert self._run is not None
        bridge: Any = self.bridges[number]
        weight = bridge.q_proj.weight
        x, states = (t.to(weight) for t in (hidden, self._run.states[self.pairs[number][0]]))
        q, k, v = bridge.project(x, states)
        if self._run.cache is not None:
            k, v = self._run.cache[number].update(k, v)
        j = torch.arange(k.shape[2], device=x.device)
        i, real = j[-x.shape[1] :], self._run.real
        where = Where(i, j, i[None], j[None], None if real is None else real.to(x.device), None, causal=True)
        mixed = bridge.fused(q, k, v, where)
        return hidden + bridge.output(mixed, x, Call(Pattern.CAUSAL_CROSS))[0].to(hidden)

    # -- the cache ---------------------------------------------------------------------------------------------------

    @property
    def _own_layers(self) -> int:
        """Layers of a cache that are the two models'."""
        return int(self.anchor.config.num_hidden_layers + self.augmenting.config.num_hidden_layers)

    def _cache(self, options: Mapping[str, Any]) -> tuple[Any, bool]:
        from transformers import DynamicCache

        past, wanted = given_cache(options), options.get("use_cache")
        if wanted is None:
            wanted = past is not None or self.anchor.config.use_cache
        layers = self.anchor.get_decoder().layers
        anew = self.anchor.training and any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
        if anew or not (wanted or past is not None):
            return None, False
        past = DynamicCache(config=self.anchor.config) if past is None else past
        if type(past) is not DynamicCache or past.offloading:
            raise ValueError(f"two models composed keep their tokens in a DynamicCache, not in a {type(past).__name__}")
        whole, depth = self._own_layers + len(self.pairs), self.anchor.config.num_hidden_layers
        if len(past.layers) != whole:
            if past.get_seq_length():
                raise ValueError(
                    f"a cache of {len(past.layers)} layers, filled by another model, was given; this composition's has "
                    f"{whole}: begin with an empty one"
                )
            fresh = [*DynamicCache(config=self.anchor.config).layers, *self._fresh_layers()]
            past.layers.extend(fresh[min(len(past.layers), depth) :])
        return past, True

    def _fresh_layers(self) -> list[Any]:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        return [*DynamicCache(config=self.augmenting.config).layers, *(DynamicLayer() for _ in self.pairs)]

    def _view(self, cache: Any) -> Any:
        """The augmenting model's part of the cache, as a cache."""
        from transformers import DynamicCache

        if cache is None:
            return None
        view = DynamicCache()
        view.layers = cache.layers[self.anchor.config.num_hidden_layers : self._own_layers]
        return view


class _Bridged(nn.Module):
    """A layer of the anchor, and what its bridge adds; whatever else is asked of it, the layer answers."""

    def __init__(self, layer: nn.Module, composed: Composed, number: int) -> None:
        super().__init__()
        self.layer, self.number = layer, number
        self.__dict__["composed"] = composed

    def forward(self, *args: Any, **options: Any) -> Any:
        out = self.layer(*args, **options)
        if not isinstance(out, tuple):
            return self.composed._add(self.number, out)
        return (self.composed._add(self.number, out[0]), *out[1:])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


@contextmanager
def _listening(tower: Any, layers: set[int], states: dict[int, Tensor]) -> Iterator[None]:
    """What these layers give is put into states."""

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            states[layer] = out[0] if isinstance(out, tuple) else out

        return hook

    hooks = [tower.layers[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# -- what is refused ---------------------------------------------------------------------------------------------------


def _check_ids(anchor: Any, augmenting: Any, tokenizers: tuple[Any, Any] | None) -> None:
    if tokenizers is not None:
        ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
        if ours != theirs:
            raise ValueError(
                f"the tokenizers of {type(anchor).__name__} and {type(augmenting).__name__} read a text as other ids "
                f"({len(ours)} and {len(theirs)} tokens): both models must read the same ones; take a model of the "
                "anchor's family"
            )
        return
    sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (anchor, augmenting)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the anchor has {sizes[0]} ids and the augmenting model {sizes[1]}; if the same tokenizer stands behind "
            "both, give tokenizers=(the anchor's, the augmenting model's)"
        )


def _check_decoder(part: str, model: Any) -> None:
    config = getattr(model, "config", None)
    plain = config is not None and not config.is_encoder_decoder and config.get_text_config(decoder=True) is config
    if not plain or not hasattr(model.get_decoder(), "layers"):
        raise ValueError(
            f"the {part} model is a {type(model).__name__}; want a causal language model of transformers with a list "
            "of layers, and no other modality"
        )


def _checked_pairs(pairs: Sequence[Pair], augmenting: Any, anchor: Any) -> list[Pair]:
    found = [(int(a), int(b)) for a, b in pairs]
    deep = augmenting.config.num_hidden_layers, anchor.config.num_hidden_layers
    strange = [pair for pair in found if not (0 <= pair[0] < deep[0] and 0 <= pair[1] < deep[1])]
    if not found or strange or len({layer for _, layer in found}) != len(found):
        raise ValueError(
            f"pairs={list(pairs)}: want (layer of the augmenting model, layer of the anchor), 0 to {deep[0] - 1} and 0 "
            f"to {deep[1] - 1}, each layer of the anchor once"
        )
    return found


def _checked_call(args: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call of the anchor, of which the augmenting model can read the same tokens."""
    options = dict(options)
    if args:
        options["input_ids"] = args[0]
    if len(args) > 1 or options.get("input_ids") is None or options.get("inputs_embeds") is not None:
        raise ValueError("two models composed read ids: give input_ids, by name, and no inputs_embeds")
    mask, places = options.get("attention_mask"), options.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise ValueError("two models composed take an attention_mask [b, n] of 1 for real tokens, and no other")
    if mask is None and places is not None and bool((places[:, 1:] <= places[:, :-1]).any()):
        raise ValueError("position_ids that begin again (packed rows) are not known to the cross attention: pad rows")
    if options.get("output_hidden_states"):
        raise ValueError("output_hidden_states would show the layers without what is added to them: use hooks")
    return options
