"""What a model is fed from a command line: a text, the words marked in it, where they stand among its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from manyheads.hosts.loading import Loaded, reads_text
from manyheads.hosts.seeing import Seeing
from manyheads.hosts.sites import shows_pictures_to_text
from manyheads.runs.given import shown
from manyheads.steer.method import Prompt


def kind_of(model: Any) -> str:
    """One of method.KINDS. ValueError for what answers nothing."""
    config = model.config
    if shows_pictures_to_text(model):
        return "vision-language"
    if reads_text(model) and hasattr(model, "get_image_features"):
        return "dual-encoder"
    if reads_text(model) and model.can_generate() and not config.is_encoder_decoder:
        return "language"
    if callable(getattr(model, "sample", None)) and callable(getattr(model, "corrections", None)):
        return "diffusion"
    raise ValueError(
        f"{type(model).__name__} is none of the models that interventions take: give a causal language model, one that "
        "reads pictures too, a pair of towers such as CLIP, or one that draws"
    )


def text_prompt(loaded: Loaded, text: str, marks: Sequence[str] = (), *, chat: bool = False) -> Prompt:
    """The text as the model reads it, its own first token included; chat: as a user's message in the model's template.
    marks: words of the text; their tokens are the spans "text1", "text2" and, together, "text". ValueError for an empty
    text, one that is too long, words that are not in it or are there several times."""
    if not text.strip():
        raise ValueError("the text is empty: give --text some words")
    whole = _templated(loaded, text) if chat else text
    ids, places = _tokens(loaded, whole, special=not chat)
    check_length(loaded, len(ids))
    spans = {f"text{i + 1}": _marked(whole, words, places, loaded.name) for i, words in enumerate(marks)}
    if spans:
        spans["text"] = sorted({place for own in spans.values() for place in own})
    tokens = torch.tensor([ids], device=next(loaded.model.parameters()).device)
    return Prompt({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, spans, loaded.tokenizer)


def picture_prompt(seeing: Seeing, picture: Any, text: str, marks: Sequence[str] = ()) -> Prompt:
    """The same with a PIL picture; its tokens are the span "image". ValueError as of `Seeing.prompt` besides."""
    whole, loaded = seeing.prompt(text), seeing.loaded
    pixels = seeing.pixels([picture])
    ids = seeing.encode(text, count := seeing.per_picture(pixels))
    begun = seeing.tokenizer.bos_token is not None and whole.startswith(seeing.tokenizer.bos_token)
    places = _tokens(loaded, whole, special=not begun)[1]
    image = [place for place, own in enumerate(ids) if own == seeing.image_id]
    spans = {"image": image}
    for number, words in enumerate(marks, 1):
        found = _marked(whole, words, places, loaded.name)
        if image[0] in found:
            raise ValueError(f"--span {shown(words)!r} holds the picture itself: mark words")
        spans[f"text{number}"] = [place + (count - 1) * (place > image[0]) for place in found]
    if marks:
        spans["text"] = sorted({place for name, own in spans.items() if name != "image" for place in own})
    tokens = torch.tensor([ids], device=pixels.device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels}
    return Prompt(inputs, spans, loaded.tokenizer)


def check_length(loaded: Loaded, count: int) -> None:
    config = loaded.config
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if most is not None and count > most:
        raise ValueError(f"the text has {count:,} tokens, {loaded.name} has positions for {most:,}: give a shorter one")


def _templated(loaded: Loaded, text: str) -> str:
    message = [{"role": "user", "content": text}]
    loaded.chat(message)  # says what is wrong with the template, if anything is
    assert loaded.tokenizer is not None
    return str(loaded.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))


def _tokens(loaded: Loaded, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Token ids, and which bytes or characters of the text each one stands for, None where that is not known."""
    if loaded.tokenizer is None:
        ids = loaded.encode(text)
        return ids, [(i, i + 1) for i in range(len(ids))]
    if not loaded.tokenizer.is_fast:
        return loaded.known(loaded.tokenizer(text, add_special_tokens=special)["input_ids"]), None
    read = loaded.tokenizer(text, add_special_tokens=special, truncation=False, return_offsets_mapping=True)
    return loaded.known(read["input_ids"]), [(int(a), int(b)) for a, b in read["offset_mapping"]]


def _marked(text: str, words: str, places: list[tuple[int, int]] | None, name: str) -> list[int]:
    count = text.count(words) if words.strip() else 0
    if count != 1:
        what = "is empty" if not words.strip() else f"occurs {count} times in the text"
        raise ValueError(f"--span {shown(words)!r} {what}: give words that stand in it once")
    if places is None:
        raise ValueError(f"--span: the tokenizer of {name} does not tell which words its tokens stand for")
    start = text.index(words)
    if places and places[-1][1] != len(text) and places[-1][1] == len(text.encode()):  # tokens are bytes
        start, stop = len(text[:start].encode()), len(text[: start + len(words)].encode())
    else:
        stop = start + len(words)
    return [i for i, (a, b) in enumerate(places) if a < stop and b > start]
