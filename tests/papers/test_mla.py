"""Multi-head latent attention: the equation as loops, DeepSeek-V2's attention, and the absorbed form."""

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding

from manyheads.mechanisms.projection.mla import MLA

close = torch.testing.assert_close
SIZES = {"kv_lora_rank": 10, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 5}


def turned(vector: Tensor, position: int, base: float) -> Tensor:
    """Features (2p, 2p + 1) as a complex number, turned by position * base^(-2p / size)."""
    out = []
    for p in range(len(vector) // 2):
        angle = position * base ** (-2 * p / len(vector))
        z = complex(float(vector[2 * p]), float(vector[2 * p + 1])) * cmath.exp(1j * angle)
        out += [z.real, z.imag]
    return torch.tensor(out, dtype=vector.dtype)


def normed(vector: Tensor, weight: Tensor) -> Tensor:
    return vector / math.sqrt(float((vector**2).mean()) + 1e-6) * weight


def loops(module: MLA, x: Tensor, causal: bool, positions: list[int], base: float) -> Tensor:
    """One sequence x [n, dim]."""
    nope, rope, value, rank = module.nope, module.rope, module.value, module.rank
    mixed = torch.zeros(len(x), module.heads * value, dtype=x.dtype)
    rows = [module.kv_a_proj.weight @ token for token in x]
    latents = [normed(row[:rank], module.kv_a_norm.weight) for row in rows]
    shared = [turned(row[rank:], p, base) for row, p in zip(rows, positions, strict=True)]
    if isinstance(module.q_proj, torch.nn.Sequential):
        down, norm, up = module.q_proj
        queries = [up.weight @ normed(down.weight @ token, norm.weight) for token in x]
    else:
        queries = [module.q_proj.weight @ token for token in x]
    for head in range(module.heads):
        expand = module.kv_b_proj.weight[head * (nope + value) : (head + 1) * (nope + value)]
        for i in range(len(x)):
            q = queries[i][head * (nope + rope) : (head + 1) * (nope + rope)]
            q_rope = turned(q[nope:], positions[i], base)
            seen = range(i + 1 if causal else len(x))
            scores = [float(q[:nope] @ (expand[:nope] @ latents[j]) + q_rope @ shared[j]) for j in seen]
            powers = [math.exp(score / math.sqrt(nope + rope)) for score in scores]
            for j, power in zip(seen, powers, strict=True):
                mixed[i, head * value : (head + 1) * value] += power / sum(powers) * (expand[nope:] @ latents[j])
    return mixed @ module.o_proj.weight.T


def _module(causal: bool = True, **settings: Any) -> MLA:
    torch.manual_seed(0)
    module = MLA(16, 4, causal=causal, **{**SIZES, **settings}).double()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim == 1 and "bias" not in name:
                weight.add_(0.3 * torch.randn(weight.shape))
    return module


@pytest.mark.parametrize("sizes", [{}, {"v_head_dim": 9}, {"kv_lora_rank": 2}])
@pytest.mark.parametrize("q_rank", [None, 6])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(causal: bool, q_rank: int | None, sizes: dict[str, int]) -> None:
    module, x = _module(causal, q_lora_rank=q_rank, base=30.0, **sizes), torch.randn(1, 6, 16, dtype=torch.float64)
    positions = [3, 4, 5, 9, 10, 11]
    wanted = loops(module, x[0], causal, positions, 30.0)
    for need in (False, True):
        output = module(x, positions=torch.tensor(positions), need_weights=need).output
        close(output[0], wanted, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_defaults_equal_loops() -> None:
    torch.manual_seed(1)
    module, x = MLA(16, 2, causal=True).double(), torch.randn(1, 5, 16, dtype=torch.float64)
    assert (module.rank, module.nope, module.rope, module.value) == (32, 8, 4, 8)
    close(module(x).output[0], loops(module, x[0], True, list(range(5)), 10000.0), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("q_rank", [None, 12])
def test_equals_deepseek_v2(q_rank: int | None) -> None:
    """Copied weights, biases where it has them, values and weights, with a left-padded row."""
    torch.manual_seed(2)
    sizes = {"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "q_lora_rank": q_rank}
    config = DeepseekV2Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
        **sizes,
    )
    theirs, embed = DeepseekV2Attention(config, 0).double().eval(), DeepseekV2RotaryEmbedding(config)
    ours = MLA(32, 4, causal=True, base=500.0, bias=True, **sizes).double()
    renamed = {"kv_a_proj_with_mqa": "kv_a_proj", "kv_a_layernorm": "kv_a_norm"}
    renamed |= {"q_a_proj": "q_proj.0", "q_a_layernorm": "q_proj.1", "q_b_proj": "q_proj.2"}
    renamed |= {same: same for same in ("q_proj", "kv_b_proj", "o_proj")}
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape))
    split = [(*name.rsplit(".", 1), weight) for name, weight in theirs.state_dict().items()]
    ours.load_state_dict({f"{renamed[layer]}.{kind}": weight for layer, kind, weight in split})
    x, positions = torch.randn(2, 7, 32, dtype=torch.float64), torch.tensor([[0, 0, 0, 1, 2, 3, 4], [*range(7)]])
    mask = torch.tensor([[False, False, *[True] * 5], [True] * 7])
    allowed = mask[:, None, None] & torch.ones(7, 7, dtype=torch.bool).tril()
    added = torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(~allowed, -1e300)
    with torch.no_grad():
        wanted, attention = theirs(x, added, position_embeddings=embed(x, positions))
        result = ours(x, mask=mask, positions=positions, need_weights=True)
        fast = ours(x, mask=mask, positions=positions).output
    # The rotary part is float32 in theirs.
    close(result.output[mask], wanted[mask], rtol=1e-5, atol=1e-5)
    close(fast[mask], wanted[mask], rtol=1e-5, atol=1e-5)
    close(result.weights.transpose(1, 2)[mask], attention.transpose(1, 2)[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"kv_lora_rank": 40}, {"kv_lora_rank": 3}])
@pytest.mark.parametrize("chunks", [[1] * 11, [4, 1, 6], [11]])
@torch.no_grad()
def test_absorbed_equals_expanded(monkeypatch: pytest.MonkeyPatch, chunks: list[int], sizes: dict[str, int]) -> None:
    """Both ways through a state, with padding, against one pass; weights too."""
    module, x = _module(q_lora_rank=6, **sizes), torch.randn(2, 11, 16, dtype=torch.float64)
    mask = torch.arange(11)[None] >= torch.tensor([[3], [0]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = module(x, mask=mask, positions=positions, need_weights=True)
    for absorb in (True, False):
        monkeypatch.setattr(module, "_absorbing_pays", lambda n, absorb=absorb: absorb)
        for need in (True, False):
            state, start = module.init_state(2), 0
            for size in chunks:
                part = slice(start, start + size)
                result = module(
                    x[:, part], mask=mask[:, part], positions=positions[:, part], state=state, need_weights=need
                )
                close(result.output[mask[:, part]], wanted.output[:, part][mask[:, part]], rtol=1e-12, atol=1e-12)
                if need:
                    seen = wanted.weights[:, :, part, : start + size]
                    close(result.weights[1], seen[1], rtol=1e-12, atol=1e-12)
                start += size


def test_absorbed_gradients_equal_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = _module(), torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    grads = []
    for absorb in (True, False):
        monkeypatch.setattr(module, "_absorbing_pays", lambda n, absorb=absorb: absorb)
        output = module(x, state=module.init_state(2)).output
        grads.append(torch.autograd.grad(output.square().sum(), [x, *module.parameters()]))
    for one, other in zip(*grads, strict=True):
        close(one, other, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_the_state_is_latents_and_a_step_expands_none(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    module = MLA(64, 4, causal=True)
    state, x, expanded = module.init_state(2, capacity=20), torch.randn(2, 20, 64), []
    expand = module._expanded
    # Watched from without: a hook on W_kvb would have to act, and so make the keys expand.
    monkeypatch.setattr(module, "_expanded", lambda *given: expanded.append(1) or expand(*given))
    for i in range(20):
        module(x[:, i : i + 1], state=state)
    assert not expanded
    assert state.nbytes == 2 * 20 * (module.rank + module.rope) * 4
    module(x)
    assert expanded


def test_the_cheaper_way_is_taken() -> None:
    """DeepSeek-V2's sizes: expanding 512 into 128 + 128 per head pays for itself from 171 queries on."""
    module = MLA(16, 1, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    assert module._absorbing_pays(170)
    assert not module._absorbing_pays(171)
    assert MLA(16, 1, kv_lora_rank=4, qk_nope_head_dim=16, qk_rope_head_dim=2, v_head_dim=16)._absorbing_pays(10**6)


@torch.no_grad()
def test_no_matrix_of_weights_without_asking() -> None:
    """Values of another size than keys still go through the kernel that holds no [n, m] matrix."""
    module, x = _module(), torch.randn(1, 300, 16, dtype=torch.float64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        module(x)
    largest = max(event.self_cpu_memory_usage for event in trace.events())
    assert largest < 4 * 300 * 300 * 8 / 2


def test_refusals() -> None:
    with pytest.raises(ValueError, match="qk_rope_head_dim=3 must be even"):
        MLA(16, 4, qk_rope_head_dim=3)
    with pytest.raises(ValueError, match="kv_lora_rank=0"):
        MLA(16, 4, kv_lora_rank=0)
    with pytest.raises(ValueError, match="not divisible by heads=3"):
        MLA(16, 3)
    assert MLA(16, 3, **SIZES).heads == 3
