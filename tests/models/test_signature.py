"""forward and generate take what transformers' own models take, and do with it what these do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, causal_lm, randomised, seq2seq, tiny, tokens
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss, ForSequenceClassificationLoss
from transformers.utils.generic import find_labels

from manyheads.models import ManyheadsForCausalLM, ManyheadsForImageClassification, ManyheadsForSequenceClassification
from manyheads.models.byte_tokenizer import byte_tokenizer

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
PADDED = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])


def classifier(**settings: Any) -> Any:
    return randomised(ManyheadsForSequenceClassification(tiny("softmax", num_labels=3, **settings)))


def image_classifier(*names: str) -> Any:
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 3}
    return randomised(ManyheadsForImageClassification(tiny(*names, **sizes)))


# -- what forward is called with -------------------------------------------------------------------------------------


def test_what_tokenizers_and_older_callers_add_changes_nothing() -> None:
    ids = tokens(2, 7)
    more = {"token_type_ids": torch.zeros_like(ids), "cache_position": torch.arange(7)}
    lm, both = causal_lm("softmax"), seq2seq("softmax")
    for model in (lm, lm.model, classifier()):
        assert_close(model(ids, **more)[0], model(ids)[0], rtol=0, atol=0)
    for model in (both, both.model):
        assert_close(model(ids, decoder_input_ids=ids, **more)[0], model(ids, decoder_input_ids=ids)[0])
    found = lm.generate(ids, token_type_ids=more["token_type_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert found.equal(lm.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("items", [None, 20])
def test_labels_that_are_shifted_already(labelled: bool, items: int | None) -> None:
    """As Trainer gives them where a row is spread over devices, with labels beside them or without."""
    model, ids, shifted = causal_lm("softmax"), tokens(2, 7), tokens(2, 7, seed=1)
    shifted[:, -2:] = -100
    labels = {"labels": ids} if labelled else {}
    out = model(ids, shift_labels=shifted, num_items_in_batch=items, **labels)
    wanted = ForCausalLMLoss(out.logits, ids, VOCAB, shift_labels=shifted, num_items_in_batch=items)
    assert_close(out.loss.float(), wanted)


def test_no_other_argument_is_taken_and_trainer_looks_for_labels_alone() -> None:
    model = causal_lm("softmax")
    with pytest.raises(TypeError, match="unexpected keyword argument 'shift_lables'"):
        model(tokens(1, 3), shift_lables=tokens(1, 3))
    assert find_labels(ManyheadsForCausalLM) == ["labels"]


@pytest.mark.parametrize("images", [False, True])
def test_a_classifiers_loss_over_several_batches(images: bool) -> None:
    model, labels = (image_classifier("softmax") if images else classifier()), torch.tensor([2, 0])
    inputs = {"pixel_values": IMAGES} if images else {"input_ids": tokens(2, 7)}
    out = model(**inputs, labels=labels, num_items_in_batch=8)
    assert_close(out.loss, ForSequenceClassificationLoss(labels, out.logits, model.config, num_items_in_batch=8))
    assert_close(4 * out.loss, model(**inputs, labels=labels).loss)


# -- transformers' own cache -----------------------------------------------------------------------------------------

WHOLE = ["softmax", "gqa", "entmax"]


def fed(model: Any, ids: Tensor, mask: Tensor | None, cuts: list[int], cache: Any) -> Tensor:
    """The logits of parts fed one behind another, the same cache given with each."""
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :stop]
        out = model(ids[:, start:stop], seen, past_key_values=cache)
        assert out.past_key_values is cache
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("mask", [None, PADDED])
@pytest.mark.parametrize("name", WHOLE)
def test_a_dynamic_cache_is_filled_and_read(name: str, mask: Tensor | None) -> None:
    model, ids, cache = causal_lm(name, "softmax"), tokens(2, 7), DynamicCache()
    real = torch.ones(2, 7, dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad():
        wanted = model(ids, mask, use_cache=False).logits
        assert_close(fed(model, ids, mask, [4, 5], cache)[real], wanted[real])
        assert cache.get_seq_length() == 7
        assert cache.layers[1].keys.shape == (2, 4, 7, 4)
        cache.crop(-2)
        again = model(ids[:, 5:], mask, past_key_values=cache).logits
        assert_close(again[real[:, 5:]], wanted[:, 5:][real[:, 5:]])
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 1]))
        twice = model(ids[[1, 1], 6:], None if mask is None else mask[[1, 1]], past_key_values=cache).logits
        assert_close(twice[:, 0], wanted[[1, 1], 6])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_generate_with_a_dynamic_cache(options: dict[str, Any]) -> None:
    model, ids = causal_lm("softmax"), tokens(1, 7)
    both = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    cache = DynamicCache(config=model.config)
    found = model.generate(ids, past_key_values=cache, **both)
    assert found.equal(model.generate(ids, **both))
    assert cache.get_seq_length() == found.shape[1] - 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": ["softmax", "aaren"]}, "layer 1 remembers .*aaren"),
        ({"layers": [{"name": "mswa", "window": 4}]}, "layer 0 remembers .*mswa"),
        ({"short_conv": 3}, "layer 0 remembers the inputs of a short convolution"),
    ],
)
def test_a_dynamic_cache_is_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        causal_lm(**settings)(tokens(1, 3), past_key_values=DynamicCache())


def test_a_dynamic_cache_of_another_shape_is_refused() -> None:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(1, 4, 3, 4).double(), torch.randn(1, 4, 3, 4).double(), layer)
    with pytest.raises(ValueError, match=r"layer 0 has keys of \(1, 4, 3, 4\); gqa here has \[1 rows, 2 heads"):
        causal_lm("gqa")(tokens(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match=r"of 2 layers \(the model has 3\)"):
        causal_lm("softmax", num_hidden_layers=3)(tokens(1, 3), past_key_values=cache)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
@pytest.mark.parametrize(("mechanism", "heads"), [("softmax", 4), ("gqa", 2), ("mqa", 1)])
def test_prefix_tuning(mechanism: str, heads: int) -> None:
    """Prefixes are keys and values that stand before every layer's own, and are trained."""
    from peft import PrefixTuningConfig, get_peft_model

    base, ids = causal_lm(mechanism), tokens(2, 5)
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()
    prefix = model.prompt_encoder["default"].embedding.weight
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    out.loss.backward()
    assert bool((prefix.grad.abs().sum(1) > 0).all())
    cache = DynamicCache()
    rows = prefix.detach().view(3, 2, 2, heads, 4)  # token, layer, key or value, head, feature
    for layer in range(2):
        keys, values = (rows[:, layer, kind].transpose(0, 1)[None].repeat(2, 1, 1, 1) for kind in range(2))
        cache.update(keys, values, layer)
    assert_close(base(ids, past_key_values=cache).logits, out.logits)
    found = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0
    )
    assert found[:, 5].equal(out.logits[:, -1].argmax(-1))


# -- what is read beside the output ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "hedgehog", "based", "aaren"])
def test_generate_with_attentions(name: str) -> None:
    """A mechanism that gives no weights with a state generates without one, as transformers' models do when told to."""
    model, ids = causal_lm(name), tokens(2, 5)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    found = model.generate(ids, output_attentions=True, **options)
    assert found.sequences.equal(model.generate(ids, **options).sequences)
    whole = model(found.sequences[:, :-1], output_attentions=True, use_cache=False).attentions
    for step, layers in enumerate(found.attentions):
        for layer, wanted in zip(layers, whole, strict=True):
            assert_close(layer[:, :, -1], wanted[:, :, 4 + step, : 5 + step])


@pytest.mark.parametrize("name", ["softmax", "aaren", "hyena"])
def test_generates_from_embeddings(name: str) -> None:
    model, ids = causal_lm(name), tokens(2, 5)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **options)[:, 5:]
    assert model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options).equal(wanted)


def test_generate_stops_at_a_string() -> None:
    """transformers hands the tokenizer of stop strings on to forward."""
    model, ids, tokenizer = causal_lm("softmax", vocab_size=127), tokens(1, 5), byte_tokenizer(64)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [*range(33)]}
    stop = tokenizer.decode(model.generate(ids, **options)[0, 5:6])
    assert model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **options).shape == (1, 6)


@pytest.mark.parametrize("name", ["softmax", "hilo"])
def test_an_image_classifiers_hidden_states_keep_their_graph(name: str) -> None:
    model = image_classifier(name)
    out = model(IMAGES, output_hidden_states=True)
    for hidden in out.hidden_states:
        hidden.retain_grad()
    out.logits.sum().backward()
    assert all(hidden.grad is not None and bool(hidden.grad.abs().sum() > 0) for hidden in out.hidden_states)
    assert model.get_input_embeddings() is model.embed_patches


def test_quantised_while_loading(tmp_path: Path) -> None:
    from transformers import QuantoConfig

    model, ids = ManyheadsForCausalLM(tiny("softmax")).eval(), tokens(2, 5)
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))
    assert type(found.model.stack.layers[0].self_attn.mechanism.q_proj).__name__ == "QLinear"
    assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=0.03)
