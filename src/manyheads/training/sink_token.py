"""A token at the front of every training sample, into which attention sinks, so that a stream need keep no other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TAKES = ("input_ids", "attention_mask", "labels", "position_ids")


def add_sink_token(model: Any) -> int:
    """Gives a causal language model one more token, learnt as all are, and returns its id, for `with_sink_token`.

        sink = add_sink_token(model)
        loss = model(**with_sink_token(batch, sink)).loss            # in every step of pre-training
        with StreamingLLM(budget_tokens=1024, sink_size=1)(model):   # afterwards, one sink does
            model.generate(**with_sink_token(prompt, sink))

    Claim: a model trained so gives what its heads need not attend to to this token, and streams with it alone, where
    one trained without needs its first four tokens. Generation never gives it (`suppress_tokens`). Whoever builds an
    optimizer does so afterwards: the embeddings are new tensors.
    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453, section 3.3, which
    has no released training code. Their other form, one more in the denominator of the softmax, is not this.
    """
    embeddings = model.get_input_embeddings()
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ValueError(f"add_sink_token: {type(model).__name__} predicts no next token; want a causal language model")
    sink = int(embeddings.num_embeddings)
    model.resize_token_embeddings(sink + 1)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.suppress_tokens = [*(model.generation_config.suppress_tokens or []), sink]
    return sink


def with_sink_token(batch: Mapping[str, Tensor], sink: int) -> dict[str, Tensor]:
    """The batch with the sink before the first real token of each row, one token longer.

    batch: input_ids [b, n] and, where there are any, attention_mask [b, n], labels [b, n] (the sink's is -100; the
    token behind it is now predicted, too) and position_ids [b, n], which move up by one behind the sink. A row with
    nothing real stays so. Raises ValueError for anything else in the batch, for a mask with more than two axes, and for
    rows that hold several sequences (positions that start again): give each its own sink before packing.
    """
    strange = [name for name in batch if name not in _TAKES]
    if strange or "input_ids" not in batch:
        raise ValueError(f"with_sink_token: got {list(batch)}; want input_ids and of the rest only {list(_TAKES[1:])}")
    ids = batch["input_ids"]
    wrong = {name: list(value.shape) for name, value in batch.items() if value.shape != ids.shape}
    if ids.ndim != 2 or not ids.shape[1] or wrong:
        raise ValueError(f"with_sink_token: input_ids {list(ids.shape)}, {wrong}; want all of one shape [batch, n]")
    if bool((ids == sink).any()):
        raise ValueError(f"with_sink_token: input_ids hold the sink, {sink}, already; give each row one")
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    first = real.int().argmax(1, keepdim=True)
    place = torch.arange(ids.shape[1] + 1, device=ids.device)
    origin = (place - (place > first).long()).clamp(max=ids.shape[1] - 1)
    at_sink, behind = place == first, place > first
    found = {name: value.gather(1, origin) for name, value in batch.items()}
    found["input_ids"] = found["input_ids"].masked_fill(at_sink, sink)
    if "labels" in batch:
        found["labels"] = found["labels"].masked_fill(at_sink, -100)
    if "position_ids" in batch:
        steps = batch["position_ids"].diff(dim=1)
        if bool(((steps < 0) & real[:, 1:] & real[:, :-1]).any()):
            raise ValueError("with_sink_token: positions start again within a row; give each sequence its own sink")
        found["position_ids"] = found["position_ids"] + behind.long()
    return found
