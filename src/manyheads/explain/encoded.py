"""A text as a model's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.hosts.loading import Loaded, reads_text
from manyheads.hosts.positions import room


def encoded(loaded: Loaded, text: str) -> tuple[dict[str, Tensor], list[str]]:
    """The model's inputs [1, n], and a string per token."""
    if not reads_text(loaded.model):
        raise ValueError(f"{loaded.name} reads no text: give --image, or a model whose inputs are token ids")
    if not text.strip():
        raise ValueError("the text is empty: give --text or a --file with some words")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            "the text holds halves of characters (lone surrogates), which nothing reads: give UTF-8"
        ) from error
    most = room(loaded.model)
    if loaded.tokenizer is None:
        ids = torch.tensor([loaded.encode(text)])
    else:
        ids = torch.tensor([loaded.known(loaded.tokenizer(text, truncation=False)["input_ids"])])
    if most is not None and ids.shape[1] > most:
        raise ValueError(
            f"the text has {ids.shape[1]:,} tokens, {loaded.name} has positions for {most:,}: give a shorter one"
        )
    ids = ids.to(next(loaded.model.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, **_begun(loaded, ids)}, loaded.tokens(ids[0].tolist())


def _begun(loaded: Loaded, ids: Tensor) -> dict[str, Tensor]:
    """What the decoder of a model that reads a text and writes another begins with: its answer is the first token."""
    if not (loaded.model.config.is_encoder_decoder and loaded.model.can_generate()):
        return {}
    settings = (loaded.model.generation_config, loaded.model.config)
    starts = [getattr(own, "decoder_start_token_id", None) for own in settings]
    start = next((own for own in starts if own is not None), None)
    if start is None:
        raise ValueError(
            f"{loaded.name} has no decoder_start_token_id in its config: its decoder has nothing to begin by"
        )
    return {"decoder_input_ids": ids.new_full((1, 1), start)}
