"""The entropy loss by hand, and through a mechanism."""

import math

import pytest
import torch

from manyheads import create_attention
from manyheads.registry import list_attentions, mechanism_class
from manyheads.testing.case import Case, each
from manyheads.training import EntropyMaximised, negative_attention_entropy


def test_by_hand():
    weights = torch.tensor([[[[0.5, 0.5, 0.0, 0.0]], [[0.25, 0.25, 0.25, 0.25]]]]).double()
    wanted = (-math.log(2) - math.log(4)) / 2
    torch.testing.assert_close(negative_attention_entropy(weights), torch.tensor(wanted).double())
    assert negative_attention_entropy(torch.eye(3)[None, None]) == 0
    empty = torch.cat([weights, torch.zeros_like(weights)])
    torch.testing.assert_close(negative_attention_entropy(empty), torch.tensor(wanted).double())
    assert negative_attention_entropy(torch.zeros(1, 2, 1, 4)) == 0
    torch.testing.assert_close(negative_attention_entropy(7 * weights), torch.tensor(wanted).double())
    signed = torch.cat([weights, torch.full_like(weights[..., :2], -3.0)], -1)
    torch.testing.assert_close(negative_attention_entropy(signed), torch.tensor(wanted).double())


@pytest.mark.parametrize("name", ["efficient-probing", "acmil", "softmax"])
def test_equals_torchs_entropy_and_has_finite_gradients(name):
    torch.manual_seed(0)
    module, x = EntropyMaximised(create_attention(name, 8, 2).double()).train(), torch.randn(2, 5, 8).double()
    if name == "acmil":
        module.mechanism.drop = 0.0
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    result = module(x.requires_grad_(), mask=mask, need_weights=True)
    entropy = torch.distributions.Categorical(probs=result.weights).entropy()  # [b, heads, queries]
    wanted = -(entropy.mean() if entropy.shape[-1] == 1 else entropy.transpose(1, 2)[mask].mean())
    torch.testing.assert_close(result.losses["attention_entropy"], wanted, rtol=1e-6, atol=1e-6)
    result.losses["attention_entropy"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


def test_descending_the_loss_evens_the_attention():
    torch.manual_seed(0)
    module, x = EntropyMaximised(create_attention("efficient-probing", 8, 2)).train(), 5 * torch.randn(2, 6, 8)
    with torch.no_grad():
        module.mechanism.queries.normal_()
    first = module(x).losses["attention_entropy"].detach()
    optimiser = torch.optim.Adam([module.mechanism.queries], lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        module(x).losses["attention_entropy"].backward()
        optimiser.step()
    last = module(x).losses["attention_entropy"].detach()
    assert last < first - 0.5
    assert last >= -math.log(6) - 1e-5


def test_keeps_other_losses_gives_weights_only_when_asked_and_is_plain_in_eval():
    module, x = EntropyMaximised(create_attention("acmil", 8, 2)), torch.randn(2, 5, 8)
    result = module.train()(x)
    assert set(result.losses) == {"diversity", "attention_entropy"}
    assert result.weights is None
    assert set(module.eval()(x).losses) == {"diversity"}


def test_refuses_a_mechanism_without_weights():
    module = EntropyMaximised(create_attention("gaussian-adaptive", 8, 2)).train()
    with pytest.raises(ValueError, match="no attention weights"):
        module(torch.randn(1, 4, 8))


@pytest.mark.parametrize("name", list_attentions())
def test_every_mechanism_of_the_registry(name):
    """The loss lies between even and all on one, also where nothing is real; or there are no weights."""
    cls = mechanism_class(name)
    for pattern in sorted(cls.card.patterns):
        case = Case(cls, pattern)
        for nothing in (False, True):
            module, x, context = EntropyMaximised(case.build()).train(), case.x(7).requires_grad_(), case.context(7)
            mask = each(x if context is None else context, lambda t, n=nothing: torch.full(t.shape[:-1], not n))
            try:
                result = module(x, context, mask=mask)
            except ValueError as error:
                assert "no attention weights" in str(error)  # noqa: PT017
                continue
            (result.output.sum() + sum(result.losses.values())).backward()
            assert -math.log(100) < result.losses["attention_entropy"] <= 1e-9
            assert all(
                bool(g.isfinite().all()) for g in (x.grad, *(p.grad for p in module.parameters())) if g is not None
            )
