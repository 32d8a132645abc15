"""Decoding with the cache equals recomputing from scratch, for every registered mechanism that can decode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import causal_lm, of_tokens, seq2seq, single_source, spec, tokens
from torch import Tensor
from torch.testing import assert_close

from manyheads import card
from manyheads.models import ManyheadsCache

CAUSAL = of_tokens("causal-self")
DECODING = [name for name in CAUSAL if card(name).decodes]
CROSS = [name for name in of_tokens("causal-cross") if single_source(name)]
NEW = 7


def generate(model: Any, inputs: Tensor, **options: Any) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    settings["pad_token_id"] = 0
    return model.generate(inputs, **{**settings, **options})


def by_hand(model: Any, ids: Tensor, count: int = NEW) -> tuple[Tensor, Tensor]:
    """Greedy, every step a whole pass without cache: sequences and logits [b, count, vocabulary]."""
    rows = []
    for _ in range(count):
        with torch.no_grad():
            rows.append(model(ids, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, rows[-1].argmax(-1, keepdim=True)], 1)
    return ids, torch.stack(rows, 1)


def chosen(model: Any, sequences: Tensor, start: int, count: int = NEW) -> Tensor:
    """That one whole pass without cache would have chosen, greedily, the `count` tokens from `start` on: its logits for
    them. (That it is for every token the pass over those before it, test_greedy holds.)"""
    assert sequences.shape[1] == start + count
    with torch.no_grad():
        logits = model(sequences, use_cache=False).logits[:, start - 1 : -1]
    assert logits.argmax(-1).tolist() == sequences[:, start:].tolist()
    return logits


def with_convolution(name: str) -> Any:
    return causal_lm(name, short_conv=3)


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy(name: str) -> None:
    model, ids = with_convolution(name), tokens(2, 5)
    wanted, logits = by_hand(model, ids)
    found = generate(model, ids)
    assert found.sequences.tolist() == wanted.tolist()
    # generate casts logits to float32
    assert_close(torch.stack(found.logits, 1), logits.float())
    assert (found.past_key_values is not None) == card(name).decodes


@pytest.mark.parametrize("name", DECODING)
def test_passes_with_a_cache(name: str) -> None:
    """A prompt, a chunk and single tokens give the logits of one pass."""
    model, ids = causal_lm(name, short_conv=2), tokens(2, 12)
    cache, parts = None, []
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 9), (9, 10), (10, 12)):
            out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits)
    assert cache.get_seq_length() == 12
    assert cache.nbytes == sum(s.nbytes for y in cache.layers for m in y.memories for s in m.states.values()) > 0


@pytest.mark.parametrize("name", DECODING)
def test_beams(name: str) -> None:
    model, ids = with_convolution(name), tokens(2, 5)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "length_penalty": 0.0}
    found, wanted = generate(model, ids, **options), generate(model, ids, use_cache=False, **options)
    assert found.sequences.tolist() == wanted.sequences.tolist()
    assert_close(found.sequences_scores, wanted.sequences_scores)
    assert wanted.past_key_values is None
    reordered = wanted.beam_indices[:, : NEW - 1] != wanted.beam_indices[:, 1:NEW]
    assert bool(reordered.any()), "no beam was ever reordered: the test shows nothing"


@pytest.mark.parametrize("name", DECODING)
def test_left_padding(name: str) -> None:
    model, lengths = with_convolution(name), (3, 6, 1)
    rows = [tokens(1, length, seed=length) for length in lengths]
    padded = torch.cat([torch.nn.functional.pad(row, (max(lengths) - row.shape[1], 0), value=0) for row in rows])
    found = generate(model, padded, attention_mask=(padded != 0).long())
    for i, row in enumerate(rows):
        answered = torch.cat([row, found.sequences[i : i + 1, max(lengths) :]], 1)
        logits = chosen(model, answered, row.shape[1])
        assert_close(torch.stack(found.logits, 1)[i], logits[0].float())


@pytest.mark.parametrize("name", ["softmax", "shaw", "mega"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_left_padding_in_calls(name: str, positions: str) -> None:
    """Without position ids, they follow the mask: in one pass and in two."""
    model, ids = causal_lm(name, short_conv=2, positions=positions), tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        assert_close(model(padded, mask, use_cache=False).logits[:, 3:], wanted)
        first = model(padded[:, :5], mask[:, :5])
        rest = model(padded[:, 5:], mask, past_key_values=first.past_key_values).logits
        assert_close(torch.cat([first.logits[:, 3:], rest], 1), wanted)


@pytest.mark.parametrize("name", DECODING)
def test_second_turn(name: str) -> None:
    model = with_convolution(name)
    first = generate(model, tokens(2, 4))
    longer = torch.cat([first.sequences, tokens(2, 3, seed=5)], 1)
    kept = copy.deepcopy(first.past_key_values)
    options = {"attention_mask": torch.ones_like(longer)}
    found = generate(model, longer, past_key_values=first.past_key_values, **options).sequences
    assert found[:, : longer.shape[1]].tolist() == longer.tolist()
    chosen(model, found, longer.shape[1])
    again = generate(model, longer, past_key_values=kept, prefill_chunk_size=2, **options)
    assert again.sequences.tolist() == found.tolist()


@pytest.mark.parametrize("name", ["softmax", "gqa", "aaren", "based"])
def test_second_turn_of_two_lengths(name: str) -> None:
    """Padding between the turns of a conversation; the first pass knew nothing of it. (A window, a block or a kernel
    counts padding between tokens as places: no contract covers that.)"""
    model, first, second = causal_lm(name), tokens(2, 9), tokens(2, 4, seed=5)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, 9:11] = 0
    with torch.no_grad():
        cache = model(first, use_cache=True).past_key_values
    found = generate(model, torch.cat([first, second], 1), past_key_values=cache, attention_mask=mask)
    wanted, logits = by_hand(model, torch.cat([first[1:], second[1:, 2:]], 1))
    assert found.sequences[1, 13:].tolist() == wanted[0, 11:].tolist()
    assert_close(torch.stack(found.logits, 1)[1], logits[0].float())


@pytest.mark.parametrize("name", DECODING)
def test_assisted(name: str) -> None:
    """Guesses that turn out wrong are taken back: by truncating, or by going back and passing what stays again."""
    model = with_convolution(name)
    ids = torch.cat([tokens(1, 4), tokens(1, 4)], 1)
    options = {"max_new_tokens": 9, "output_logits": False}
    wanted = generate(model, ids, prompt_lookup_num_tokens=3, **options).sequences
    assert wanted[:, :8].tolist() == ids.tolist()
    chosen(model, wanted, 8, 9)
    helper = copy.deepcopy(model)
    with torch.no_grad():
        helper.lm_head.weight.add_(0.3 * torch.randn_like(helper.lm_head.weight))
    found = generate(model, ids, assistant_model=helper, **options)
    assert found.sequences.tolist() == wanted.tolist()


@pytest.mark.parametrize("name", DECODING)
def test_crop(name: str) -> None:
    model, ids = with_convolution(name), tokens(1, 14)
    cache = ManyheadsCache(2)
    cache.activate_past_recording()
    with torch.no_grad():
        for start, stop in ((0, 6), (6, 7), (7, 12)):
            model(ids[:, start:stop], past_key_values=cache)
        cache.crop(-3)
        assert cache.get_seq_length() == 9
        model(ids[:, 9:11], past_key_values=cache)
        cache.crop(-1)
        last = model(ids[:, 10:], past_key_values=cache).logits
        assert_close(last, model(ids, use_cache=False).logits[:, 10:])


def test_crop_over_many_passes() -> None:
    """What a window dropped, and moved about to make room, is put back."""
    model, ids = with_convolution("mswa"), tokens(1, 40)
    for last in range(20, 36):
        cache = ManyheadsCache(2)
        cache.activate_past_recording()
        with torch.no_grad():
            for start, stop in ((0, 10), *((t, t + 1) for t in range(10, last))):
                model(ids[:, start:stop], past_key_values=cache)
            cache.crop(-9)
            found = model(ids[:, last - 9 : last], past_key_values=cache).logits
            assert_close(found, model(ids[:, :last], use_cache=False).logits[:, -9:])


def test_crop_that_cannot_be_done() -> None:
    model, cache = causal_lm("aaren"), ManyheadsCache(2)
    with torch.no_grad():
        model(tokens(1, 4), past_key_values=cache)
    with pytest.raises(ValueError, match=r"aaren.*activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(2)


def test_sampling() -> None:
    model, ids = causal_lm("softmax", "aaren"), tokens(2, 4)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        runs.append(generate(model, ids, do_sample=True, top_k=5, use_cache=use_cache).sequences.tolist())
    assert runs[0] == runs[1]


def test_several_sequences_for_one_prompt() -> None:
    model, ids = causal_lm("gqa"), tokens(1, 4)
    torch.manual_seed(0)
    assert generate(model, ids, do_sample=True, num_return_sequences=3).sequences.shape == (3, 4 + NEW)


def test_cache_rows_can_be_repeated_and_chosen() -> None:
    model, ids = with_convolution("mswa"), tokens(2, 5)
    cache = ManyheadsCache(2)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        nxt = tokens(2, 1, seed=1)
        found = model(nxt, past_key_values=cache).logits
        assert_close(found, model(torch.cat([ids, nxt], 1), use_cache=False).logits[:, -1:])
    cache.reset()
    assert cache.get_seq_length() == 0


def test_learned_positions_count_on_from_the_cache() -> None:
    model, ids = causal_lm("softmax", positions="learned"), tokens(2, 5)
    wanted, _ = by_hand(model, ids)
    assert generate(model, ids).sequences.tolist() == wanted.tolist()
    with pytest.raises(ValueError, match=r"65 tokens.*max_position_embeddings=64"):
        model(tokens(1, 65))


@pytest.mark.parametrize("cross", CROSS)
def test_encoder_decoder(cross: str) -> None:
    model = seq2seq(cross, short_conv=2)
    ids, mask = tokens(2, 6), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    encoder_calls = []
    model.model.encoder.register_forward_hook(lambda *_: encoder_calls.append(1))
    found = generate(model, ids, attention_mask=mask)
    assert len(encoder_calls) == 1
    assert found.sequences.shape == (2, 1 + NEW)
    assert found.sequences[:, 0].tolist() == [1, 1]
    with torch.no_grad():
        logits = model(ids, mask, decoder_input_ids=found.sequences[:, :-1], use_cache=False).logits
    assert logits.argmax(-1).tolist() == found.sequences[:, 1:].tolist()
    alone = generate(model, ids[1:, :4])
    assert alone.sequences[0].tolist() == found.sequences[1].tolist()
    beams = [generate(model, ids, attention_mask=mask, num_beams=3, use_cache=c).sequences for c in (True, False)]
    assert beams[0].tolist() == beams[1].tolist()
    guessed = generate(model, ids[:1], prompt_lookup_num_tokens=2, output_logits=False)
    assert guessed.sequences[0].tolist() == found.sequences[0].tolist()


def test_beams_behind_an_encoder_with_an_auxiliary_loss() -> None:
    """The encoder's loss has no row for each beam."""
    model, ids = seq2seq("softmax", layers=[spec("moh")]), tokens(2, 6)
    beams = [generate(model, ids, num_beams=3, use_cache=cache).sequences for cache in (True, False)]
    assert beams[0].tolist() == beams[1].tolist()
    with torch.no_grad():
        read = model.model.encoder(ids)
    assert read.aux_loss is not None
    given = generate(model, None, encoder_outputs=read, num_beams=3).sequences
    assert given.tolist() == beams[0].tolist()


def test_left_padded_encoder() -> None:
    model = seq2seq("softmax")
    ids = tokens(1, 4)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    found = generate(model, padded, attention_mask=(padded != 0).long())
    assert found.sequences.tolist() == generate(model, ids).sequences.tolist()
