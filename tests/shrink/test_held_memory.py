"""What a cache holds on to after a pass, beyond the tensors that it counts."""

from __future__ import annotations

import torch
from tiny_families import prompt, tiny

from manyheads.shrink import StreamingLLM


def test_queries_of_a_prompt_are_not_held() -> None:
    model = tiny("llama")
    cache = StreamingLLM(budget_tokens=8).make_cache(model)
    with torch.no_grad():
        model(prompt(1, 24), past_key_values=cache)
    for layer in cache.layers:
        assert layer.last is not None
        # One query, of the last token.
        assert layer.last.queries.untyped_storage().nbytes() == layer.last.queries[:, :, :, :1].nbytes
