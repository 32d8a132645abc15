"""SongMASS: loss and mask against loops, the decoder against every alignment, and a tiny BART that is held to one."""

import itertools
import math

import pytest
import torch
from small_hosts import bart, checkpointed
from tiny_families import prompt

from manyheads import create_attention
from manyheads.hosts.taps import record, tap
from manyheads.training import alignment, alignment_loss, monotone_alignment, same_number, sentence_mask


def loss_by_loops(weights, aligned, within, queries, power):
    total, count = 0.0, 0
    for row in range(weights.shape[0]):
        for i in range(weights.shape[1]):
            if not queries[row, i]:
                continue
            count += 1
            keys = [j for j in range(weights.shape[2]) if within[row, i, j]]
            held = [j for j in range(weights.shape[2]) if aligned[row, i, j]]
            for j in keys:
                target = 1 / len(held) if j in held else 0.0
                total += abs(float(weights[row, i, j]) - target) ** power / len(keys)
    return total / count


@pytest.mark.parametrize("power", [1, 2])
def test_loss_by_loops(power):
    weights = torch.rand(2, 4, 5).double().softmax(-1)
    words = torch.tensor([[0, 0, 1, 2], [0, 1, -1, 4]]), torch.tensor([[0, 1, 1, 2, 2], [0, 0, 1, 3, -1]])
    aligned = same_number(*words)
    assert not aligned[1, 2:].any()
    within = torch.rand(2, 4, 5) < 0.7
    within[0, 3] = False
    queries = torch.tensor([[True] * 4, [False, True, True, True]])
    found = alignment_loss(weights, aligned, within=within, queries=queries, power=power)
    assert float(found) == pytest.approx(loss_by_loops(weights, aligned, within, queries, power))
    perfect = aligned / aligned.sum(-1, keepdim=True).clamp_min(1)
    assert alignment_loss(perfect, aligned, power=power) == 0
    with pytest.raises(ValueError, match="power=3"):
        alignment_loss(weights, aligned, power=3)
    with pytest.raises(ValueError, match="heads averaged"):
        alignment_loss(weights[:, None], aligned)


def test_the_decoder_finds_the_best_of_all_alignments():
    for seed in range(6):
        torch.manual_seed(seed)
        weights = torch.rand(2, 4, 4).double()
        queries = torch.tensor([[True] * 4, [False, True, False, True]])
        keys = torch.tensor([[True] * 4, [False, True, True, True]])
        found = monotone_alignment(weights, queries=queries, keys=keys)
        for row in range(2):
            real = [i for i in range(4) if queries[row, i]]
            may = [j for j in range(4) if keys[row, j]]
            ways = itertools.combinations_with_replacement(may, len(real))
            best = max(ways, key=lambda way: sum(float(weights[row, i, j]) for i, j in zip(real, way, strict=True)))
            assert found[row][queries[row]].tolist() == list(best)
            assert (found[row][~queries[row]] == -1).all()
    tied = monotone_alignment(torch.ones(1, 3, 3))
    assert tied.tolist() == [[0, 0, 0]]


def test_the_decoder_stays_within_sentences_and_says_where_it_cannot():
    within = torch.tensor([[[False, True, False], [True, False, False]]])
    with pytest.raises(ValueError, match=r"rows \[0\]"):
        monotone_alignment(torch.rand(1, 2, 3), within=within)
    assert monotone_alignment(torch.rand(1, 2, 3), within=within.flip(1)).tolist() == [[0, 1]]


def batch(rows=2, n=7, m=9):
    """Padding on the right of one source and one target; sentences of three."""
    inputs = {"input_ids": prompt(rows, m), "attention_mask": torch.ones(rows, m, dtype=torch.long)}
    inputs["attention_mask"][1, -2:] = 0
    inputs["decoder_input_ids"] = prompt(rows, n, seed=4)
    within = same_number(torch.arange(n).expand(rows, n) // 3, torch.arange(m).expand(rows, m) // 3)
    return inputs, within


@torch.no_grad()
def test_the_sentence_mask_by_loops():
    model, (inputs, within) = bart().double(), batch()
    within[0, 2] = False  # no sentence: it sees what it always does
    calls = []
    with sentence_mask(model, within), tap(model, calls.append, kind="cross"):
        model(**inputs)
    for call in calls:
        for row, head, i in itertools.product(range(2), range(4), range(7)):
            seen = [j for j in range(9) if inputs["attention_mask"][row, j]]
            kept = [j for j in seen if within[row, i, j]] or seen
            scores = {j: math.exp(call.query[row, head, i] @ call.key[row, head, j] * call.scale) for j in kept}
            wanted = sum(s / sum(scores.values()) * call.value[row, head, j] for j, s in scores.items())
            torch.testing.assert_close(call.output[row, head, i], wanted)
    with sentence_mask(model, within), pytest.raises(ValueError, match="use_cache"):
        model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3)
    cross, x, context = create_attention("softmax", 8, 2).double(), torch.randn(2, 7, 8).double(), torch.randn(2, 9, 8)
    weights = cross(x, context.double(), mask=batch()[1][:, None], need_weights=True).weights
    assert (weights[~batch()[1][:, None].expand_as(weights)] == 0).all()


@torch.no_grad()
def test_losses_are_those_of_the_recorded_weights():
    model, (inputs, within) = bart().double(), batch()
    aligned = same_number(torch.arange(7).expand(2, 7), torch.arange(9).expand(2, 9))
    with record(model, kind="cross") as calls, alignment(model, aligned, within=within) as losses:
        model(**inputs)
    each = [alignment_loss(call.weights().mean(1), aligned, within=within) for call in calls]
    assert len(losses) == 2
    torch.testing.assert_close(losses.mean(), sum(each) / 2)
    with alignment(model, aligned) as none, pytest.raises(ValueError, match="no layer"):
        none.mean()


def test_gradients_under_checkpointing_or_a_refusal():
    found, (inputs, within) = [], batch()
    aligned = same_number(torch.arange(7).expand(2, 7), torch.arange(9).expand(2, 9))
    for way in (None, False):
        model = checkpointed(bart(dropout=0.0), way)
        with alignment(model, aligned, within=within) as losses:
            out = model(**inputs, labels=inputs["decoder_input_ids"], use_cache=False)
        assert len(losses) == 2
        (out.loss + losses.mean()).backward()
        assert len(losses) == 2
        found.append({name: own.grad for name, own in model.named_parameters() if own.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, own in found[0].items():
        torch.testing.assert_close(found[1][name], own, atol=1e-5, rtol=1e-4, msg=lambda text, at=name: f"{at}: {text}")
    model = checkpointed(bart(), True)
    with pytest.raises(ValueError, match="use_reentrant=False"), alignment(model, aligned):
        model(**inputs, use_cache=False)


def test_a_tiny_bart_is_held_to_the_alignment_that_it_is_given():
    """The target is the source; without being told, cross attention is on nobody in particular."""
    accuracy = {}
    for told in (False, True):
        torch.manual_seed(0)
        model = bart(dropout=0.0, init_std=0.1).train()
        optimiser, aligned = torch.optim.Adam(model.parameters(), 3e-3), torch.eye(7, dtype=torch.bool).expand(8, 7, 7)
        for step in range(15):
            ids = prompt(8, 7, seed=step)
            with alignment(model, aligned) as losses:
                out = model(input_ids=ids, decoder_input_ids=ids, labels=63 - ids, use_cache=False)
            optimiser.zero_grad()
            (out.loss + (3.0 if told else 0.0) * losses.mean()).backward()
            optimiser.step()
        with torch.no_grad(), record(model.eval(), kind="cross") as calls:
            ids = prompt(8, 7, seed=99)
            model(input_ids=ids, decoder_input_ids=ids)
        weights = torch.stack([call.weights().mean(1) for call in calls]).mean(0)
        accuracy[told] = (monotone_alignment(weights) == torch.arange(7)).double().mean().item()
    assert accuracy[True] > 0.9
    assert accuracy[False] < 0.6


def test_bfloat16():
    model, (inputs, within) = bart().to(torch.bfloat16).train(), batch()
    with sentence_mask(model, within), alignment(model, within) as losses:
        model(**inputs)
    assert losses.mean().dtype == torch.float32
    losses.mean().backward()
    assert all(own.grad.isfinite().all() for own in model.parameters() if own.grad is not None)
