"""Lightning: decayed linear attention as loops, its three forms, and parity with the MiniMax model's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from manyheads.functional.linear import Kernel, causal_read
from manyheads.mechanisms.linear.lightning import Lightning, head_slopes, simple_rms_norm


def built(*, seed: int = 0, **config: object) -> Lightning:
    torch.manual_seed(seed)
    module = Lightning(12, 3, **config).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)
    return module


def tokens(n: int, *, batch: int = 2, seed: int = 5) -> Tensor:
    return torch.randn(batch, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop_lightning(module: Lightning, x: Tensor, slopes: list[float]) -> Tensor:
    """The recurrence with a loop over tokens and heads: M <- exp(-slope) M + k v^T, a = q M."""
    d, out = module.head_dim, torch.zeros_like(x)
    q, k = (t * torch.sigmoid(t) for t in (x @ module.q_proj.weight.T, x @ module.k_proj.weight.T))
    v, u = x @ module.v_proj.weight.T, x @ module.u_proj.weight.T
    for b in range(x.shape[0]):
        memory = [torch.zeros(d, d, dtype=x.dtype) for _ in slopes]
        for i in range(x.shape[1]):
            for h, slope in enumerate(slopes):
                part = slice(h * d, (h + 1) * d)
                memory[h] = math.exp(-slope) * memory[h] + torch.outer(k[b, i, part], v[b, i, part])
                out[b, i, part] = q[b, i, part] @ memory[h]
            root = math.sqrt(sum(e * e for e in out[b, i].tolist()) / module.dim + 1e-6)
            out[b, i] *= u[b, i] / root
    return out @ module.o_proj.weight.T


@pytest.mark.parametrize("decay_scale", [1.0, 0.3])
def test_equals_the_equation(decay_scale: float) -> None:
    module, x = built(decay_scale=decay_scale, chunk=3), tokens(8)
    # Three heads: two slopes of two heads, and the first in between.
    slopes = [decay_scale * s for s in (2.0**-4, 2.0**-8, 2.0**-2)]
    with torch.no_grad():
        assert_close(module(x).output, loop_lightning(module, x, slopes), rtol=1e-10, atol=1e-10)


def test_slopes_are_those_of_alibi() -> None:
    assert head_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert head_slopes(1) == [2.0**-8]
    assert head_slopes(12) == [2.0**-h for h in range(1, 9)] + [2.0 ** -(h + 0.5) for h in range(4)]
    assert all(len(head_slopes(h)) == h for h in range(1, 40))


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


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_tokens_that_are_not_there_neither_count_nor_age(chunk: int) -> None:
    module, x = built(chunk=chunk), tokens(8)
    mask = torch.tensor([True, False, True, False, False, True, True, True]).expand(2, -1)
    garbage = torch.where(mask[..., None], x, torch.nan)
    with torch.no_grad():
        wanted = module(x[:, mask[0]]).output
        for need_weights in (False, True):
            whole = module(garbage, mask=mask, need_weights=need_weights).output
            assert_close(whole[:, mask[0]], wanted)
        state = module.init_state(2)
        parts = [module(garbage[:, :5], mask=mask[:, :5], state=state), module(garbage[:, 5:], state=state)]
    assert_close(torch.cat([p.output for p in parts], 1)[:, mask[0]], wanted)


def test_decay_zero_keeps_all_and_a_huge_decay_only_the_token_itself() -> None:
    x = tokens(9)
    with torch.no_grad():
        keeps = built(decay_scale=0.0)(x, need_weights=True).weights
        forgets = built(decay_scale=1e6)(x, need_weights=True).weights
        module = built()
        q, k = (
            torch.nn.functional.silu(p(x)).unflatten(-1, (3, 4)).transpose(1, 2) for p in (module.q_proj, module.k_proj)
        )
    assert_close(keeps, (q @ k.mT).tril())
    assert_close(forgets, torch.diag_embed((q * k).sum(-1)))


def test_the_norm_has_no_weight_and_takes_all_heads_at_once() -> None:
    x = torch.randn(5, 12, dtype=torch.float64)
    rms = torch.nn.functional.rms_norm
    assert_close(simple_rms_norm(x), rms(x, (12,), eps=1e-6))
    assert_close(simple_rms_norm(1e-3 * x), rms(1e-3 * x, (12,), eps=1e-6))
    assert_close(simple_rms_norm(1e30 * x.float()).double(), rms(x, (12,)), rtol=1e-5, atol=1e-5)
    module, x = built(), tokens(6)
    with torch.no_grad():
        before = module(x).output
        module.v_proj.weight.mul_(7.0)
        assert_close(module(x).output, before, rtol=1e-3, atol=1e-3)
        module.v_proj.weight[:4].mul_(7.0)  # one head alone does change the share of the others
        assert (module(x).output - before).abs().max() > 0.1
    assert len(list(module.parameters())) == 5


def test_the_decayed_sum_equals_that_of_minimax() -> None:
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    torch.manual_seed(0)
    config = MiniMaxConfig(
        hidden_size=16, num_attention_heads=4, num_hidden_layers=3, block_size=8, layer_types=["linear_attention"] * 3
    )
    theirs = MiniMaxLightningAttention(config, layer_idx=1).eval()
    x, seen = torch.randn(2, 21, 16), []
    theirs.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        theirs(x, position_embeddings=None, attention_mask=None)
        q, k, v = theirs.act_fn(theirs.qkv_proj(x)).unflatten(-1, (4, 12)).transpose(1, 2).split(4, -1)
        scale = 1 - 1 / (2 + 1e-5) + 1e-5
        slopes = torch.tensor(Lightning(16, 4, decay_scale=scale).slopes)
        mixed, _, _ = causal_read(q, k, v, Kernel(floor=None), slopes=slopes, chunk=5)
    assert_close(mixed.transpose(1, 2).flatten(-2), seen[0])


def test_what_a_summary_cannot_give_is_refused() -> None:
    module, x = built(), tokens(4)
    state = module.init_state(2)
    module(x, state=state)
    with pytest.raises(ValueError, match="lightning: need_weights=True was given with a state of 4 tokens"):
        module(x, state=state, need_weights=True)
    for value in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="lightning: decay_scale="):
            Lightning(12, 3, decay_scale=value)


def test_bfloat16_sums_in_float32_and_large_inputs_stay_finite() -> None:
    torch.manual_seed(0)
    module = Lightning(16, 2, chunk=8).bfloat16()
    x = torch.randn(1, 700, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    state = module.init_state(1)
    with torch.no_grad():
        found = module(x, state=state).output
        wanted = module.double()(x.double()).output
        assert_close(found.double(), wanted, rtol=0.05, atol=0.05)
        assert state.fixed["memory"].dtype == torch.float32
        assert module.float()(1e4 * x.float()).output.isfinite().all()
