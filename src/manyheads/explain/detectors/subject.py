"""Whose heads are read, and on what: the model's stack of self attention, and samples without padding.

Samples are synthetic (text, repeats, random tokens, noise pictures) or the user's own inputs, one row at a time.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.attributions.feed import Feed
from manyheads.hosts.device import device_of
from manyheads.hosts.loading import Loaded
from manyheads.hosts.probes import Inputs
from manyheads.hosts.sites import known_stack
from manyheads.hosts.taps import AttentionCall, Site, sites
from manyheads.mechanism import Mechanism

# Tokens that random text of a model without a tokenizer is drawn from: few, so that they come again.
_COMMON = 24
_BYTES = 256


@dataclass(frozen=True, eq=False)
class Sample:
    """One input, a batch of one without padding. ids [n]: tokens of the stack that is read (None: it reads none).
    period, start: of random tokens that are repeated. special, image [n]: True where a token is the tokenizer's own,
    or stands for a part of an image."""

    named: dict[str, Any]
    kind: str
    ids: Tensor | None = None
    period: int = 0
    start: int = 0
    special: Tensor | None = None
    image: Tensor | None = None


class Subject:
    """A model and the stack whose self attention is read: the decoder where there is one, unless told."""

    def __init__(self, model: nn.Module | Loaded, stack: str | None = None):
        self.model: Any = model.model if isinstance(model, Loaded) else model
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"detectors read a torch module or a Loaded; got {type(model).__name__}")
        own = [site for site in sites(self.model) if site.kind == "self"]
        stacks = list(dict.fromkeys(site.stack for site in own))
        stack = known_stack(stack, set(stacks))
        if not own or (stack is not None and stack not in stacks):
            raise ValueError(
                f"{type(self.model).__name__} has self attention in {stacks or 'no stack'}; not in {stack}"
            )
        preferred = [name for name in ("decoder", "language") if name in stacks]
        self.stack = stack or (preferred or stacks)[0]
        self.sites: list[Site] = [site for site in own if site.stack == self.stack]
        self.name = model.name if isinstance(model, Loaded) else type(self.model).__name__
        self.loaded = model if isinstance(model, Loaded) else self._bytes()

    @property
    def layers(self) -> int:
        return len(self.sites)

    @property
    def config(self) -> Any:
        config: Any = getattr(self.model, "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else None

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def bare(self) -> bool:
        """One mechanism by itself, which takes vectors."""
        return isinstance(self.model, Mechanism)

    @property
    def pictures(self) -> bool:
        return self.stack == "vision" or getattr(self.model, "main_input_name", "") == "pixel_values"

    @property
    def generates(self) -> bool:
        can = getattr(self.model, "can_generate", None)
        return bool(can is not None and can()) and self.stack in ("decoder", "language") and not self.pictures

    @property
    def vocabulary(self) -> int:
        return _BYTES if self.bare else int(getattr(self.config, "vocab_size", 0) or 0)

    def block(self, site: Site) -> nn.Module | None:
        """The layer of a stack that the site is a part of, which reads and writes the residual: the largest numbered
        module with this self attention alone."""
        parts = site.path.split(".")
        for end in range(1, len(parts)):
            prefix = ".".join(parts[:end])
            if parts[end - 1].isdigit() and sum(own.path.startswith(f"{prefix}.") for own in self.sites) == 1:
                found: nn.Module = self.model.get_submodule(prefix)
                return found
        return None

    def feed(self, named: Mapping[str, Any]) -> Any:
        """Runs the model's body, without its vocabulary."""
        body = self.model.base_model if hasattr(self.model, "base_model") else self.model
        feed = Feed(body, {name: value for name, value in named.items() if name != "labels"})
        return feed(use_cache=False) if feed.takes("use_cache") else feed()

    def whole(self, named: Mapping[str, Any]) -> Any:
        feed = Feed(self.model, dict(named))
        return feed(use_cache=False) if feed.takes("use_cache") else feed()

    def _bytes(self) -> Loaded | None:
        return Loaded(self.model, None, self.name) if not self.bare and self.vocabulary == _BYTES else None


class Samples:
    """inputs: a tensor of ids or pixels, or a mapping of the model's inputs. text: windows of it are read. Neither:
    synthetic ones. image_span: (start, stop) of an image's tokens, where the config has no image_token_id."""

    def __init__(
        self,
        subject: Subject,
        *,
        inputs: Any = None,
        text: str | None = None,
        length: int = 256,
        count: int = 4,
        seed: int = 0,
        image_span: Sequence[int] | None = None,
    ):
        if inputs is not None and text is not None:
            raise ValueError("give inputs or text, not both")
        if length < 16 or count < 1:
            raise ValueError(f"length is {length} and count {count}: give at least 16 tokens and 1 sample")
        self.subject, self.count, self.seed, self.image_span = subject, count, seed, image_span
        self.length = min(length, self._longest(length))
        self.text = text
        self.own = [] if inputs is None else self._rows(Feed.of(subject.model, inputs))
        self.source: Inputs | None = None
        if subject.loaded is not None and (text is not None or not self.own) and not subject.pictures:
            self.source = Inputs(subject.loaded, seed=seed, text=text)
        elif text is not None:
            raise ValueError(f"{subject.name} comes without a tokenizer: give a Loaded (load_model), or inputs=")

    @property
    def given(self) -> bool:
        """Whether they are the user's."""
        return bool(self.own) or self.text is not None

    def of(self, kind: str) -> list[Sample]:
        """kind: "text", "repeats", or "domains": text, repeats and random tokens, one sample of each in turn."""
        if self.own:
            return self.own
        if self.text is not None:
            return self.texts
        if self.subject.pictures:
            return self.noise
        if kind == "text":
            return self.texts
        if kind == "repeats":
            return self.repeats
        return [sample for group in zip(self.texts, self.repeats, self._random(), strict=False) for sample in group]

    # -- synthetic -------------------------------------------------------------------------------------------------

    @cached_property
    def repeats(self) -> list[Sample]:
        return [self._repeat(number) for number in range(self.count)]

    @cached_property
    def texts(self) -> list[Sample]:
        if self.source is not None:
            size = self.length - len(self._before) - len(self._after)
            return [self._sample(ids.tolist(), "text") for ids in self.source.windows(size, self.count)]
        rng = random.Random(f"text {self.seed}")
        common = rng.sample(self._alphabet, min(_COMMON, len(self._alphabet)))
        return [self._sample(rng.choices(common, k=self.length), "text") for _ in range(self.count)]

    def _repeat(self, number: int, times: int = 4) -> Sample:
        size = self.length - len(self._before) - len(self._after)
        if self.source is not None:
            ids, period, start = self.source.repeats(size, number, times)
            return self._sample(ids.tolist(), "repeats", period, start)
        period = size // times
        segment = random.Random(f"repeats {self.seed} {number}").choices(self._alphabet, k=period)
        return self._sample(segment * times, "repeats", period)

    def _random(self) -> list[Sample]:
        rng = random.Random(f"random {self.seed}")
        size = self.length - len(self._before) - len(self._after)
        return [self._sample(rng.choices(self._alphabet, k=size), "random") for _ in range(self.count)]

    @cached_property
    def noise(self) -> list[Sample]:
        config = self.subject.model.config
        config = getattr(config, "vision_config", config)
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if size is None:
            raise ValueError(f"{self.subject.name}: its images have no known size: give inputs=")
        high, wide = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(self.seed)
        pixels = torch.randn(self.count, channels, high, wide, generator=generator).to(self.subject.device)
        return [Sample({"pixel_values": each[None]}, "noise") for each in pixels]

    def _sample(self, ids: list[int], kind: str, period: int = 0, start: int = 0) -> Sample:
        subject, start = self.subject, start + len(self._before)
        row = torch.tensor([*self._before, *ids, *self._after], device=subject.device)
        special = self._special(row)
        if subject.bare:
            book = torch.randn(_BYTES, subject.model.dim, generator=torch.Generator().manual_seed(self.seed))
            weight = next(subject.model.parameters())
            return Sample({"x": book.to(weight)[row][None]}, kind, row, period, start)
        named = {"input_ids": row[None]}
        if Feed(subject.model, {}).takes("decoder_input_ids"):
            named["decoder_input_ids"] = row[None]
        return Sample(named, kind, row, period, start, special)

    @property
    def _alphabet(self) -> list[int]:
        size = self.subject.vocabulary
        if not size:
            raise ValueError(f"{self.subject.name} has no vocabulary to draw tokens from: give inputs=")
        return list(range(33, 127)) if self.subject.bare else list(range(min(10, size // 2), size))

    @property
    def _tokenizer(self) -> Any:
        return None if self.subject.loaded is None else self.subject.loaded.tokenizer

    @property
    def _before(self) -> list[int]:
        """What an encoder's tokenizer puts in front of every text."""
        first = getattr(self._tokenizer, "cls_token_id", None)
        return [] if first is None or self.subject.stack == "decoder" or self.subject.generates else [first]

    @property
    def _after(self) -> list[int]:
        last = getattr(self._tokenizer, "sep_token_id", None)
        return [] if last is None or self.subject.stack == "decoder" or self.subject.generates else [last]

    def _special(self, row: Tensor) -> Tensor | None:
        own = getattr(self._tokenizer, "all_special_ids", None)
        return torch.isin(row, torch.tensor(own, device=row.device)) if own else None

    def _longest(self, length: int) -> int:
        longest = getattr(self.subject.config, "max_position_embeddings", None)
        return longest if isinstance(longest, int) and longest > 0 else length

    # -- the user's ------------------------------------------------------------------------------------------------

    def _rows(self, feed: Feed) -> list[Sample]:
        return [self._row(feed.row(i).named) for i in range(feed.rows)]

    def _row(self, named: dict[str, Any]) -> Sample:
        """Without its padding: positions and scores are those of the real tokens."""
        for prefix in ("", "decoder_"):
            mask, ids = named.get(f"{prefix}attention_mask"), named.get(f"{prefix}input_ids")
            if mask is None or mask.dim() != 2 or (ids is not None and ids.shape != mask.shape):
                continue
            real = mask[0] > 0
            if not bool(real.any()):
                raise ValueError(f"{prefix}attention_mask leaves a row with no token: drop that row")
            own = prefix == "decoder_"
            for name, value in named.items():
                fits = isinstance(value, Tensor) and value.shape[:2] == mask.shape
                if fits and name.startswith("decoder_") == own:
                    named[name] = value[:, real]
        found = named.get("decoder_input_ids" if self.subject.stack == "decoder" else "input_ids")
        found = named.get("input_ids") if found is None else found
        ids = None if found is None or self.subject.stack == "vision" else found[0]
        return Sample(
            named,
            "inputs",
            ids,
            special=None if ids is None else self._special(ids),
            image=None if ids is None else self._image(ids),
        )

    def _image(self, ids: Tensor) -> Tensor | None:
        if self.image_span is not None:
            start, stop = self.image_span
            if not 0 <= start < stop <= len(ids):
                raise ValueError(f"image_span {start} to {stop} is no part of {len(ids)} tokens")
            at = torch.arange(len(ids), device=ids.device)
            return (at >= start) & (at < stop)
        config = getattr(self.subject.model, "config", None)
        token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        return ids == token if token is not None and bool((ids == token).any()) else None


def sees_ahead(call: Any) -> bool:
    """Whether queries attend to keys after them."""
    if not isinstance(call, AttentionCall):
        return not call.site.module.causal
    if call.key.shape[2] < 2:
        return False
    seen = call.allowed(slice(0, 1))
    if seen is None:
        return True
    ahead = seen[0, 0, 0, 1]
    return bool(ahead if seen.dtype == torch.bool else ahead > torch.finfo(seen.dtype).min / 2)
