"""Aaren: softmax over every prefix as loops, its three forms, and parity with PyTorch's causal attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.functional.prefix import Prefix, prefix_softmax
from manyheads.mechanisms.recurrent.aaren import Aaren


def built(*, seed: int = 0, **config: object) -> Aaren:
    torch.manual_seed(seed)
    module = Aaren(12, 3, **config).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)
    return module


def tokens(n: int, *, batch: int = 2, seed: int = 5) -> Tensor:
    return torch.randn(batch, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop_aaren(module: Aaren, x: Tensor) -> Tensor:
    """The plain softmax of each prefix, from scratch."""
    d, out = module.head_dim, torch.zeros_like(x)
    k, v = x @ module.k_proj.weight.T, x @ module.v_proj.weight.T
    for b in range(x.shape[0]):
        for h in range(module.heads):
            part = slice(h * d, (h + 1) * d)
            scores = [(module.query[h] @ k[b, j, part]).item() / math.sqrt(d) for j in range(x.shape[1])]
            for i in range(x.shape[1]):
                total = sum(math.exp(s) for s in scores[: i + 1])
                for j in range(i + 1):
                    out[b, i, part] += math.exp(scores[j]) / total * v[b, j, part]
    return out @ module.o_proj.weight.T


def test_equals_the_equation() -> None:
    module, x = built(chunk=3), tokens(8)
    with torch.no_grad():
        assert_close(module(x).output, loop_aaren(module, x), rtol=1e-10, atol=1e-10)


def test_equals_causal_attention_with_the_query_repeated() -> None:
    module, x = built(), tokens(150)
    with torch.no_grad():
        k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (module.k_proj, module.v_proj))
        q = module.query[None, :, None].expand(2, -1, 150, -1)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert_close(module(x).output, module.o_proj(mixed.transpose(1, 2).flatten(-2)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 64])
def test_chunked_recurrent_and_quadratic_forms_agree(chunk: int) -> None:
    x, results = tokens(16), []
    for form in ("chunked", "quadratic", "recurrent"):
        module = built(chunk=chunk)
        row = x.clone().requires_grad_()
        if form == "recurrent":
            state = module.init_state(2)
            output = torch.cat([module(row[:, t : t + 1], state=state).output for t in range(16)], 1)
        else:
            output = module(row, need_weights=form == "quadratic").output
        output.square().sum().backward()
        results.append([output.detach(), row.grad, *(p.grad for p in module.parameters())])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_the_state_is_the_running_softmax() -> None:
    module, x = built(), tokens(20)
    state = module.init_state(2)
    with torch.no_grad():
        for part in x.split(7, 1):
            module(part, state=state)
        k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (module.k_proj, module.v_proj))
        scores = (k @ module.query[..., None])[..., 0] / 2
    assert sorted(state.fixed) == ["denominator", "maximum", "numerator"]
    assert state.nbytes == 2 * 3 * (4 + 2) * 8
    held = Prefix(**state.fixed)
    assert_close(held.maximum[..., 0], scores.amax(-1))
    assert_close(held.maximum[..., 0] + held.denominator[..., 0].log(), scores.logsumexp(-1))
    assert_close(held.numerator / held.denominator, (scores.softmax(-1)[..., None] * v).sum(2))


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_extreme_scores_are_exact(chunk: int) -> None:
    """Scores up to 1e30, rising and falling, where exp overflows or every older weight vanishes."""
    scores = torch.tensor([[[-1e30, -1e4, 0.0, 1e4, 1e4, -1e4, 1e30, 3.0, 1e30]]])
    v = torch.arange(1.0, 10.0)[None, None, :, None].requires_grad_()
    found, after = prefix_softmax(scores, v, chunk=chunk)
    assert_close(found.flatten(), torch.tensor([1.0, 2, 3, 4, 4.5, 4.5, 7, 7, 8]))
    found.sum().backward()
    assert v.grad is not None
    assert v.grad.isfinite().all()
    again, _ = prefix_softmax(
        torch.tensor([[[1e30]]]), torch.full((1, 1, 1, 1), 3.0), Prefix(*(t.detach() for t in after))
    )
    assert_close(again.flatten(), torch.tensor([(7.0 + 9 + 3) / 3]))


def test_prefixes_without_a_token_give_zeros_and_finite_gradients() -> None:
    scores = torch.tensor([[[-math.inf, -math.inf, 1.0, -math.inf]]], dtype=torch.float64)
    v = torch.ones(1, 1, 4, 2, dtype=torch.float64, requires_grad=True)
    found, _ = prefix_softmax(scores, v, chunk=1)
    assert_close(found[0, 0, :, 0].detach(), torch.tensor([0.0, 0, 1, 1], dtype=torch.float64))
    found.sum().backward()
    assert v.grad is not None
    assert_close(v.grad[0, 0, :, 0], torch.tensor([0.0, 0, 2, 0], dtype=torch.float64))


def test_tokens_that_are_not_there_leave_no_trace_in_the_state() -> None:
    module, x = built(chunk=2), tokens(8)
    mask = torch.tensor([False, False, True, False, False, True, True, True]).expand(2, -1)
    garbage = torch.where(mask[..., None], x, torch.nan)
    with torch.no_grad():
        wanted = module(x[:, mask[0]]).output
        state = module.init_state(2)
        parts = [module(garbage[:, :5], mask=mask[:, :5], state=state), module(garbage[:, 5:], state=state)]
    assert_close(torch.cat([p.output for p in parts], 1)[:, mask[0]], wanted)


def test_what_a_summary_cannot_give_is_refused() -> None:
    module, x = built(), tokens(4)
    state = module.init_state(2)
    module(x, state=state)
    with pytest.raises(ValueError, match="aaren: need_weights=True was given with a state of 4 tokens"):
        module(x, state=state, need_weights=True)
    with pytest.raises(ValueError, match="aaren cannot be built with causal=False"):
        Aaren(12, 3, causal=False)


def test_bfloat16_sums_in_float32_and_large_inputs_stay_finite() -> None:
    torch.manual_seed(0)
    module = Aaren(16, 2, chunk=8).bfloat16()
    x = torch.randn(1, 700, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    state = module.init_state(1)
    with torch.no_grad():
        found = module(x, state=state).output
        wanted = module.double()(x.double()).output
        assert_close(found.double(), wanted, rtol=0.05, atol=0.02)
        assert {t.dtype for t in state.fixed.values()} == {torch.float32}
        assert module.float()(1e4 * x.float()).output.isfinite().all()
