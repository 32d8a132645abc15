"""Vision-language models of LLaVA's shape: one picture and some words to a row of tokens.

A picture's patches stand in the row as copies of the image token, as many as the tower and projector give vectors; the
Llama (or whichever language model it is) reads them like words. `vlm` is the packaged one, which answers about digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.image_files import image_processor
from manyheads.hosts.loading import VLM, Loaded, find_model, load_model

SHAPE = "LlavaForConditionalGeneration"


@dataclass(frozen=True)
class Seeing:
    """loaded: the model with its tokenizer. images: transformers' image processor of its folder."""

    loaded: Loaded
    images: Any

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def name(self) -> str:
        return self.loaded.name

    @cached_property
    def image_id(self) -> int:
        """The token that stands for a patch."""
        found = getattr(self.model.config, "image_token_id", None)
        known = None if found is None else self.tokenizer.convert_ids_to_tokens(int(found))
        if found is None or known is None:
            raise ValueError(
                f"{self.name} has no image token: its config's image_token_id is {found}, which its tokenizer does not "
                "know; give a folder whose tokenizer and config belong together"
            )
        return int(found)

    @property
    def image_token(self) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(self.image_id))

    def pixels(self, pictures: Sequence[Any]) -> Tensor:
        """[b, channels, height, width] of PIL pictures of any size, as the folder's processor makes them."""
        if not pictures:
            raise ValueError(f"{self.name}: no picture was given; want one for each row")
        made = self.images([picture.convert("RGB") for picture in pictures], return_tensors="pt")["pixel_values"]
        if made.dim() != 4:
            raise ValueError(
                f"{self.name}'s processor makes {list(made.shape)} of a picture: want [pictures, channels, height, "
                "width], one view of each"
            )
        parameter = next(self.model.parameters())
        found: Tensor = made.to(parameter.device, parameter.dtype)
        return found

    @torch.no_grad()
    def per_picture(self, pixels: Tensor) -> int:
        """Tokens that one of these pictures takes."""
        return len(self.model.get_image_features(pixel_values=pixels[:1]).pooler_output[0])

    def prompt(self, text: str) -> str:
        """The text as the model was trained to be asked, the image token in it once. A text that holds the image token
        itself is taken as a whole prompt, as it is. ValueError where it is there more than once, or nowhere."""
        if not text.strip():
            raise ValueError("the text is empty: give --text with a question about the picture")
        token = self.image_token
        whole = text if token in text else self._templated(text)
        if (times := whole.count(token)) != 1:
            problem = "no image token in the prompt" if not times else f"{times} image tokens, where one is meant"
            raise ValueError(
                f"{self.name}: {problem}: want {token} once, or a text without it; the prompt is {whole!r}"
            )
        return whole

    def _templated(self, text: str) -> str:
        if getattr(self.tokenizer, "chat_template", None) is None:
            return f"{self.image_token}\n{text}"
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        try:
            return str(self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template is a program of somebody else's
            raise ValueError(
                f"{self.name}'s chat template does not take a picture and a text ({error!r}): give a whole prompt with "
                f"{self.image_token} in it"
            ) from error

    def encode(self, text: str, tokens: int) -> list[int]:
        """Ids of the prompt, the image token `tokens` times in its place."""
        whole = self.prompt(text)
        begun = self.tokenizer.bos_token is not None and whole.startswith(self.tokenizer.bos_token)
        ids = list(self.tokenizer(whole, add_special_tokens=not begun)["input_ids"])
        if ids.count(self.image_id) != 1:
            raise ValueError(f"{self.name}'s tokenizer makes no single token of {self.image_token}: {ids}")
        at = ids.index(self.image_id)
        ids[at : at + 1] = [self.image_id] * tokens
        most = getattr(self.loaded.config, "max_position_embeddings", None)
        if most is not None and len(ids) > most:
            raise ValueError(f"picture and text have {len(ids):,} tokens, {self.name} has positions for {most:,}")
        return ids

    def inputs(self, pictures: Sequence[Any], texts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [b, n], padded on the left, and pixel_values, of a picture and a text a row."""
        if len(pictures) != len(texts):
            raise ValueError(f"{len(pictures)} pictures for {len(texts)} texts; want one picture for each text")
        pixels = self.pixels(pictures)
        count = self.per_picture(pixels)
        return {**self._padded([self.encode(text, count) for text in texts]), "pixel_values": pixels}

    def _padded(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        pad, device = (0 if pad is None else pad), next(self.model.parameters()).device
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        return {"input_ids": ids, "attention_mask": seen}

    def is_image(self, ids: Tensor) -> Tensor:
        """Which of the tokens are the picture's, bool of the same shape."""
        return ids == self.image_id

    def without(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same rows with no picture: its tokens are gone, and text that stood behind them moves up."""
        ids, seen = inputs["input_ids"], inputs["attention_mask"].bool()
        kept = seen & ~self.is_image(ids)
        return self._padded([row[own].tolist() for row, own in zip(ids, kept, strict=True)])

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor], *, most: int = 32) -> list[list[int]]:
        """The likeliest token after token, of every row, up to `most` or the end, which is left out."""
        made = self.model.generate(
            **inputs, max_new_tokens=most, do_sample=False, pad_token_id=self.tokenizer.pad_token_id or 0
        )
        ends = self.model.generation_config.eos_token_id
        stop = set(ends) if isinstance(ends, list) else {ends}
        rows = made[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: next((i for i, own in enumerate(row) if own in stop), len(row))] for row in rows]

    def answers(self, pictures: Sequence[Any], texts: Sequence[str], *, most: int = 32) -> list[str]:
        """What the model says about each picture, greedily."""
        return [self.tokenizer.decode(row) for row in self.generate(self.inputs(pictures, texts), most=most)]


def load_seeing(name: str | Path | None = VLM, **options: Any) -> Seeing:
    """name: a folder or hub name of a LlavaForConditionalGeneration with its processor, or "vlm", the packaged one.
    options go to from_pretrained. ValueError for any other model, and where tower, tokenizer or processor lack."""
    from transformers import AutoConfig

    where = find_model(name)
    name = "byte_llama" if name is None else name
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} has no config that transformers reads: {error}") from error
    _check_sight(str(name), config)
    loaded = load_model(where, auto=SHAPE, **options)
    return seen_by(Loaded(loaded.model, loaded.tokenizer, str(name), where))


def seen_by(loaded: Loaded) -> Seeing:
    """The same of a model that is there already, with the processor beside its weights."""
    _check_sight(loaded.name, loaded.model.config)
    if type(loaded.model).__name__ != SHAPE or loaded.where is None:
        raise ValueError(f"{loaded.name} was opened as {type(loaded.model).__name__}: want a folder of a {SHAPE}")
    return Seeing(loaded, image_processor(loaded.where))


def _check_sight(name: str, config: Any) -> None:
    if getattr(config, "vision_config", None) is None:
        raise ValueError(f"{name} is a {config.model_type}, which has no vision tower: give a {SHAPE}, or {VLM}")
    if config.model_type != "llava":
        raise ValueError(f"{name} is a {config.model_type}; pictures with text are read by a {SHAPE}, such as {VLM}")
