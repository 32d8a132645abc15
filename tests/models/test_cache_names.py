"""What transformers 5.24 calls `cache` was past_key_values before: our models take both names."""

from __future__ import annotations

import pytest
import torch
from tiny_models import causal_lm, seq2seq, tokens
from torch.testing import assert_close

from manyheads.cache_names import CACHE_NAME, cache_of, given_cache, with_cache


def test_both_names_are_one_argument() -> None:
    model, ids = causal_lm("gqa"), tokens(2, 6)
    with torch.no_grad():
        wanted = model(ids).logits[:, 4:]
        for name in ("cache", "past_key_values"):
            held = cache_of(model(ids[:, :4], use_cache=True))
            assert_close(model(ids[:, 4:], **{name: held}).logits, wanted)
        with pytest.raises(TypeError, match="two names of one argument"):
            model(ids[:, 4:], cache=held, past_key_values=held)


def test_both_names_in_a_model_of_two_streams() -> None:
    model, ids = seq2seq("softmax"), tokens(2, 6)
    with torch.no_grad():
        wanted = model(ids, decoder_input_ids=ids).logits[:, 4:]
        held = cache_of(model(ids, decoder_input_ids=ids[:, :4], use_cache=True))
        assert_close(model(ids, decoder_input_ids=ids[:, 4:], cache=held).logits, wanted)


def test_a_cache_is_found_by_either_name_and_handed_on_by_one() -> None:
    for name in ("cache", "past_key_values"):
        assert given_cache({name: 1, "use_cache": True}) == 1
        assert with_cache({name: 1, "use_cache": True}, 2) == {"use_cache": True, CACHE_NAME: 2}
    assert given_cache({"cache": None}) is None
