"""Models pass what layers take by name: per token, over passes, through generate, in packed rows, or refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import causal_lm, randomised, tiny, tokens
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

from manyheads.models import ManyheadsForCausalLM, ManyheadsForSeq2SeqLM, ManyheadsForSequenceClassification

MIXED = ["mixture-of-transformers", "softmax"]


def kinds(rows: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(3, (rows, n), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> Any:
    return causal_lm(*MIXED)


def blocks_by_hand(model: Any, ids: Tensor, of: Tensor) -> Tensor:
    x = model.model.embed_tokens(ids)
    for block, given in zip(model.model.stack.layers, ({"token_kinds": of}, {}), strict=True):
        x = x + block.self_attn.mechanism(block.self_attn.norm(x), **given).output
        x = x + block.mlp(x)
    return model.lm_head(model.model.stack.norm(x))


@torch.no_grad()
def test_only_the_layers_that_take_it_are_given_it(model: Any) -> None:
    ids, of = tokens(2, 9), kinds(2, 9)
    out = model(ids, token_kinds=of).logits
    assert_close(out, blocks_by_hand(model, ids, of))
    assert (out - model(ids, token_kinds=kinds(2, 9, seed=1)).logits).abs().max() > 1e-3


@torch.no_grad()
def test_a_second_turn_is_given_its_own_tokens(model: Any) -> None:
    ids, of = tokens(2, 9), kinds(2, 9)
    first = model(ids[:, :5], token_kinds=of[:, :5], use_cache=True)
    second = model(ids[:, 5:], token_kinds=of[:, 5:], past_key_values=first.past_key_values)
    assert_close(torch.cat([first.logits, second.logits], 1), model(ids, token_kinds=of).logits)
    with pytest.raises(ValueError, match=r"token_kinds: got \[2, 9\] on cpu; want a tensor \[2, 1\] and more"):
        model(ids[:, :1], token_kinds=of, past_key_values=second.past_key_values)


@torch.no_grad()
def test_passes_that_are_taken_back_are_repeated_with_their_kinds() -> None:
    """A recurrence cannot be cut: it goes back to where the pass began, and takes the tokens that stay again."""
    model = causal_lm("mixture-of-transformers", "h3")
    ids, of = tokens(2, 9), kinds(2, 9)
    cache = model(ids[:, :3], token_kinds=of[:, :3], use_cache=True).past_key_values
    cache.activate_past_recording()
    model(ids[:, 3:8], token_kinds=of[:, 3:8], past_key_values=cache)
    cache.crop(-2)
    last = model(ids[:, 6:], token_kinds=of[:, 6:], past_key_values=cache).logits
    assert_close(last, model(ids, token_kinds=of).logits[:, 6:])


@torch.no_grad()
def test_left_padding_may_be_of_any_kind(model: Any) -> None:
    ids, of = tokens(2, 9), kinds(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    out = model(ids, mask, token_kinds=of.masked_fill(mask == 0, -100)).logits
    assert_close(out[0], model(ids[:1], token_kinds=of[:1]).logits[0])
    assert_close(out[1, 4:], model(ids[1:, 4:], token_kinds=of[1:, 4:]).logits[0])


@torch.no_grad()
def test_packed_documents_keep_their_kinds(model: Any) -> None:
    ids, of, lengths = tokens(1, 12), kinds(1, 12), [5, 1, 6]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    out = model(ids, position_ids=places, token_kinds=of, use_cache=False).logits
    alone = [model(i, token_kinds=k).logits for i, k in zip(ids.split(lengths, 1), of.split(lengths, 1), strict=True)]
    assert_close(out, torch.cat(alone, 1))


@pytest.mark.parametrize("how", [{"use_cache": True}, {"use_cache": False}, {"num_beams": 2}])
@torch.no_grad()
def test_what_is_generated_goes_on_in_the_kind_of_the_last_token(model: Any, how: dict[str, Any]) -> None:
    ids, of, mask = tokens(2, 6), kinds(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    found = model.generate(
        ids, attention_mask=mask, token_kinds=of, max_new_tokens=4, do_sample=False, eos_token_id=None, **how
    )
    if "num_beams" in how:
        return assert_close(found[:, :6], ids)
    for row, start in ((0, 0), (1, 2)):
        so_far, kind = ids[row : row + 1, start:], of[row : row + 1, start:]
        for _ in range(4):
            best = model(so_far, token_kinds=kind).logits[:, -1].argmax(-1)
            so_far, kind = torch.cat([so_far, best[None]], 1), torch.cat([kind, kind[:, -1:]], 1)
        assert found[row, start:].equal(so_far[0])
    return None


@torch.no_grad()
def test_a_second_turn_of_generate_is_given_the_kinds_of_all(model: Any) -> None:
    ids, of, how = tokens(1, 8), kinds(1, 8), {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    cache = model(ids[:, :5], token_kinds=of[:, :5], use_cache=True).past_key_values
    wanted = model.generate(ids, token_kinds=of, **how)
    assert model.generate(ids, token_kinds=of, past_key_values=cache, **how).equal(wanted)
    cache = model(ids[:, :5], token_kinds=of[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"token_kinds is \[1, 3\]; want one for each of the 8 tokens"):
        model.generate(ids, token_kinds=of[:, 5:], past_key_values=cache, **how)


def test_gradients_through_checkpointed_layers_are_those_without(model: Any) -> None:
    ids, of, found = tokens(2, 7), kinds(2, 7), []
    for again in (False, True):
        one = causal_lm(*MIXED)
        one.load_state_dict(model.state_dict())
        if again:
            one.activation_checkpointing_enable()
        one.train()
        one(ids, labels=ids, token_kinds=of).loss.backward()
        found.append([p.grad for p in one.parameters()])
    assert_close(found[0], found[1])


@torch.no_grad()
def test_classifiers_pass_them_too() -> None:
    model = randomised(ManyheadsForSequenceClassification(tiny(*MIXED)))
    ids, of, mask = tokens(2, 7), kinds(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    out = model(ids, mask, token_kinds=of).logits
    assert_close(out[1:], model(ids[1:, :5], token_kinds=of[1:, :5]).logits)
    assert (out - model(ids, mask, token_kinds=of * 0).logits).abs().max() > 1e-4


def shortcut(**settings: Any) -> Any:
    return causal_lm(
        layers=["softmax", "softmax", {"name": "layer-shortcuts", "layers": 2}], num_hidden_layers=3, **settings
    )


@torch.no_grad()
def test_the_last_layer_is_given_the_outputs_of_those_below() -> None:
    model, ids = shortcut(), tokens(2, 8)
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    last, x = model.model.stack.layers[2], states[2]
    earlier = torch.stack(states[1:3], 2)
    x = x + last.self_attn.mechanism(last.self_attn.norm(x), earlier=earlier).output
    assert_close(model.model.stack.norm(x + last.mlp(x)), states[3])


@torch.no_grad()
def test_the_layers_below_are_remembered_over_passes_padding_and_documents() -> None:
    model, ids, mask = shortcut(), tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    whole = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    assert_close(model(ids[:, 5:], past_key_values=first.past_key_values).logits, whole[:, 5:])
    mask[1, :3] = 0
    assert_close(model(ids, mask).logits[1, 3:], model(ids[1:, 3:]).logits[0])
    places = torch.cat([torch.arange(5), torch.arange(3)])[None]
    packed = model(ids[:1], position_ids=places, use_cache=False).logits
    assert_close(packed, torch.cat([whole[:1, :5], model(ids[:1, 5:]).logits], 1))
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    assert model.generate(ids, **how).equal(model.generate(ids, use_cache=False, **how))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_the_layers_below_through_checkpoints(reentrant: bool) -> None:
    ids, found, model = tokens(2, 7), [], shortcut()
    for again in (False, True):
        one = shortcut()
        one.load_state_dict(model.state_dict())
        if again:
            one.activation_checkpointing_enable({"use_reentrant": reentrant})
            one.enable_input_require_grads()
        one.train()
        one(ids, labels=ids).loss.backward()
        found.append([p.grad for p in one.parameters()])
    assert_close(found[0], found[1])


def test_another_number_of_layers_below_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer-shortcuts: earlier is \[2, 4, 1, 16\].*want \[2, 4, 2, 16\]"):
        causal_lm(layers=["softmax", {"name": "layer-shortcuts", "layers": 2}])(tokens(2, 4))
    with pytest.raises(ValueError, match="layer 0, layer-shortcuts, takes the outputs of the layers below"):
        causal_lm(layers=["layer-shortcuts"])(tokens(2, 4))


def test_what_is_missing_or_too_much_is_refused(model: Any) -> None:
    ids, of = tokens(2, 7), kinds(2, 7)
    with pytest.raises(ValueError, match=r"layer 0, mixture-of-transformers, takes token_kinds \(\[b, n\] integers"):
        model(ids)
    with pytest.raises(ValueError, match="token_kinds was given, and no layer takes it"):
        causal_lm("softmax")(ids, token_kinds=of)
    with pytest.raises(ValueError, match="boxes was given, and no layer takes it"):
        model.model(ids, token_kinds=of, boxes=of)
    with pytest.raises(ValueError, match="token_kinds go from 0 to 7; want 0 to 2"):
        model(ids, token_kinds=of.masked_fill(of == 1, 7))
    with pytest.raises(ValueError, match=r"token_kinds: got list; want a tensor \[2, 7\]"):
        model(ids, token_kinds=of.tolist())
    with pytest.raises(ValueError, match="layer 0 remembers what it is told of tokens beside them"):
        model(ids, token_kinds=of, past_key_values=DynamicCache())
    both = ManyheadsForSeq2SeqLM(tiny("mixture-of-transformers", is_encoder_decoder=True)).double()
    with pytest.raises(ValueError, match="mixture-of-transformers, takes token_kinds"):
        both(ids, decoder_input_ids=ids)


def test_a_place_where_nothing_is_passed_is_refused_when_the_model_is_built() -> None:
    with pytest.raises(ValueError, match=r"layers\[0\]: back-attention takes higher"):
        ManyheadsForCausalLM(tiny("back-attention"))


@pytest.mark.parametrize("top_k", [None, 2])
@torch.no_grad()
def test_boxes_reach_the_layers_that_read_pages(top_k: int | None) -> None:
    skim = {"name": "skim", "side_dim": 6, "places": 20, "top_k": top_k}
    model = randomised(ManyheadsForSequenceClassification(tiny("softmax", layers=[skim, "softmax"])))
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    boxes = torch.randint(10, (2, 7, 4), generator=torch.Generator().manual_seed(0))
    boxes[..., 2:] += 9  # the right and the lower end
    mask[1, 5:], boxes[1, 5:] = 0, -1
    out = model(ids, mask, boxes=boxes).logits
    assert_close(out[1:], model(ids[1:, :5], boxes=boxes[1:, :5]).logits)
    assert (out[:1] - model(ids[:1], boxes=boxes[:1] // 2).logits).abs().max() > 1e-4
    with pytest.raises(ValueError, match="layer 0, skim, takes boxes"):
        model(ids, mask)
    with pytest.raises(ValueError, match=r"boxes: got \[1, 7, 4\] on cpu; want a tensor \[2, 7\] and more"):
        model(ids, boxes=boxes[:1])


@pytest.mark.parametrize("over", ["last", "mean"])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_a_pooling_is_given_the_outputs_of_all_layers(over: str, causal: bool) -> None:
    pooling = {"name": "multi-layer-pooling", "layers": 3, "latents": 2, "over": over}
    model = randomised(ManyheadsForSequenceClassification(tiny(num_hidden_layers=3, pooling=pooling, is_causal=causal)))
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    out = model(ids, mask, output_hidden_states=True)
    assert model(ids, mask).hidden_states is None
    below = torch.stack(out.hidden_states[1:3], 2)
    wanted = model.pooling.mechanism(out.hidden_states[3], mask=mask.bool(), earlier=below).output
    assert_close(out.logits, model.classifier(wanted))
    assert_close(out.logits[1:], model(ids[1:, 3:]).logits)
