"""Scores of a call that are changed before their softmax; unchanged they give what the model gives, gradients too."""

import pytest
import torch
from torch.testing import assert_close
from zoo import build, inputs

from manyheads import create_attention
from manyheads.hosts.attend import weigh
from manyheads.hosts.taps import tap

KINDS = ["llama", "mistral", "gemma2", "gpt_oss", "gpt2", "bert", "vit", "bart", "t5", "clip"]


def same(call):
    return call.rescored(lambda scores, rows: scores * 1.0)


def seen_by_all(call):
    visible = call.visible()
    if visible is None:
        return torch.ones(call.output.shape[:3], dtype=torch.bool)
    return visible.any(-1).expand(call.output.shape[:3])


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_unchanged_scores_are_the_model(name):
    """Grouped heads, windows, soft caps, sinks, position biases, padding on either side."""
    found = []

    def reader(call):
        rows = seen_by_all(call)
        found.append(call.layer)
        assert_close(same(call)[rows], call.output[rows], atol=1e-5, rtol=1e-4)
        heads = [call.heads - 1, 0]
        some = call.rescored(lambda scores, rows: scores * 1.0, heads)
        assert_close(some[rows], call.output[rows], atol=1e-5, rtol=1e-4)

    model = build(name)
    with tap(model, reader) as sites:
        model(**inputs(name))
    assert len(found) == len(sites)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "t5"])
def test_gradients_are_those_of_the_model(name):
    grads = []
    for change in (None, same):
        model, named = build(name), inputs(name)
        with tap(model, (lambda call: None) if change is None else change):
            logits = model(**named).logits
        real = named["attention_mask"].bool() if logits.shape[1] == 13 else slice(None)
        logits[real].square().mean().backward()
        grads.append({key: own.grad for key, own in model.named_parameters() if own.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, own in grads[0].items():
        assert own.isfinite().all()
        assert_close(grads[1][key], own, atol=1e-5, rtol=1e-3, msg=lambda text, at=key: f"{at}: {text}")


@torch.no_grad()
def test_a_row_that_sees_nothing_gives_zeros_and_a_mechanism_reads_alike():
    gqa, x = create_attention("gqa", 16, 4, kv_heads=2).double(), torch.randn(2, 6, 16).double()
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[0, 0, 2] = False
    calls = []
    with tap(gqa, calls.append):
        gqa(x, mask=mask)
    found = same(calls[0])
    assert_close(found, calls[0].output)
    assert (found[0, :, 2] == 0).all()


def test_a_blind_row_has_a_gradient_of_zero():
    scores, seen = torch.randn(1, 1, 2, 3, requires_grad=True), torch.tensor([[[[True, True, False], [False] * 3]]])
    weigh(scores, seen).square().sum().backward()
    assert scores.grad.isfinite().all()
    assert (scores.grad[0, 0, 1] == 0).all()
