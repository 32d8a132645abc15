"""Guided heads against loops over pairs of tokens; patterns by loops; a tiny BERT that is guided, and scored."""

import math

import pytest
import torch
from small_hosts import bert, checkpointed, llama, padded_batch, vit
from tiny_families import prompt

from manyheads import create_attention
from manyheads.hosts.loading import load_model
from manyheads.hosts.probes import Inputs
from manyheads.hosts.taps import record, tap
from manyheads.training import (
    guided_heads,
    neighbours,
    pattern_relevance,
    same_sentence,
    sentence_numbers,
    token_match,
)


def test_patterns_by_loops():
    ids = torch.tensor([[3, 9, 3, 5, 9, 4], [5, 5, 9, 6, 6, 9]])
    match, ignored = token_match(ids), token_match(ids, ids == 9)
    numbers = sentence_numbers(ids, 9)
    assert numbers.tolist() == [[0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 1]]
    sentence, after, before = same_sentence(numbers), neighbours(6, 1), neighbours(6, -2)
    for row in range(2):
        for i in range(6):
            for j in range(6):
                same = bool(ids[row, i] == ids[row, j]) and i != j
                assert match[row, i, j] == same
                assert ignored[row, i, j] == (same and ids[row, i] != 9)
                assert sentence[row, i, j] == (numbers[row, i] == numbers[row, j])
                assert after[i, j] == (j == i + 1)
                assert before[i, j] == (j in (i - 1, i - 2))
    real = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    padded_with_ends = torch.tensor([[9, 9, 9, 6, 6, 9]])
    assert sentence_numbers(padded_with_ends, 9, real[1:])[0].tolist() == [-1, -1, 0, 1, 1, 1]
    assert not same_sentence(sentence_numbers(ids, 9, real))[1, :2].any()


@pytest.mark.parametrize("form", ["mask", "fixed"])
@torch.no_grad()
def test_equation_by_loops(form):
    """A left-padded causal host: what may be seen is less than the pattern, and rows without any fall back."""
    model, batch = llama(layers=2).double(), padded_batch()
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    ids[0, 4] = ids[0, 1]
    patterns = {(1, 3): token_match(ids), (1, 0): neighbours(9, -1), (1, 2): neighbours(9, 1)}
    calls = []
    with guided_heads(model, patterns, form=form), tap(model, calls.append, layers=[1]):
        model(**batch)
    (call,) = calls
    for (_, head), pattern in patterns.items():
        for row in range(2):
            own = pattern if pattern.dim() == 2 else pattern[row]
            for i in [i for i in range(9) if real[row, i]]:
                seen = [j for j in range(i + 1) if real[row, j]]
                kept = [j for j in seen if own[i, j]] or seen
                key, value = call.key[row, head // 2], call.value[row, head // 2]
                scores = {
                    j: math.exp(call.query[row, head, i] @ key[j] * call.scale) if form == "mask" else 1.0 for j in kept
                }
                wanted = sum(s / sum(scores.values()) * value[j] for j, s in scores.items())
                torch.testing.assert_close(call.output[row, head, i], wanted)
    plain = []
    with tap(model, plain.append, layers=[1]):
        model(**batch)
    torch.testing.assert_close(call.output[:, 1], plain[0].output[:, 1])  # the head that is not named


@torch.no_grad()
def test_an_all_true_mask_changes_nothing_and_the_form_ends():
    model, batch = llama(), padded_batch()
    real = batch["attention_mask"].bool()
    full = model(**batch).logits[real]
    every = {(layer, head): torch.ones(9, 9, dtype=torch.bool) for layer in range(2) for head in range(4)}
    with guided_heads(model, every):
        torch.testing.assert_close(model(**batch).logits[real], full)
    with guided_heads(model, every, form="fixed"):
        assert (model(**batch).logits[real] - full).abs().max() > 1e-2
    torch.testing.assert_close(model(**batch).logits[real], full)


@pytest.mark.parametrize("form", ["mask", "fixed"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing_and_padding(form, reentrant):
    found, batch = [], padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    patterns = {(0, 0): token_match(batch["input_ids"]), (1, 1): neighbours(9, -1)}
    for way in (None, reentrant):
        model = checkpointed(llama(), way)
        with guided_heads(model, patterns, form=form):
            loss = model(**batch, labels=labels).loss
        loss.backward()
        found.append({name: own.grad for name, own in model.named_parameters()})
    for name, own in found[0].items():
        assert own.isfinite().all()
        torch.testing.assert_close(found[1][name], own, msg=lambda text, at=name: f"{at}: {text}")


@torch.no_grad()
def test_relevance_is_the_mass_on_the_pattern():
    model, batch = bert().double().eval(), padded_batch(left=False)
    pattern = neighbours(9, -1)
    found = pattern_relevance(model, batch, pattern)
    with record(model) as calls:
        model(**batch)
    for layer, call in enumerate(calls):
        weights, real = call.weights(), batch["attention_mask"]
        for head in range(4):
            mass = [
                sum(float(weights[row, head, i, j]) for j in range(9) if pattern[i, j])
                for row in range(2)
                for i in range(9)
                if real[row, i]
            ]
            assert float(found[layer, head]) == pytest.approx(sum(mass) / len(mass))
    with guided_heads(model, {(1, 2): pattern}, form="fixed"):
        pass
    assert found.max() < 0.5


@torch.no_grad()
def test_the_packaged_model_may_be_told_what_its_head_does_anyway():
    """Its head of the token before is found by its relevance; fixed to that pattern it costs next to nothing, while the
    other heads of its layer cannot be fixed so."""
    loaded = load_model()
    ids = torch.stack(list(Inputs(loaded).windows(64, 2)))
    pattern = neighbours(64, -1)
    relevance = pattern_relevance(loaded.model, {"input_ids": ids}, pattern)
    layer, head = divmod(int(relevance.argmax()), relevance.shape[1])
    assert relevance[layer, head] > 0.9

    def loss_of(fixed):
        with guided_heads(loaded.model, {(layer, fixed): pattern}, form="fixed"):
            return loaded.model(input_ids=ids, labels=ids).loss.item()

    free = loaded.model(input_ids=ids, labels=ids).loss.item()
    cost = [loss_of(fixed) - free for fixed in range(relevance.shape[1])]
    assert abs(cost[head]) < 0.03
    assert (sum(cost) - cost[head]) / (len(cost) - 1) > 0.1


def trained(patterns_of, steps=35):
    """A BERT of one layer learns to say the token before."""
    torch.manual_seed(0)
    model, head = (
        bert(num_hidden_layers=1, hidden_dropout_prob=0.0, initializer_range=0.1).train(),
        torch.nn.Linear(32, 61),
    )
    optimiser = torch.optim.Adam([*model.parameters(), *head.parameters()], 3e-3)
    losses = []
    for step in range(steps):
        ids = prompt(8, 12, seed=step)
        with guided_heads(model, patterns_of(ids)):
            hidden = model(input_ids=ids).last_hidden_state
        loss = torch.nn.functional.cross_entropy(head(hidden[:, 1:]).flatten(0, 1), ids[:, :-1].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return sum(losses[-5:]) / 5


def test_a_bert_that_is_told_where_to_look_learns_sooner():
    """Naming the token before, which heads of attention dropout 0.1 have to find otherwise."""
    free = trained(lambda ids: {(0, 0): torch.ones(12, 12, dtype=torch.bool)})
    told = trained(lambda ids: {(0, 0): neighbours(12, -1), (0, 1): neighbours(12, -1)})
    assert told < free - 0.3


def test_bfloat16_vit_and_a_mechanism():
    picture = torch.rand(2, 3, 16, 16).to(torch.bfloat16)
    model = vit().to(torch.bfloat16).train()
    with guided_heads(model, {(0, 1): neighbours(17, 1)}, form="fixed"):
        assert model(pixel_values=picture).last_hidden_state.isfinite().all()
    gqa, x = create_attention("gqa", 16, 4, kv_heads=2).double(), torch.randn(2, 5, 16).double()
    full = gqa(x).output
    with guided_heads(gqa, {(0, 3): neighbours(5, -1)}):
        assert (gqa(x).output - full).abs().max() > 1e-4
    linear = create_attention("based", 16, 4, causal=True)
    with pytest.raises(ValueError, match="based"), guided_heads(linear, {(0, 0): neighbours(5, -1)}):
        linear(torch.randn(2, 5, 16))
    # Its heads add what stands between tokens to their values: a weight that is given says nothing of that.
    shaw = create_attention("shaw", 16, 4)
    with pytest.raises(ValueError, match="shaw"), guided_heads(shaw, {(0, 0): neighbours(5, -1)}, form="fixed"):
        shaw(torch.randn(2, 5, 16))


@torch.no_grad()
def test_refusals():
    model, batch = llama(), padded_batch()
    with pytest.raises(ValueError, match="empty"), guided_heads(model, {}):
        pass
    with pytest.raises(ValueError, match="form='hard'"), guided_heads(model, {(0, 0): neighbours(9, 1)}, form="hard"):
        pass
    with pytest.raises(ValueError, match="of bool"), guided_heads(model, {(0, 0): torch.ones(9, 9)}):
        pass
    with pytest.raises(ValueError, match="use_cache"), guided_heads(model, {(0, 0): neighbours(8, 1)}):
        model(**batch)
    with pytest.raises(ValueError, match="use_cache"), guided_heads(model, {(0, 0): neighbours(9, 1)}):
        model.generate(**batch, max_new_tokens=2)
    with pytest.raises(ValueError, match="heads 0 to 3"), guided_heads(model, {(0, 9): neighbours(9, 1)}):
        model(**batch)
    with pytest.raises(ValueError, match="layers"), guided_heads(model, {(5, 0): neighbours(9, 1)}):
        pass
    with pytest.raises(ValueError, match="offset=0"):
        neighbours(4, 0)
