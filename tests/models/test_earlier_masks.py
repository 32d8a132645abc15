"""A mask that covers the tokens of earlier passes: obeyed as Llama obeys it, or refused by name; never in silence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_decode import DECODING, generate
from tiny_models import causal_lm, seq2seq, tokens
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.models import ManyheadsCache

FIRST, SECOND = tokens(2, 14), tokens(2, 5, seed=5)


def hidden_end() -> tuple[Tensor, Tensor]:
    """Row 1 has 10 tokens in the first turn: what was fed behind them is hidden when the second comes."""
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, 10:14] = 0
    return mask, mask.cumsum(1)[:, 14:] - 1


def alone() -> Tensor:
    return torch.cat([FIRST[1:, :10], SECOND[1:]], 1)


def second_turn(model: Any, chunks: tuple[int, ...] = (5,)) -> tuple[Tensor, Tensor]:
    """Logits of the second turn of both rows, and what they should be."""
    mask, positions = hidden_end()
    with torch.no_grad():
        wanted = torch.cat([model(torch.cat([FIRST, SECOND], 1)[:1]).logits[:, 14:], model(alone()).logits[:, 10:]])
        cache, start, parts = model(FIRST, attention_mask=mask[:, :14] * 0 + 1, use_cache=True).past_key_values, 0, []
        for size in chunks:
            now = slice(start, start + size)
            call = {"attention_mask": mask[:, : 14 + start + size], "position_ids": positions[:, now]}
            parts.append(model(SECOND[:, now], past_key_values=cache, **call).logits)
            start += size
    return torch.cat(parts, 1), wanted


def refusal(model: Any, chunks: tuple[int, ...]) -> str:
    try:
        assert_close(*second_turn(model, chunks))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", DECODING)
def test_every_mechanism_obeys_or_refuses(name: str) -> None:
    for chunks in ((5,), (1, 1, 1, 2)):
        words = refusal(causal_lm(name), chunks)
        assert not words or (name in words and "new cache" in words)


@pytest.mark.parametrize("name", ["gqa", "mla", "shaw", "moba", "landmark", "combiner", "routing-transformer"])
def test_a_row_for_each_token_is_enough_to_obey(name: str) -> None:
    assert not refusal(causal_lm(name), (5,))


@pytest.mark.parametrize("settings", [{}, {"positions": "learned"}])
def test_the_shell_does_as_llama(settings: dict[str, Any]) -> None:
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    for model in (LlamaForCausalLM(config).double().eval(), causal_lm("softmax", **settings)):
        assert_close(*second_turn(model), rtol=1e-6, atol=1e-6)  # Llama turns in float32


def test_generate_goes_on_after_a_first_turn_of_two_lengths() -> None:
    model, (mask, _) = causal_lm("softmax", "moba"), hidden_end()
    with torch.no_grad():
        cache = model(FIRST, use_cache=True).past_key_values
    both = torch.cat([FIRST, SECOND], 1)
    found = generate(model, both, past_key_values=cache, attention_mask=mask)
    for row, ids in enumerate((both[:1], alone())):
        wanted = generate(model, ids)
        assert found.sequences[row, 19:].tolist() == wanted.sequences[0, ids.shape[1] :].tolist()
        assert_close(torch.stack(found.logits, 1)[row], torch.stack(wanted.logits, 1)[0])


def test_a_first_turn_padded_on_the_right_under_its_mask() -> None:
    """Nothing is new to the cache; a block counts real tokens all the same."""
    model, (mask, positions) = causal_lm("softmax", "nats"), hidden_end()
    with torch.no_grad():
        cache = model(FIRST, attention_mask=mask[:, :14], use_cache=True).past_key_values
        found = model(SECOND, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        assert_close(found[1:], model(alone()).logits[:, 10:])


@pytest.mark.parametrize("name", ["softmax", "moba"])
def test_hidden_and_shown_again(name: str) -> None:
    model, (mask, positions) = causal_lm(name), hidden_end()
    with torch.no_grad():
        cache = model(FIRST, use_cache=True).past_key_values
        model(SECOND[:, :2], attention_mask=mask[:, :16], position_ids=positions[:, :2], past_key_values=cache)
        cache.crop(-2)
        ones, usual = torch.ones_like(mask), torch.arange(14, 19).expand(2, -1)
        found = model(SECOND, attention_mask=ones, position_ids=usual, past_key_values=cache).logits
        assert_close(found, model(torch.cat([FIRST, SECOND], 1)).logits[:, 14:])


@pytest.mark.parametrize("name", ["softmax", "mswa"])
def test_taken_back_after_a_mask(name: str) -> None:
    model, (mask, positions) = causal_lm(name), hidden_end()
    with torch.no_grad():
        wanted = model(alone()).logits[:, 10:]
        cache = ManyheadsCache(2)
        cache.activate_past_recording()
        model(FIRST[:, :12], past_key_values=cache)
        try:
            cache.tell(mask[:, :12].bool())
        except ValueError:
            assert name == "mswa"  # its window has moved on
            return
        model(FIRST[:, 12:], attention_mask=mask[:, :14], past_key_values=cache)
        for _ in range(2):
            call = {"attention_mask": mask, "position_ids": positions}
            assert_close(model(SECOND, past_key_values=cache, **call).logits[1:], wanted)
            cache.crop(-5)


def test_a_refusal_leaves_every_layer_as_it_was() -> None:
    model, (mask, positions) = causal_lm("softmax", "aaren"), hidden_end()
    with torch.no_grad():
        cache = model(FIRST, use_cache=True).past_key_values
        kept = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=r"aaren.*running summary"):
            model(SECOND, attention_mask=mask, position_ids=positions, past_key_values=cache)
        found = (model(SECOND, past_key_values=c).logits for c in (cache, kept))
        assert_close(*found)


def test_a_short_convolution_refuses_only_what_it_holds() -> None:
    model, (mask, positions) = causal_lm("softmax", short_conv=3), hidden_end()
    with torch.no_grad():
        cache = model(FIRST, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"short convolution.*has dropped 12 tokens"):
            model(SECOND, attention_mask=mask, position_ids=positions, past_key_values=cache)
        # Tokens further back are out of its reach, and only the keys forget them: as under a dense mask.
        far = torch.ones_like(mask)
        far[1, 3:6] = 0
        dense = torch.ones(2, 1, 19, 19, dtype=torch.bool)
        dense[1, :, 14:, 3:6] = False
        usual = torch.arange(14, 19).expand(2, -1)
        found = model(SECOND, attention_mask=far, position_ids=usual, past_key_values=cache).logits
        assert_close(found, model(torch.cat([FIRST, SECOND], 1), attention_mask=dense).logits[:, 14:])


def test_a_short_convolution_moves_what_it_holds_whole() -> None:
    """Nothing was dropped yet, so that it sees real tokens only."""
    model, mask = causal_lm("softmax", short_conv=6), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]])
    with torch.no_grad():
        cache = model(FIRST[:, :4], use_cache=True).past_key_values
        ids = torch.cat([FIRST[:, :4], SECOND[:, :2]], 1)
        found = model(ids[:, 4:], attention_mask=mask, past_key_values=cache).logits
        assert_close(found[1:], model(ids[1:, [0, 1, 4, 5]]).logits[:, 2:])


def test_a_decoder_is_told_too() -> None:
    model, source = seq2seq("softmax"), tokens(2, 6, seed=9)
    mask, positions = hidden_end()
    with torch.no_grad():
        first = model(source, decoder_input_ids=FIRST, use_cache=True)
        call = {"decoder_attention_mask": mask, "decoder_position_ids": positions}
        found = model(source, decoder_input_ids=SECOND, past_key_values=first.past_key_values, **call).logits
        wanted = model(source[1:], decoder_input_ids=alone(), use_cache=False).logits[:, 10:]
        assert_close(found[1:], wanted)
