"""Subsampled attention: what is drawn, by counting; what comes of it, by attention to the drawn keys alone."""

import pytest
import torch

from manyheads import create_attention
from manyheads.training import SubsampledAttention, sampling


def build(name="softmax", keep=0.5, **config):
    torch.manual_seed(0)
    return SubsampledAttention(create_attention(name, 8, 2, **config).double(), keep=keep).train()


def drawn(weights):
    """The keys that some head of the query weighs, as a set per query."""
    return [set((row != 0).any(0).nonzero()[:, 0].tolist()) for row in weights.transpose(0, 1)]


@torch.no_grad()
def test_cross_attention_equals_attention_to_the_drawn_keys():
    module, x, context = build(), torch.randn(2, 3, 8).double(), torch.randn(2, 8, 8).double()
    result = module(x, context, need_weights=True)
    for row in range(2):
        keys = drawn(result.weights[row])
        assert all(k == keys[0] for k in keys)
        assert len(keys[0]) == 4
        wanted = module.mechanism(x[row : row + 1], context[row : row + 1, sorted(keys[0])]).output[0]
        torch.testing.assert_close(result.output[row], wanted)


@torch.no_grad()
def test_self_attention_keeps_the_drawn_keys_and_the_token_itself():
    module, x = build(causal=True), torch.randn(2, 8, 8).double()
    weights = module(x, need_weights=True).weights
    for row in range(2):
        keys = drawn(weights[row])
        shared = {k for k in range(7) if k in keys[7]}
        assert len(shared | {7}) in (4, 5)
        for i in range(7):
            assert keys[i] == {k for k in shared if k <= i} | {i}
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 8).double())


@torch.no_grad()
def test_every_key_is_drawn_as_often_as_its_share():
    module, x, context = build(keep=0.25), torch.randn(1, 1, 8).double(), torch.randn(1, 8, 8).double()
    counts = sum((module(x, context, need_weights=True).weights[0, 0, 0] != 0).double() for _ in range(400))
    assert counts.sum() == 800
    assert counts.min() > 60  # 100 each; four deviations are 35
    assert counts.max() < 140


@torch.no_grad()
def test_shares_are_of_real_keys_and_masks_are_obeyed():
    module, x, context = build(), torch.randn(1, 3, 8).double(), torch.randn(1, 8, 8).double()
    padding = torch.tensor([[True, False, True, True, True, False, False, False]])
    keys = drawn(module(x, context, mask=padding, need_weights=True).weights[0])[0]
    assert len(keys) == 2
    assert keys <= {0, 2, 3, 4}
    dense = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    weights = module(context, mask=dense, need_weights=True).weights
    assert (weights.triu(1) == 0).all()
    padded = module(context, mask=padding, need_weights=True).weights
    assert (padded[..., ~padding[0]] == 0).all()


@torch.no_grad()
def test_pools_are_subsampled_too():
    module, x = build("efficient-probing"), torch.randn(2, 8, 8).double()
    weights = module(x, need_weights=True).weights
    assert ((weights[:, 0, 0] != 0).sum(-1) == 4).all()


@torch.no_grad()
def test_eval_is_the_mechanism_and_sampling_makes_ensembles():
    module, x = build(causal=True).eval(), torch.randn(2, 8, 8).double()
    full = module.mechanism(x).output
    torch.testing.assert_close(module(x).output, full)
    torch.testing.assert_close(build(keep=1.0, causal=True)(x).output, full)
    with sampling(module):
        passes = torch.stack([module(x).output for _ in range(3)])
    assert (passes[0] - passes[1]).abs().max() > 1e-3
    module.train()
    with sampling(module, False):
        torch.testing.assert_close(module(x).output, full)
    assert (module(x).output - full).abs().max() > 1e-3
    state = module.eval().mechanism.init_state(2)
    torch.testing.assert_close(module(x, state=state).output, full)


def test_refusals():
    module = build(causal=True)
    with pytest.raises(ValueError, match="eval"):
        module(torch.randn(2, 3, 8).double(), state=module.mechanism.init_state(2))
    with pytest.raises(ValueError, match="keep=0"):
        build(keep=0)
    with pytest.raises(ValueError, match="sequence"):
        build("agent")(torch.randn(1, 3, 3, 8).double())
