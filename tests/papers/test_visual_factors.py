"""DARA against loops over scores, on a tiny LLaVA: at 1 it is the model, and it is all that learns."""

import math

import pytest
import torch
from small_hosts import IMAGE, checkpointed, llama, llava

from manyheads.hosts.taps import tap
from manyheads.training import VisualFactors, image_numbers


def batch():
    """Two pictures in the first row, one in the second, which is padded on the left."""
    image = [IMAGE] * 4
    rows = [[5, *image, 7, *image, 9, 11], [0, 0, 0, 0, 3, 8, *image, 6, 4]]
    ids = torch.tensor(rows)
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pictures}


def test_numbers_of_images():
    which = image_numbers(batch()["input_ids"], IMAGE)
    assert which[0].tolist() == [-1, 0, 0, 0, 0, -1, 1, 1, 1, 1, -1, -1]
    assert which[1].tolist() == [-1] * 6 + [0] * 4 + [-1] * 2
    side = torch.tensor([[5, *[IMAGE] * 8, 7]])
    assert image_numbers(side, IMAGE).max() == 0
    assert image_numbers(side, IMAGE, 4)[0].tolist() == [-1, 0, 0, 0, 0, 1, 1, 1, 1, -1]
    with pytest.raises(ValueError, match=r"\[8\] image tokens"):
        image_numbers(side, IMAGE, 3)


@torch.no_grad()
def test_equation_by_loops():
    model, inputs = llava().double(), batch()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    which = image_numbers(inputs["input_ids"], IMAGE)
    factors = VisualFactors(model, images=2).double()
    factors.factors.copy_(torch.rand_like(factors.factors) * 4 - 1)
    calls = []
    with factors.on(model, which), tap(model, calls.append, layers=[0], stack="language"):
        model(**inputs)
    (call,) = calls
    wanted = torch.zeros_like(call.output)
    for row in range(2):
        real = [j for j in range(12) if inputs["attention_mask"][row, j]]
        for head in range(4):
            key, value = call.key[row, head // 2], call.value[row, head // 2]
            for i in real:
                scores = {}
                for j in [j for j in real if j <= i]:
                    image = int(which[row, j])
                    factor = 1.0 if image < 0 else factors.factors[0, head, image]
                    scores[j] = math.exp(call.query[row, head, i] @ key[j] / math.sqrt(8) * factor)
                wanted[row, head, i] = sum(s / sum(scores.values()) * value[j] for j, s in scores.items())
    real = inputs["attention_mask"].bool()[:, None, :, None].expand_as(wanted)
    torch.testing.assert_close(call.output[real], wanted[real])


@torch.no_grad()
def test_factors_of_one_are_the_model_also_when_it_generates():
    model, inputs = llava(), batch()
    which, real = image_numbers(inputs["input_ids"], IMAGE), inputs["attention_mask"].bool()
    factors = VisualFactors(model, images=2, layers=[0, 1])
    full = model(**inputs).logits[real]
    with factors.on(model, which):
        torch.testing.assert_close(model(**inputs).logits[real], full)
        factors.factors.mul_(3)
        assert (model(**inputs).logits[real] - full).abs().max() > 1e-2
    torch.testing.assert_close(model(**inputs).logits[real], full)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_and_beams_give_what_whole_passes_give(beams):
    """`generate` feeds one token at a time, and a row for each beam."""
    model, inputs = llava(), batch()
    which = image_numbers(inputs["input_ids"], IMAGE)
    factors = VisualFactors(model, images=2)
    factors.factors.copy_(torch.rand_like(factors.factors) * 4)
    found = []
    for cache in (True, False):
        with factors.on(model, which):
            found.append(
                model.generate(
                    **inputs,
                    max_new_tokens=5,
                    do_sample=False,
                    num_beams=beams,
                    use_cache=cache,
                    suppress_tokens=[IMAGE],
                )
            )
    torch.testing.assert_close(found[0], found[1])


@torch.no_grad()
def test_what_is_behind_the_prompt_is_text():
    model, inputs = llava(), batch()
    which = image_numbers(inputs["input_ids"], IMAGE)
    factors = VisualFactors(model, images=2)
    factors.factors.copy_(torch.rand_like(factors.factors) * 4)
    longer = torch.cat([inputs["input_ids"], torch.tensor([[7, 9, 12], [13, 5, 8]])], 1)
    inputs = {**inputs, "input_ids": longer, "attention_mask": (longer != 0).long()}
    found = []
    for known in (which, image_numbers(longer, IMAGE)):
        with factors.on(model, known):
            found.append(model(**inputs).logits)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing(reentrant):
    found, inputs = [], batch()
    for way in (None, reentrant):
        model = checkpointed(llava(), way)
        factors = VisualFactors(model, images=2)
        with factors.on(model, image_numbers(inputs["input_ids"], IMAGE)):
            loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss
        loss.backward()
        found.append(factors.factors.grad)
    assert found[0].abs().min() > 0
    torch.testing.assert_close(found[1], found[0])


def test_it_learns_alone_and_turns_to_the_picture_that_tells():
    """The last token's loss falls by the factors alone; a frozen model with bfloat16 weights learns them too."""
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = llava().to(dtype).requires_grad_(False), batch()
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        which, labels = image_numbers(inputs["input_ids"], IMAGE), torch.full((2, 12), -100)
        labels[:, -1] = torch.tensor([20, 31])
        factors = VisualFactors(model, images=2)
        optimiser, losses = torch.optim.Adam(factors.parameters(), 0.2), []
        for _ in range(12):
            with factors.on(model, which):
                loss = model(**inputs, labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1
        assert factors.factors.dtype == torch.float32


def test_refusals():
    model, inputs = llava(), batch()
    which = image_numbers(inputs["input_ids"], IMAGE)
    factors = VisualFactors(model, images=1)
    with pytest.raises(ValueError, match="2 images"), factors.on(model, which):
        pass
    with pytest.raises(ValueError, match="whole numbers"), factors.on(model, which.float()):
        pass
    with pytest.raises(ValueError, match="3 rows"), VisualFactors(model, 2).on(model, which[[0, 1, 1]]):
        model(**inputs)
    with pytest.raises(ValueError, match="layers"):
        VisualFactors(model, 1, layers=[7])
    with pytest.raises(ValueError, match="images=0"):
        VisualFactors(model, 0)
    assert VisualFactors(model, 3, per_head=False).factors.shape == (1, 1, 3)
    assert VisualFactors(llama(), 3).factors.shape == (1, 4, 3)


@torch.no_grad()
def test_a_cache_that_lets_go_of_its_first_keys_is_refused():
    from tiny_families import prompt, tiny

    model = tiny("mistral", sliding_window=7)
    factors, ids = VisualFactors(model, 1), prompt(1, 5)
    with factors.on(model, torch.tensor([[-1, 0, 0, -1, -1]])), pytest.raises(ValueError, match="sliding"):
        model.generate(ids, max_new_tokens=6, do_sample=False)
