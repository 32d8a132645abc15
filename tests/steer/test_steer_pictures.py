"""Interventions on models that read pictures: neutral settings, rules against loops, uneven rows, decoding, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest
import torch
from tiny_pictures import IMAGE, PATCHES, clip, llava, row_of, shown
from torch import Tensor
from torch.testing import assert_close

from manyheads.hosts.taps import record
from manyheads.steer import find_sink_dims, redistribute
from manyheads.steer.agla import agla, local_view, relevance_map
from manyheads.steer.causal_maps import causal_maps, counterfactual
from manyheads.steer.control import _energy, box_region, control
from manyheads.steer.gem import gem, word_maps
from manyheads.steer.imbalance import imbalance, salient_tokens
from manyheads.steer.method import Prompt, methods
from manyheads.steer.modality_mutual import modality_mutual
from manyheads.steer.pictures import blind, image_places
from manyheads.steer.vision_heads import head_divergence, vision_heads

WORDS = [[7, 8, 9], [10, 11, 12, 13, 14]]
Opened = Callable[[Any, dict[str, Tensor]], AbstractContextManager[Any]]


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def behind_image(inputs: dict[str, Tensor]) -> Tensor:
    places = torch.arange(inputs["input_ids"].shape[1])
    last = ((inputs["input_ids"] == IMAGE) * (places + 1)).amax(-1, keepdim=True)
    return places >= last


def hooks_of(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def half_box(model: Any, inputs: dict[str, Tensor]) -> AbstractContextManager[Any]:
    return control(model, inputs, box_region("0,0,0.5,1", 4, 4), lr=2.0, steps=2)


def half_view(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return local_view(inputs["pixel_values"], relevance_map(model, inputs), 0.5)


STRONG: dict[str, Opened] = {
    "agla": lambda model, inputs: agla(model, half_view(model, inputs), beta=0.0),
    "causal_maps": lambda model, inputs: causal_maps(model, 0.5, language="uniform", eps=0.0),
    "control": half_box,
    "imbalance": lambda model, inputs: imbalance(model, inputs, 0.9),
    "modality_mutual": lambda model, inputs: modality_mutual(model, inputs["input_ids"] == IMAGE, behind_image(inputs)),
    "redistribute": lambda model, inputs: redistribute(
        model, inputs["input_ids"] == IMAGE, 0.6, sink_dims=[0, 1], threshold=1.0, centric=0.0, least=0.0
    ),
    "vision_heads": lambda model, inputs: vision_heads(model, inputs),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return llava()


@pytest.mark.parametrize("name", [own.name for own in methods("vision-language") if own.name in STRONG])
def test_neutral_settings_and_errors_leave_the_model_as_it_was(model: Any, name: str) -> None:
    chosen = next(own for own in methods("vision-language") if own.name == name)
    inputs = shown(WORDS[:1])
    spans = {"image": (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()}
    wanted, hooks = logits(model, inputs), hooks_of(model)
    given = {"sink_dims": "0"} if name == "redistribute" else {}
    with chosen.open(model, Prompt(inputs, spans), **given, **chosen.neutral):
        assert_close(logits(model, inputs), wanted, atol=0, rtol=0)
    with suppress(KeyError), STRONG[name](model, inputs):
        assert float((logits(model, inputs) - wanted)[:, -1].abs().max()) > 1e-4
        raise KeyError("inside")
    assert_close(logits(model, inputs), wanted, atol=0, rtol=0)
    assert "forward" not in model.__dict__
    assert "_supports_mm_encoder_outputs" not in model.__dict__
    assert hooks_of(model) == hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", STRONG)
def test_uneven_rows_are_answered_as_each_alone(model: Any, name: str) -> None:
    inputs = shown(WORDS)
    with STRONG[name](model, inputs), torch.no_grad():
        given = logits(model, inputs)[:, -1]
        told = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, -4:]
    for row in range(2):
        own = row_of(inputs, row)
        with STRONG[name](model, own), torch.no_grad():
            alone = model.generate(**own, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, -4:]
            assert_close(given[row], logits(model, own)[0, -1], atol=2e-3, rtol=2e-3)
        assert told[row].tolist() == alone.tolist()


@pytest.mark.parametrize("name", STRONG)
def test_generate_reads_what_a_call_reads(model: Any, name: str) -> None:
    """It encodes pictures before it calls, which the other runs of a call must not take for theirs."""
    inputs = shown(WORDS[:1])
    with STRONG[name](model, inputs):
        wanted = logits(model, inputs)[:, -1]
        out = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert_close(out.logits[0], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", STRONG)
def test_decoding_with_a_cache_equals_reading_at_once(model: Any, name: str) -> None:
    """The prompt, one token, then a second turn of two, in a block that was opened for the prompt."""
    inputs, more = shown(WORDS[:1]), torch.tensor([[20, 21, 22]])
    whole = dict(inputs) | {
        "input_ids": torch.cat([inputs["input_ids"], more], 1),
        "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 3, dtype=torch.long),
    }
    length = inputs["input_ids"].shape[1]
    with STRONG[name](model, inputs), torch.no_grad():
        wanted = model(**whole, use_cache=False).logits[:, length - 1 :]
        out = model(**inputs, use_cache=True)
        found, cache = [out.logits[:, -1:]], out.past_key_values
        for part in (more[:, :1], more[:, 1:]):
            mask = torch.ones(1, cache.get_seq_length() + part.shape[1], dtype=torch.long)
            found.append(model(input_ids=part, attention_mask=mask, past_key_values=cache).logits)
    assert_close(torch.cat(found, 1), wanted, atol=1e-3, rtol=1e-3)


def test_a_blind_prompt_is_the_prompt_without_its_image_tokens(model: Any) -> None:
    inputs = shown(WORDS)
    given = logits(model, blind(model, inputs, "test"))
    for row, words in enumerate(WORDS):
        wanted = logits(model, {"input_ids": torch.tensor([[5, 6, *words]])})
        assert_close(given[row, -len(words) :], wanted[0, -len(words) :], atol=1e-4, rtol=1e-4)


def test_sink_dimensions_are_found(model: Any) -> None:
    """Two tokens are given a huge entry in one dimension, and keys that everything attends to."""
    other = llava()
    inputs = shown(WORDS[:1])
    with torch.no_grad():
        other.model.language_model.embed_tokens.weight[5] *= 0.01
        other.model.language_model.embed_tokens.weight[5, 11] = 60.0
        for layer in other.model.language_model.layers:
            query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
            query.mul_(0.05)
            key[:, 11] = 3.0
            query.add_(0.05)
    assert find_sink_dims(other, inputs, count=1) == [11]


def planted(inputs: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """A model in float64, and the last place's output per head in every layer without the picture."""
    model = llava().double()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad(), record(model, stack="language") as calls:
        model(input_ids=torch.tensor([[5, 6, *WORDS[0]]]))
    return model, torch.stack([call.output[:, :, -1] for call in calls], 1)


def test_divergence_and_reinforcement_against_loops() -> None:
    inputs = shown(WORDS[:1])
    model, without = planted(inputs)
    with torch.no_grad(), record(model, stack="language") as calls:
        model(**inputs)
    outputs = torch.stack([call.output[:, :, -1] for call in calls], 1)
    wanted = torch.zeros(1, 4, 4, dtype=torch.float64)
    for layer in range(4):
        for head in range(4):
            pairs = zip(outputs[0, layer, head], without[0, layer, head], strict=True)
            wanted[0, layer, head] = sum(float(a - b) ** 2 for a, b in pairs) ** 0.5
    assert_close(head_divergence(model, inputs), wanted, atol=1e-9, rtol=1e-7)
    block = vision_heads(model, inputs, 2.0, filtered=False)
    with block as chosen, torch.no_grad(), record(model, stack="language") as after:
        model(**inputs)
    assert chosen.sum(-1).tolist() == [[2, 2, 2, 2]]
    assert set(wanted[0, 0].topk(2).indices.tolist()) == set(chosen[0, 0].nonzero()[:, 0].tolist())
    for head in range(4):
        factor = 2.0 if chosen[0, 0, head] else 1.0
        assert_close(after[0].output[0, head, -1], factor * outputs[0, 0, head], atol=1e-9, rtol=1e-7)
    assert_close(after[0].output[:, :, :-1], calls[0].output[:, :, :-1], atol=1e-9, rtol=1e-7)


def test_a_loud_head_that_is_louder_without_the_picture_is_not_chosen() -> None:
    """Of four heads one differs by far; it is filtered where it shrinks with the picture, and kept where it grows."""
    inputs = shown(WORDS[:1])
    model, without = planted(inputs)
    seen = head_divergence(model, inputs)
    with vision_heads(model, inputs, share=0.25, filtered=True) as chosen:
        pass
    with torch.no_grad(), record(model, stack="language") as calls:
        model(**inputs)
    own = calls[0].output[0, :, -1].norm(dim=-1)
    far = seen[0, 0] > seen[0, 0].mean() + seen[0, 0].std()
    kept = seen[0, 0].masked_fill(far & (without[0, 0].norm(dim=-1) > own), 0)
    assert int(chosen[0, 0].float().argmax()) == int(kept.argmax())


def test_raised_scores_against_loops() -> None:
    inputs = shown(WORDS[:1])
    model, _ = planted(inputs)
    salient = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    salient[0, [3, 4, 9]] = True
    with torch.no_grad(), record(model, layers=[1], stack="language") as calls:
        model(**inputs)
    rule = imbalance(model, inputs, 0.9, beta=0.3, gamma=1.0, salient=salient, layers=[1])
    with rule, torch.no_grad(), record(model, layers=[1], stack="language") as after:
        model(**inputs)
    call, m = calls[0], inputs["input_ids"].shape[1]
    for h in range(4):
        z = [float(call.query[0, h, -1] @ call.key[0, h // 2, j]) * 8**-0.5 for j in range(m)]
        for j in range(m):
            if salient[0, j]:
                z[j] += 0.9 * abs(z[j])
            elif inputs["input_ids"][0, j] == IMAGE:
                z[j] += 0.3 * abs(z[j])
        top = max(z)
        weights = [math.exp(each - top) for each in z]
        total = sum(weights)
        wanted = sum((w / total * call.value[0, h // 2, j] for j, w in enumerate(weights)), torch.zeros(8).double())
        assert_close(after[0].output[0, h, -1], wanted, atol=1e-6, rtol=1e-5)
    assert_close(after[0].output[:, :, :-1], call.output[:, :, :-1], atol=0, rtol=0)


def test_guidance_takes_off_what_the_text_says_alone(model: Any) -> None:
    inputs = shown(WORDS[:1])
    with imbalance(model, inputs, 0.0, beta=0.0, gamma=1.5):
        given = logits(model, inputs)[0, -1]
    own = logits(model, inputs)[0, -1].log_softmax(-1)
    alone = logits(model, {"input_ids": torch.tensor([[5, 6, *WORDS[0]]])})[0, -1].log_softmax(-1)
    assert_close(given, 1.5 * own - 0.5 * alone, atol=1e-4, rtol=1e-4)


def test_salient_tokens_are_those_the_class_token_looks_at(model: Any) -> None:
    inputs = shown(WORDS)
    found = salient_tokens(model, inputs, 0.25)
    with torch.no_grad(), record(model, stack="vision") as calls:
        model(**inputs)
    looks = calls[1].weights()[:, :, 0, 1:].mean(1)  # features are the second layer's
    for row in range(2):
        image = (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0]
        assert set(found[row].nonzero()[:, 0].tolist()) == set(image[looks[row].topk(4).indices].tolist())


def test_agla_adds_the_local_view_and_cuts(model: Any) -> None:
    inputs = shown(WORDS[:1])
    local = local_view(inputs["pixel_values"], relevance_map(model, inputs), 0.4)
    with agla(model, local, 2.0, beta=0.5):
        given = logits(model, inputs)[0, -1]
    own, other = logits(model, inputs)[0, -1], logits(model, {**inputs, "pixel_values": local})[0, -1]
    for token in range(own.numel()):
        wanted = float(own[token] + 2 * other[token])
        if float(own[token]) < math.log(0.5) + float(own.max()):
            wanted = -math.inf
        assert float(given[token]) == pytest.approx(wanted, abs=1e-3)


def test_a_local_view_keeps_what_the_map_points_at() -> None:
    pixels = torch.rand(1, 3, 16, 16) + 1
    pixels[0, :, 15, 15] = 0.0
    there = torch.zeros(1, 4, 4)
    there[0, :2, :2] = 1.0
    view = local_view(pixels, there, 0.25)
    kept = (view == pixels).all(1)[0]
    assert bool(kept[:6, :6].all())
    assert not bool(kept[10:, 10:15].any())
    assert 0.2 < float(kept.float().mean()) < 0.32
    assert float(view[0, 0, 10, 12]) == 0.0  # black is the least value of the channel
    assert_close(local_view(pixels, there, 1.0), pixels, atol=0, rtol=0)


def test_relevance_is_gradient_times_attention() -> None:
    """Against the gradient of weights that are made as a matrix."""
    inputs = shown(WORDS[:1])
    model, _ = planted(inputs)
    given = relevance_map(model, inputs)[0].flatten()
    model.set_attn_implementation("eager")
    out = model(**inputs, use_cache=False, output_attentions=True)
    (gradient,) = torch.autograd.grad(out.logits[0, -1].max(), [out.attentions[2]])
    wanted = (gradient.relu() * out.attentions[2]).mean(1)[0, -1]
    assert_close(given, wanted[inputs["input_ids"][0] == IMAGE].detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"image_grid_thw": torch.tensor([[1, 2, 8]])},
        {"image_grid_thw": torch.tensor([[1, 2, 2]] * 4)},
        {"pixel_values": torch.zeros(4, 3, 16, 16)},
        {"pixel_values": torch.zeros(1, 3, 8, 32)},
    ],
)
def test_relevance_of_other_than_one_square_picture_is_refused(other: dict[str, Tensor]) -> None:
    """Sixteen tokens of 2 x 8 patches, or of four pictures, are no square of 4 x 4."""
    inputs = shown(WORDS[:1])
    with pytest.raises(ValueError, match="want one square picture for each row"):
        relevance_map(planted(inputs)[0], {**inputs, **other})


@pytest.mark.parametrize("kind", ["uniform", "reversed", "shuffle", "random"])
def test_counterfactual_maps_of_a_picture_against_loops(kind: str) -> None:
    inputs = shown(WORDS[:1])
    model, _ = planted(inputs)
    with torch.no_grad(), record(model, stack="vision", layers=[0]) as calls:
        model(**inputs)
    block = counterfactual(model, kind, stack="vision")
    with block, torch.no_grad(), record(model, stack="vision", layers=[0]) as after:
        model(**inputs)
    weights, given, value = calls[0].weights()[0], after[0].output[0], calls[0].value[0]
    for h in range(4):
        flat = [float(w) for row in weights[h] for w in row]
        if kind == "uniform":
            changed = torch.full_like(weights[h], sum(flat) / len(flat))
            assert_close(given[h], given[h, :1].expand_as(given[h]), atol=1e-6, rtol=1e-6)
        elif kind == "reversed":
            changed = max(flat) - weights[h]
        else:
            # Whatever was drawn, the outputs are a map times the values: 17 tokens, 8 features; solved for and checked.
            generator = torch.Generator().manual_seed(0)
            if kind == "random":
                changed = 2 * torch.rand(1, 4, 17, 17, generator=generator)[0, h].double()
            else:
                order = [torch.randperm(289, generator=generator) for _ in range(4)][h]
                changed = torch.tensor([flat[i] for i in order.tolist()]).view(17, 17).double()
                assert sorted(flat) == pytest.approx(sorted(changed.flatten().tolist()))
        assert_close(given[h], changed.double() @ value[h], atol=1e-5, rtol=1e-5)


def test_counterfactual_maps_of_text_stay_causal() -> None:
    inputs = shown(WORDS[:1])
    model, _ = planted(inputs)
    with torch.no_grad(), record(model, stack="language", layers=[0]) as calls:
        model(**inputs)
    for kind in ("uniform", "reversed", "random"):
        block = counterfactual(model, kind, stack="language")
        with block, torch.no_grad(), record(model, stack="language", layers=[0]) as after:
            model(**inputs)
        for i in (0, 5, 20):
            row = calls[0].weights()[0, 1, i, : i + 1]
            value = calls[0].value[0, 0, : i + 1]
            given = after[0].output[0, 1, i]
            if kind == "uniform":
                assert_close(given, value.mean(0), atol=1e-6, rtol=1e-5)
            if kind == "reversed":
                assert_close(given, (row.max() - row) @ value, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="shuffled map"), counterfactual(model, "shuffle", stack="language"):
        model(**inputs)


def test_causal_maps_subtract_both_counterfactuals(model: Any) -> None:
    inputs = shown(WORDS[:1])
    runs = []
    for stack, kind in (("vision", "uniform"), ("language", "reversed")):
        with counterfactual(model, kind, stack=stack):
            runs.append(logits(model, inputs))
    own = logits(model, inputs)
    with causal_maps(model, 0.5, vision="uniform", language="reversed", eps=0.0):
        given = logits(model, inputs)
    assert_close(given, 2 * own - 0.5 * runs[0] - 0.5 * runs[1], atol=1e-4, rtol=1e-4)


def test_control_lowers_its_energy_and_moves_attention(model: Any) -> None:
    inputs = shown(WORDS)
    region = box_region("0,0,0.5,1", 4, 4)
    image = image_places(model, inputs, "test")
    start = torch.zeros(2 * PATCHES, 32)
    with torch.no_grad(), record(model, stack="language") as calls:
        model(**inputs, use_cache=False)
    energy = 0.0
    for row in range(2):
        a = torch.zeros(PATCHES)
        own = image[row].nonzero()[:, 0]
        places = range(int(own[-1]) + 1, inputs["input_ids"].shape[1])
        for call in calls:
            for i in places:
                a += call.weights()[row, :, i, own].mean(0) / len(places) / len(calls)
        energy += 400 * (1 - float((a * region[0]).sum() / a.sum())) ** 2
    assert float(_energy(model, inputs, image, region, start, 400.0).detach().sum()) == pytest.approx(energy, rel=1e-3)
    with control(model, inputs, region, steps=4, lr=0.2) as energies:
        assert energies[0] == pytest.approx(energy, rel=1e-3)
        assert energies[-1] < energies[0]
    wanted = logits(model, inputs)
    with control(model, inputs, torch.ones(1, PATCHES), steps=2):
        assert_close(logits(model, inputs), wanted, atol=0, rtol=0)


def test_image_tokens_see_the_question_and_nothing_else_changes() -> None:
    inputs = shown(WORDS)
    model = llava().double()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    image, asked = inputs["input_ids"] == IMAGE, behind_image(inputs)
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), record(model, stack="language", layers=[0]) as calls:
        model(**inputs)
    block = modality_mutual(model, image, asked)
    with block, torch.no_grad(), record(model, stack="language", layers=[0]) as after:
        model(**inputs)
    call, n = calls[0], inputs["input_ids"].shape[1]
    for row in range(2):
        for i in range(n):
            if not real[row, i]:
                continue
            seen = [j for j in range(n) if real[row, j] and (j <= i or (image[row, i] and asked[row, j]))]
            scores = torch.stack([call.query[row, 3, i] @ call.key[row, 1, j] for j in seen]) * 8**-0.5
            wanted = scores.softmax(0) @ call.value[row, 1, seen]
            assert_close(after[0].output[row, 3, i], wanted, atol=1e-6, rtol=1e-5)


def test_gem_against_loops() -> None:
    model, pixels = clip().double(), torch.randn(2, 3, 16, 16).double()
    tower, blocks = model.vision_model, model.vision_model.encoder.layers
    with torch.no_grad():
        wanted_pool = tower(pixel_values=pixels).pooler_output
        with gem(model, depth=3):
            given = tower(pixel_values=pixels)
        states = tower.pre_layrnorm(tower.embeddings(pixels))
        stream = None
        for number, block in enumerate(blocks):
            if number >= 1:
                x = block.layer_norm1(states)
                stream = states if stream is None else stream
                stream = stream + gem_step(block.self_attn, x)
            out = block(states, None)
            states = out[0] if isinstance(out, tuple) else out
    assert stream is not None
    assert_close(given.last_hidden_state, stream, atol=1e-8, rtol=1e-7)
    assert_close(given.pooler_output, wanted_pool, atol=0, rtol=0)
    with torch.no_grad(), gem(model, depth=1):
        assert_close(tower(pixel_values=pixels).last_hidden_state, states, atol=1e-9, rtol=1e-9)


def gem_step(attention: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        t = sum(float(row.norm()) for row in x[b]) / x.shape[1] * 8**-0.5
        for h in range(4):
            part = slice(8 * h, 8 * h + 8)
            q, k, v = (
                (x[b] @ own.weight.T + own.bias)[:, part]
                for own in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            for own in (q, k, v):
                s = own / own.norm(dim=-1, keepdim=True)
                s = torch.stack([(t * (s @ row)).softmax(0) @ s for row in s])
                s = s / s.norm(dim=-1, keepdim=True)
                out[b, :, part] += torch.stack([(t * (s @ row)).softmax(0) @ v for row in s]) / 3
    return out @ attention.out_proj.weight.T + attention.out_proj.bias


def test_word_maps_lie_between_0_and_1() -> None:
    model = clip()
    texts = torch.tensor([[5, 6, 95], [7, 8, 95], [9, 9, 95]])
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16), "input_ids": texts}
    maps = word_maps(model, inputs, depth=3)
    assert maps.shape == (2, 3, 4, 4)
    assert_close(maps.flatten(2).amax(-1), torch.ones(2, 3))
    assert_close(maps.flatten(2).amin(-1), torch.zeros(2, 3))


def test_what_pictures_refuse(model: Any) -> None:
    inputs = shown(WORDS)
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    uneven = {**inputs, "input_ids": inputs["input_ids"].clone()}
    uneven["input_ids"][0, -1] = IMAGE
    right = {**inputs, "attention_mask": inputs["attention_mask"].flip(-1)}
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("shows no picture", lambda: vision_heads(model, text).__enter__()),
        ("have \\[17, 16\\] image tokens", lambda: imbalance(model, uneven).__enter__()),
        ("pad on the left", lambda: vision_heads(model, right).__enter__()),
        ("scale must be at least 0", lambda: vision_heads(model, inputs, -1.0).__enter__()),
        ("gamma >= 1", lambda: imbalance(model, inputs, gamma=0.5).__enter__()),
        ("does not lie in the picture", lambda: box_region("0,0,2,1", 4, 4)),
        ("middle of none", lambda: box_region("0,0,0.01,0.01", 4, 4)),
        ("left,top,right,bottom", lambda: box_region("0,0,1", 4, 4)),
        ("region \\[1, 9\\] is not", lambda: control(model, inputs, torch.ones(1, 9)).__enter__()),
        ("no map 'other'", lambda: causal_maps(model, vision="other").__enter__()),
        ("depth 9; the vision tower has 3", lambda: gem(clip(), depth=9).__enter__()),
        ("is not of pixels", lambda: local_view(inputs["pixel_values"], torch.ones(1, 4, 4), 0.5)),
    ]
    for message, make in cases:
        with pytest.raises(ValueError, match=message):
            make()
    with agla(model, inputs["pixel_values"][:, :, :8]), pytest.raises(ValueError, match="the call's pixels are"):
        logits(model, inputs)
    with agla(model, inputs["pixel_values"]), pytest.raises(ValueError, match="leave labels out"):
        model(**inputs, labels=inputs["input_ids"])
    with torch.no_grad():
        filled = model(**row_of(inputs, 0), use_cache=True).past_key_values
    with agla(model, inputs["pixel_values"][:1]), pytest.raises(ValueError, match="filled outside"):
        model(input_ids=torch.tensor([[7]]), past_key_values=filled)
