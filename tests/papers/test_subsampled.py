"""Subsampled attention: what is drawn, by counting; what comes of it, by attention to the drawn keys alone."""

import pytest
import torch

from manyheads import create_attention
from manyheads.registry import list_attentions, mechanism_class
from manyheads.testing.case import Case, each
from manyheads.training import SubsampledAttention, sampling


def build(name="softmax", keep=0.5, as_padding=False, **config):
    torch.manual_seed(0)
    mechanism = create_attention(name, 8, 2, **config).double()
    return SubsampledAttention(mechanism, keep=keep, as_padding=as_padding).train()


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
    with pytest.raises(ValueError, match="as_padding=True"):
        build("agent")(torch.randn(1, 3, 8).double())
    with pytest.raises(ValueError, match=r"softmax: mask has shape \(2, 4\)"):
        module(torch.randn(2, 3, 8).double(), mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="softmax: mask has dtype"):
        module(torch.randn(2, 3, 8).double(), mask=torch.ones(2, 3))


@torch.no_grad()
def test_tokens_drawn_as_padding():
    """Three ways to be drawn whole: told so, on a grid, and one by one where there are several contexts."""
    module, x = build("linformer", as_padding=True), torch.randn(2, 8, 8).double()
    real = torch.tensor([[True] * 8, [True] * 6 + [False] * 2])
    seen = set()
    for _ in range(10):
        weights = module(x, mask=real, need_weights=True).weights
        for row, count in enumerate((4, 3)):
            keys = set((weights[row] != 0).any(0).any(0).nonzero()[:, 0].tolist())
            assert len(keys) == count
            assert max(keys) < real[row].sum()
            seen.add((row, *sorted(keys)))
    assert len(seen) > 4
    grid = build("agent")(torch.randn(2, 3, 4, 8).double(), need_weights=True).weights
    assert ((grid != 0).any(1).any(1).sum(-1) == 6).all()
    module = build("multi-source", mode="flat")
    weights = module(x, (x, x[:, :4]), mask=(real, real[:, :4]), need_weights=True).weights
    assert (weights[:, :, :, :8] != 0).any(1).any(1).sum(-1).tolist() == [4, 3]
    assert (weights[:, :, :, 8:] != 0).any(1).any(1).sum(-1).tolist() == [2, 2]


@pytest.mark.parametrize("name", list_attentions())
def test_every_mechanism_of_the_registry(name):
    """As it is or with as_padding; also where nothing is real."""
    cls = mechanism_class(name)
    for pattern in sorted(cls.card.patterns):
        case = Case(cls, pattern)
        x, context = case.x(7), case.context(7)
        if pattern == "maps":
            module = case.build()
            maps = tuple(
                torch.randn(1, *size, wide) for size, wide in zip(module.map_sizes(4, 4), module.map_dims, strict=True)
            )
            with pytest.raises(ValueError, match="reads several maps"):
                SubsampledAttention(module, keep=0.5).train()(maps)
            continue
        plain, named = case.build(), {}
        plain.register_forward_pre_hook(lambda _, __, given, found=named: found.update(given), with_kwargs=True)
        wanted = plain(x, context).output
        for nothing in (False, True):
            full = each(x if context is None else context, lambda t, n=nothing: torch.full(t.shape[:-1], not n))
            for as_padding in (False, True):
                module = SubsampledAttention(case.build(), keep=0.3, as_padding=as_padding).train()
                try:
                    result = module(x.requires_grad_(), context, mask=full, **named)
                except ValueError as error:
                    assert "as_padding=True" in str(error)  # noqa: PT017
                    assert not as_padding
                    continue
                (result.output.sum() + sum(result.losses.values())).backward()
                assert bool(result.output.isfinite().all())
                assert all(bool(loss.isfinite()) for loss in result.losses.values())
                assert bool(x.grad.isfinite().all())
                if not nothing:
                    assert (result.output - wanted).abs().max() > 1e-9
