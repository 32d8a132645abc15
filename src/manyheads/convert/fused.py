"""A second modality beside a frozen text model: LlamaFusion, Shi et al., arXiv:2412.15188.

Every projection of queries, keys, values and outputs, every MLP and every norm has a copy for the tokens of the new
modality (images, below), which starts as the text's and alone is trained. All tokens attend in one softmax (the
mechanism `mixture-of-transformers`, in the layers of the host):

    q_i, k_i, v_i by the weights of token i's own modality;  i sees j where j <= i, or both are of the same image

Tokens without an image among them go through the text model as it is, bit for bit. Images come as embeddings and leave
as states of the last norm: what makes the one of pixels or latents, and the loss on the other (diffusion, in the
paper), are the caller's. No code of the authors was found.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.cache_names import given_cache
from manyheads.convert.adapter import frozen, read_adapter, write_adapter
from manyheads.convert.layout import attentions

KIND = "llamafusion"


def load_fused(path: str | Path, model: Any) -> Fused:
    """What `Fused.save` wrote, beside the text model that it was trained with; another one is refused."""
    weights, _ = read_adapter(path, KIND, {"text model": model})
    made = Fused(model)
    own = made.own_weights()
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
    return made


@dataclass
class _Route:
    """Which tokens [b, n] of the pass at hand are of the new modality; None: none are."""

    others: Tensor | None = None


class Fused(nn.Module):
    """The text model, frozen here and sharing its weights with the given one, and the weights of another modality.

    forward and generate take ids [b, n]; `kinds` [b, n], 0 or False for text: every run of one other number (or of
    True) is an image, two that touch need different numbers; and `embeddings` [tokens of images, e], in reading order.
    The ids at the places of images are not read. An image is given whole, in one pass.
    """

    model: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        _check_host(model)
        self.__dict__["source"] = frozen(model)
        self.route = _Route()
        # The copy has modules of its own around the very same tensors.
        self.model = copy.deepcopy(model, {id(t): t for t in chain(model.parameters(), model.buffers())})
        decoder = self.model.get_decoder()
        for layer in decoder.layers:
            _split(layer, self.route)
            layer.__class__ = _routed(type(layer))
            layer.__dict__["route"] = self.route
        decoder.norm = _Split(decoder.norm, self.route)

    @property
    def config(self) -> Any:
        return self.model.config

    def own_weights(self) -> dict[str, Tensor]:
        """The new modality's, by name: all that is trained."""
        return {name: value for name, value in self.model.named_parameters() if ".other." in name}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        kinds: Tensor | None = None,
        embeddings: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The text model's output; its loss is that of text tokens. Where images were given, `states` [tokens of
        images, e] are theirs after the last norm. With a cache, kinds are those of the tokens of this pass."""
        options |= {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if kinds is None and embeddings is None:
            return self.model(**options)
        shown = _Images.of(input_ids, attention_mask, kinds, embeddings, self.config.hidden_size)
        if labels is not None:
            options["labels"] = labels.masked_fill(shown.others, -100)
        last: list[Tensor] = []
        hook = self.model.get_decoder().norm.register_forward_hook(lambda module, args, out: last.append(out))
        try:
            with self._showing(shown, whole=False):
                out = self.model(**options)
        finally:
            hook.remove()
        out["states"] = last[0][shown.others]
        return out

    def generate(
        self, input_ids: Tensor, kinds: Tensor | None = None, embeddings: Tensor | None = None, **options: Any
    ) -> Any:
        """Text behind text and images. With images an attention_mask is wanted, for ids at their places say nothing;
        kinds are those of all ids, and with a cache only what it does not hold is read."""
        if kinds is None and embeddings is None:
            return self.model.generate(input_ids, **options)
        mask = options.get("attention_mask")
        if mask is None:
            raise ValueError("generate with images wants an attention_mask [b, n], 1 for what is no padding")
        shown = _Images.of(input_ids, mask, kinds, embeddings, self.config.hidden_size)
        with self._showing(shown, whole=True):
            return self.model.generate(input_ids, **options)

    def save(self, path: str | Path) -> Path:
        """The new modality's weights alone, and which text model they stand beside, in one safetensors file."""
        return write_adapter(path, KIND, self.own_weights(), {}, {"text model": self.__dict__["source"]})

    # -- one pass ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _showing(self, shown: _Images, *, whole: bool) -> Iterator[None]:
        """Calls of the text model read these images. whole: they are told of all tokens, those in a cache too."""

        def show(module: Any, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, self._shown(dict(options), shown, whole)

        hook = self.model.register_forward_pre_hook(show, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self.route.others = None

    def _shown(self, options: dict[str, Any], shown: _Images, whole: bool) -> dict[str, Any]:
        ids, past = options["input_ids"], given_cache(options)
        seen = 0 if past is None else past.get_seq_length()
        part = shown.part(seen if whole else 0, ids)
        self.route.others = part.others if bool(part.others.any()) else None
        if self.route.others is None:
            return options
        _check_pass(self.model, past, options)
        text = self.model.get_input_embeddings()(ids.masked_fill(part.others, 0))
        embedded = torch.where(part.others[..., None], part.embeddings.to(text), text)
        mask = _visible(part, options.get("attention_mask"), seen)
        added = torch.zeros(mask.shape, dtype=text.dtype, device=text.device)
        options["attention_mask"] = added.masked_fill(~mask, torch.finfo(text.dtype).min)
        return {**options, "input_ids": None, "inputs_embeds": embedded}


@dataclass(frozen=True)
class _Images:
    """others [b, n]: of an image; runs [b, n]: tokens of one image have one number; embeddings [b, n, e]."""

    others: Tensor
    runs: Tensor
    embeddings: Tensor

    @classmethod
    def of(cls, ids: Any, mask: Any, kinds: Tensor | None, given: Tensor | None, width: int) -> _Images:
        if not isinstance(ids, Tensor) or kinds is None or given is None or kinds.shape != ids.shape:
            raise ValueError(
                "images want input_ids [b, n], kinds [b, n] (0 for text) and embeddings [tokens of images, e]; got "
                f"{[list(t.shape) if isinstance(t, Tensor) else t for t in (ids, kinds, given)]}"
            )
        kinds = kinds.to(ids.device).long()
        others = kinds != 0
        count = int(others.sum())
        if tuple(given.shape) != (count, width):
            raise ValueError(
                f"embeddings are {list(given.shape)}; kinds have {count} tokens of images: {[count, width]}"
            )
        if mask is not None and mask.ndim == 2 and bool((others & ~mask[:, -ids.shape[1] :].bool()).any()):
            raise ValueError("attention_mask hides tokens of images: an image is given whole, and is no padding")
        runs = F.pad((kinds[:, 1:] != kinds[:, :-1]).long(), (1, 0)).cumsum(1)
        full = given.new_zeros(*others.shape, width)
        return cls(others, runs, full.masked_scatter(others[..., None].to(given.device), given))

    def part(self, start: int, ids: Tensor) -> _Images:
        """Those of the tokens ids [b times beams, n] from place `start` on; what follows is text."""
        stop, end = start + ids.shape[1], self.others.shape[1]
        for cut in (at for at in (start, stop) if 0 < at < end):
            if bool((self.others[:, cut] & (self.runs[:, cut] == self.runs[:, cut - 1])).any()):
                raise ValueError(f"a pass ends within an image, at token {cut}: give the image whole, in one pass")
        fields = [t[:, start:stop] for t in (self.others, self.runs, self.embeddings)]
        behind = ids.shape[1] - fields[0].shape[1]
        repeats = ids.shape[0] // self.others.shape[0]
        others, runs = (F.pad(t, (0, behind)).repeat_interleave(repeats, 0) for t in fields[:2])
        return _Images(others, runs, F.pad(fields[2], (0, 0, 0, behind)).repeat_interleave(repeats, 0))


def _visible(part: _Images, mask: Tensor | None, seen: int) -> Tensor:
    """[b, 1, n, seen + n]. Padding sees itself, so that no row is empty."""
    n, device = part.others.shape[1], part.others.device
    i, j = torch.arange(seen, seen + n, device=device)[:, None], torch.arange(seen + n, device=device)
    same = (part.runs[:, :, None] == part.runs[:, None]) & part.others[:, :, None] & part.others[:, None]
    allowed = (j <= i) | F.pad(same, (seen, 0))
    if mask is not None:
        allowed = allowed & mask[:, None, : seen + n].bool()
    return (allowed | (i == j))[:, None]


# -- modules -----------------------------------------------------------------------------------------------------------


class _Split(nn.Module):
    """A projection or a norm, and its copy for tokens of the other modality; each token goes through its own."""

    def __init__(self, text: Any, route: _Route) -> None:
        super().__init__()
        self.text, self.other = text, copy.deepcopy(text)
        self.other.requires_grad_(True)
        self.__dict__["route"] = route

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, n, ...]."""
        others = self.__dict__["route"].others
        if others is None:
            out: Tensor = self.text(x)
            return out
        plain = self.text(x[~others])
        own = self.other(x[others].to(self.other.weight.dtype))
        out = plain.new_zeros(*others.shape, *plain.shape[1:])
        out[~others], out[others] = plain, own.to(plain.dtype)
        return out


def _split(parent: nn.Module, route: _Route) -> None:
    """Every module with weights below the parent is split."""
    for name, child in list(parent.named_children()):
        if any(True for _ in child.children()):
            _split(child, route)
        elif any(True for _ in child.parameters()):
            setattr(parent, name, _Split(child, route))


def _routed(cls: type[nn.Module]) -> type[nn.Module]:
    """A layer that is called with the route of its pass, so that gradient checkpointing, which computes it anew in
    backward, when other passes have come between, takes the same."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        return cls.__call__(self, *args, others=self.route.others, **options)

    def forward(self: Any, *args: Any, others: Tensor | None = None, **options: Any) -> Any:
        before, self.route.others = self.route.others, others
        try:
            return cls.forward(self, *args, **options)
        finally:
            self.route.others = before

    return type(f"Fused{cls.__name__}", (cls,), {"__call__": call, "forward": forward})


# -- what is refused ---------------------------------------------------------------------------------------------------


def _check_host(model: Any) -> None:
    attentions(model)
    config, name = model.config, type(model).__name__
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if windowed or set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise ValueError(f"{name} has layers with a sliding window, in which an image would not see all of itself")


def _check_pass(model: Any, past: Any, options: Mapping[str, Any]) -> None:
    from transformers import DynamicCache

    kind = model.config._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise ValueError(f"images want a mask of their own, which {kind!r} does not take: load the model with sdpa")
    if past is not None and type(past) is not DynamicCache:
        raise ValueError(f"images go into a DynamicCache, not into a {type(past).__name__}")
    mask = options.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise ValueError("with images, attention_mask is [b, n] of 1 for real tokens, and no other")
    places = options.get("position_ids")
    if mask is None and places is not None and bool((places[:, 1:] <= places[:, :-1]).any()):
        raise ValueError("position_ids that begin again (packed rows) do not go with images: pad rows instead")
    if options.get("inputs_embeds") is not None:
        raise ValueError("with images, give input_ids and embeddings, and no inputs_embeds")
