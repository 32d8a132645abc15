"""DropKey against loops over entries; its schedule, its limits, and a tiny ViT that trains with it."""

import math

import pytest
import torch
from small_hosts import bert, checkpointed, llama, padded_batch, vit

from manyheads import create_attention
from manyheads.hosts.taps import tap
from manyheads.training import drop_key


def weights_by_loops(call, gone):
    """softmax over the keys that are seen and not gone, entry by entry; all that are seen where none is left."""
    b, h, n, m = gone.shape
    visible = call.visible().expand(b, h, n, m)
    found = torch.zeros(b, h, n, m, dtype=call.query.dtype)
    for row in range(b):
        for head in range(h):
            for i in range(n):
                seen = [j for j in range(m) if visible[row, head, i, j]]
                kept = [j for j in seen if not gone[row, head, i, j]] or seen
                key = call.key[row, head // (h // call.key.shape[1])]
                scores = {j: math.exp(call.query[row, head, i] @ key[j] * call.scale) for j in kept}
                for j, value in scores.items():
                    found[row, head, i, j] = value / sum(scores.values())
    return found


@pytest.mark.parametrize("ratio", [0.5, 0.97])
@torch.no_grad()
def test_equation_by_loops(ratio):
    model, batch = llama(layers=1).double().train(), padded_batch()
    drawn, calls = [], []

    def keep(call):
        calls.append(call)

    real = torch.rand

    def listen(*args, **kwargs):
        drawn.append(real(*args, **kwargs))
        return drawn[-1]

    with drop_key(model, ratio, ratio), tap(model, keep), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", listen)
        model(**batch)
    assert len(drawn) == 1
    wanted = weights_by_loops(calls[0], drawn[0] < ratio)
    values = calls[0].value.repeat_interleave(2, 1)
    # What a tap that was opened later sees is the output of the one before it.
    torch.testing.assert_close(calls[0].output, wanted @ values)


def test_schedule_falls_with_depth_and_takes_the_layers_that_are_named():
    model = llama(layers=5)
    with drop_key(model, 0.4, 0.0) as ratios:
        assert ratios == pytest.approx({0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1, 4: 0.0})
    with drop_key(model, 0.4, 0.2, layers=[1, 4]) as ratios:
        assert ratios == pytest.approx({1: 0.4, 4: 0.2})
    with drop_key(llama(layers=1), 0.4) as ratios:
        assert ratios == {0: 0.4}


@torch.no_grad()
def test_eval_and_ratio_zero_are_the_model():
    model, batch = llama().train(), padded_batch()
    real = batch["attention_mask"].bool()
    full = model(**batch).logits[real]
    with drop_key(model, 0.0, 0.0):
        torch.testing.assert_close(model(**batch).logits[real], full)
    with drop_key(model, 0.6, 0.6):
        assert (model(**batch).logits[real] - full).abs().max() > 1e-2
        torch.testing.assert_close(model.eval()(**batch).logits[real], full)
    torch.testing.assert_close(model.train()(**batch).logits[real], full)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_are_those_without_checkpointing(reentrant):
    """Also where the checkpoint does not put the generator back, as a model without dropout may have it."""
    found = []
    for way in (None, reentrant):
        model = checkpointed(llama(), way, preserve_rng_state=False)
        torch.manual_seed(3)
        with drop_key(model, 0.5, 0.3):
            loss = model(**padded_batch(), labels=padded_batch()["input_ids"]).loss
        loss.backward()
        found.append({name: own.grad for name, own in model.named_parameters()})
    for name, own in found[0].items():
        torch.testing.assert_close(found[1][name], own, msg=lambda text, at=name: f"{at}: {text}")


def test_padding_changes_nothing_of_the_rest():
    """Left padding: what is drawn on padded keys matters to nobody, and a padded row has finite gradients."""
    model, batch = llama().train(), padded_batch()
    with drop_key(model, 0.9, 0.9):
        loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
    loss.backward()
    assert all(own.grad.isfinite().all() for own in model.parameters())


def test_bfloat16_and_attention_dropout():
    model = llama(attention_dropout=0.5).to(torch.bfloat16).train()
    batch = padded_batch()
    with drop_key(model, 0.2, 0.2):
        out = model(**batch).logits
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    # The model's own dropout is drawn as well: two passes that drop no key differ.
    model = llama(attention_dropout=0.5, layers=1).train()
    with torch.no_grad(), drop_key(model, 1e-9, 1e-9):
        assert (model(**batch).logits - model(**batch).logits).abs().max() > 1e-3


def test_a_mechanism_of_ours_drops_too_and_others_are_refused_by_name():
    gqa = create_attention("gqa", 16, 4, kv_heads=2, causal=True).train()
    x = torch.randn(2, 9, 16)
    with drop_key(gqa, 0.5):
        assert (gqa(x).output - gqa(x).output).abs().max() > 1e-4
    linear = create_attention("based", 16, 4, causal=True).train()
    with pytest.raises(ValueError, match="based"), drop_key(linear, 0.5):
        linear(x)
    with pytest.raises(ValueError, match="first=1"), drop_key(gqa, 1.0):
        pass


def pictures_of_two_kinds(generator):
    """One kind has a brighter patch."""
    labels = torch.randint(2, (16,), generator=generator)
    pictures = torch.rand(16, 3, 16, 16, generator=generator)
    pictures[:, :, 4:8, 8:12] += 3 * labels[:, None, None, None].float()
    return pictures, labels


def trained(ratio, steps=24):
    torch.manual_seed(0)
    model, head = vit(std=0.3).train(), torch.nn.Linear(32, 2)
    optimiser = torch.optim.Adam([*model.parameters(), *head.parameters()], 3e-3)
    generator, losses = torch.Generator().manual_seed(1), []

    def loss_of():
        pictures, labels = pictures_of_two_kinds(generator)
        return torch.nn.functional.cross_entropy(head(model(pixel_values=pictures).last_hidden_state.mean(1)), labels)

    with drop_key(model, ratio, ratio):
        for _ in range(steps):
            loss = loss_of()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    with torch.no_grad(), drop_key(model, 0.7, 0.7):
        thinned = torch.stack([loss_of() for _ in range(8)]).mean().item()
    return losses, thinned


def test_a_tiny_vit_learns_with_keys_dropped_and_does_with_fewer_keys_than_one_that_had_them_all():
    (losses, with_drops), (_, without) = trained(0.5), trained(0.0)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert with_drops < 0.8 * without


def test_two_towers_want_one_to_be_said():
    from zoo import build

    model = build("clip").train()
    with pytest.raises(ValueError, match="stack="), drop_key(model):
        pass
    with drop_key(model, stack="vision") as ratios:
        assert len(ratios) == 2


def test_bert_drops_beside_its_own_dropout():
    model = bert().train()
    with drop_key(model, 0.5, 0.5):
        assert model(**padded_batch(left=False)).last_hidden_state.isfinite().all()
