"""What the `Weights:` lines say: the released code's arithmetic on tensors in its own layout, written here as it stands
there, against the mechanism that was given them as its line tells."""

from __future__ import annotations

import inspect
import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from manyheads.mechanisms.linear.inline import InLine
from manyheads.mechanisms.linear.lightning import Lightning
from manyheads.mechanisms.mixing.moa import MixtureOfAttentionHeads
from manyheads.mechanisms.position.music_transformer import MusicTransformer
from manyheads.mechanisms.position.rcmha import RCMHA
from manyheads.mechanisms.projection.dual import Dual
from manyheads.mechanisms.recurrent.h3 import H3
from manyheads.mechanisms.recurrent.mega import Mega
from manyheads.mechanisms.scoring.gaussian_adaptive import GaussianAdaptive
from manyheads.mechanisms.scoring.neural_attention import NeuralAttention
from manyheads.mechanisms.selection.mosa import MoSA
from manyheads.mechanisms.selection.seqboat import SeqBoat
from manyheads.mechanisms.tokens.agent import Agent
from manyheads.registry import list_attentions, mechanism_class

N, DIM, HEADS, D = 7, 12, 3, 4


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tokens(n: int = N, dim: int = DIM) -> Tensor:
    torch.manual_seed(1)
    return randn(1, n, dim)


def split(rows: Tensor, heads: int = HEADS) -> Tensor:
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(rows: Tensor) -> Tensor:
    return rows.transpose(1, 2).flatten(-2)


def ema_of_the_code(x: Tensor, delta: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """MultiHeadEMA's kernel, delta, alpha, beta [dim, ndim, 1], gamma [dim, ndim]; one direction."""
    p = delta.sigmoid()
    q = 1 - p * alpha.sigmoid()
    lags = torch.arange(x.shape[1], dtype=torch.float64)
    kernel = torch.einsum("dnl,dn->dl", p * beta * (lags * q.log()).exp(), gamma * gamma.shape[1] ** -0.5)
    rows = [sum(kernel[:, lag] * x[:, t - lag] for lag in range(t + 1)) for t in range(x.shape[1])]
    return torch.stack(rows, 1)


def give_ema(module: Mega | SeqBoat) -> list[Tensor]:
    """delta, alpha, beta, gamma as the code names them; the module's are set to the same."""
    torch.manual_seed(0)
    delta, alpha, beta = (randn(DIM, 3, 1) for _ in range(3))
    gamma = randn(DIM, 3)
    own = (
        (module.ema_alpha, delta),
        (module.ema_delta, alpha),
        (module.ema_beta, beta),
        (module.ema_eta, gamma[..., None]),
    )
    for mine, theirs in own:
        mine.copy_(theirs[None, :, :, 0])
    return [delta, alpha, beta, gamma]


@torch.no_grad()
def test_mega_reads_the_released_moving_average_and_gates() -> None:
    """Its block's norm is the identity here, so that the residual before and behind it are one."""
    module, x = Mega(DIM, 1, causal=True, chunk=None, ema_dim=3, z_dim=4, v_dim=6).double(), tokens()
    parameters = give_ema(module)
    mx_proj, bias, gamma, beta, rotary_alpha, rotary_beta = (
        randn(2 * DIM + 10, DIM), randn(2 * DIM + 10), randn(2, 4), randn(2, 4), randn(4), randn(4)
    )  # fmt: skip
    for mine, theirs in (
        (module.ema_proj.weight, mx_proj), (module.ema_proj.bias, bias), (module.kappa, gamma), (module.mu, beta),
        (module.place[0, 0], rotary_alpha), (module.place[1, 0], rotary_beta),
    ):  # fmt: skip
        mine.copy_(theirs)
    mx = F.silu(ema_of_the_code(x, *parameters) + module.omega * x)
    u, zr, hx = (mx @ mx_proj.T + bias).split([DIM, 10, DIM], -1)
    z, r = F.silu(zr).split([4, 6], -1)
    q, k = (z[:, :, None] * gamma + beta).unbind(2)

    def turned(row: Tensor) -> Tensor:
        angle = torch.arange(N)[:, None] * torch.exp(torch.arange(2) * -(math.log(10000) / 2))
        one, other = row.expand(N, 4).chunk(2, -1)
        return torch.cat([one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()], 1)

    scores = q @ k.mT * 4**-0.5 + turned(rotary_alpha) @ turned(rotary_beta).T
    weights = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1)
    h = weights @ F.silu(module.v_proj(x))
    h = F.silu(hx + module.h_proj(h * r))
    assert_close(module(x).output, x + u.sigmoid() * (h - x), rtol=1e-5, atol=1e-6)  # angles are float32's


@torch.no_grad()
def test_seqboat_reads_the_released_moving_average() -> None:
    module, x = SeqBoat(DIM, 1, causal=True, ema_dim=3).double(), tokens()
    parameters = give_ema(module)
    mx = F.silu(ema_of_the_code(x, *parameters) + module.omega * x)
    module.y_proj.weight[:2] = 0.0
    module.y_proj.bias[:2] = torch.tensor([1.0, 0.0])  # nobody is active
    u, hx = (mx @ module.y_proj.weight.T + module.y_proj.bias).split([2, DIM], -1)
    assert u.argmax(-1).eq(0).all()
    assert_close(module(x).output, F.silu(hx + x))


@torch.no_grad()
def test_h3_reads_the_released_kernels() -> None:
    torch.manual_seed(0)
    module, x = H3(DIM, HEADS, state_dim=4, taps=3).double(), tokens()
    inv_a_real, a_imag, log_dt = randn(HEADS, 2), randn(HEADS, 2), randn(HEADS) - 2
    b, c = (torch.complex(randn(HEADS, 2), randn(HEADS, 2)) for _ in range(2))
    shift_b, shift_c, shift_d, skip = randn(DIM, 3), randn(DIM, 3), randn(DIM), randn(HEADS)
    taps = torch.stack([sum(shift_b[:, s] * shift_c[:, s + lag] for s in range(3 - lag)) for lag in range(3)], 1)
    taps[:, 0] += shift_d
    for mine, theirs in (
        (module.log_decay, inv_a_real), (module.turn, a_imag), (module.log_step, log_dt), (module.taps, taps),
        (module.read, torch.view_as_real(b * c)), (module.skip, skip),
    ):  # fmt: skip
        mine.copy_(theirs)
    q, k, v = (p(x)[0].T for p in (module.q_proj, module.k_proj, module.v_proj))  # [dim, n]
    b_f, c_f = (torch.fft.rfft(t, n=6) for t in (shift_b, shift_c))
    shift = F.pad(torch.fft.irfft(b_f.conj() * c_f, n=6)[:, :3], (0, N - 3))
    k = (
        torch.stack([sum(shift[:, lag] * k[:, t - lag] for lag in range(t + 1)) for t in range(N)], 1)
        + shift_d[:, None] * k
    )
    a = torch.complex(-inv_a_real.exp(), a_imag)
    dta = a * log_dt.exp()[:, None]
    factor = b * c * (dta.exp() - 1) / a
    kernel = 2 * (factor[..., None] * (dta[..., None] * torch.arange(N)).exp()).real.sum(1)
    q, k, v = (t.unflatten(0, (HEADS, D)) for t in (q, k, v))
    kv = k[:, :, None] * v[:, None]
    y = torch.stack([sum(kernel[:, lag, None, None] * kv[..., t - lag] for lag in range(t + 1)) for t in range(N)], -1)
    y = ((y + kv * skip[:, None, None, None]) * q[:, :, None]).sum(1)  # [h, d2, n]
    code_order = y.transpose(0, 1).flatten(0, 1).T  # (d h)
    output_linear = randn(DIM, DIM)
    module.o_proj.weight.copy_(output_linear.unflatten(1, (D, HEADS)).transpose(1, 2).flatten(1))
    assert_close(module(x).output[0], code_order @ output_linear.T + module.o_proj.bias)


@torch.no_grad()
def test_neural_attention_reads_the_released_projection() -> None:
    torch.manual_seed(0)
    module, x = NeuralAttention(DIM, HEADS, score_dim=2).double(), tokens()
    to_qkv, linear1, linear2, linear3 = randn(3 * DIM, DIM), randn(2, 4), randn(1, 2), randn(1, 1)
    for s, projection in enumerate((module.q_proj, module.k_proj, module.v_proj)):
        for h in range(HEADS):
            for i in range(D):
                projection.weight[h * D + i] = to_qkv[(3 * i + s) * HEADS + h]
    for layer, weight in ((module.first, linear1), (module.second, linear2), (module.third, linear3)):
        layer.weight.copy_(weight)
    q, k, v = (x @ to_qkv.T).view(N, D, 3, HEADS).permute(2, 3, 0, 1)
    q, k = module.query_in(q), module.key_in(k)
    pairs = torch.cat([q[:, :, None].expand(-1, -1, N, -1), k[:, None].expand(-1, N, -1, -1)], -1)
    hidden = (pairs @ linear1.T + module.first.bias).relu()
    scores = ((hidden @ linear2.T + module.second.bias).relu() @ linear3.T)[..., 0]
    wanted = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ module.o_proj.weight.T
    assert_close(module(x).output[0], wanted)


@torch.no_grad()
def test_mosa_reads_the_released_experts() -> None:
    torch.manual_seed(0)
    module, x = MoSA(DIM, HEADS, top_k=N).double(), tokens()
    qkv, out = randn(HEADS, DIM, 3 * D), randn(HEADS, D, DIM)
    for h in range(HEADS):
        own = slice(h * D, h * D + D)
        for s, projection in enumerate((module.q_proj, module.k_proj, module.v_proj)):
            projection.weight[own] = qkv[h, :, s * D : s * D + D].T
        module.o_proj.weight[:, own] = out[h].T
    q, k, v = torch.einsum("ki,eij->ekj", x[0], qkv).chunk(3, -1)
    mixed = F.scaled_dot_product_attention(q, k, v) * module.router(x)[0].T.sigmoid()[..., None]
    assert_close(module(x).output[0], torch.einsum("ekj,eji->ki", mixed, out))


@torch.no_grad()
def test_mixture_of_attention_heads_reads_the_released_experts() -> None:
    torch.manual_seed(0)
    module, x = MixtureOfAttentionHeads(DIM, HEADS, active=2, head_dim=D).double(), tokens()
    w_gate, experts, output_experts = randn(DIM, HEADS), randn(HEADS, DIM, D), randn(HEADS, D, DIM)
    for mine, theirs in (
        (module.router.weight, w_gate.T), (module.q_experts, experts), (module.o_experts, output_experts)
    ):  # fmt: skip
        mine.copy_(theirs)
    gates, chosen = (x[0] @ w_gate).softmax(1).topk(2, 1)
    k, v = module.k_proj(x[0]), module.v_proj(x[0])
    wanted = torch.zeros(N, DIM, dtype=torch.float64)
    for i in range(N):
        for gate, e in zip(gates[i], chosen[i].tolist(), strict=True):
            mixed = (x[0, i] @ experts[e] * D**-0.5 @ k.T).softmax(-1) @ v
            wanted[i] += gate * (mixed @ output_experts[e])
    assert_close(module(x).output[0], wanted)


@torch.no_grad()
def test_music_transformer_reads_released_rows_backwards() -> None:
    torch.manual_seed(0)
    module, x = MusicTransformer(DIM, HEADS, causal=True, max_distance=9).double(), tokens()
    table = randn(HEADS, 9, D)
    module.distances.copy_(table.flip(1))
    q, k, v = (split(p(x)) for p in (module.q_proj, module.k_proj, module.v_proj))
    q = q * D**-0.5
    logits = F.pad(torch.einsum("bhld,hmd->bhlm", q, table[:, 9 - N :]), (1, 0)).view(1, HEADS, N + 1, N)[:, :, 1:]
    scores = (q @ k.mT + logits).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    assert_close(module(x).output, module.o_proj(joined(scores.softmax(-1) @ v)))


@torch.no_grad()
def test_rcmha_reads_the_released_tables() -> None:
    torch.manual_seed(0)
    module, x, half = RCMHA(DIM, HEADS, max_length=9).double(), tokens(), 10
    embeddings, biases = randn(2 * half, HEADS, D), randn(2 * half, HEADS)
    for r in range(-8, 9):
        module.distances[:, 8 + r] = embeddings[half + r]
        module.distance_bias[:, 8 + r] = biases[half + r]
    module.query_bias.normal_()
    module.o_proj.weight.copy_(torch.eye(DIM))

    def convolve(rows: Tensor, conv: torch.nn.Conv1d) -> Tensor:
        rows = split(rows)[0].transpose(1, 2)  # [h, d, n]
        return F.conv1d(rows, conv.weight, conv.bias, padding=2, groups=D)[..., :-2].permute(2, 0, 1)

    q, k, v = (
        convolve(projection(x), conv)
        for projection, conv in (
            (module.q_proj, module.q_conv), (module.k_proj, module.k_conv), (module.v_proj, module.v_conv)
        )
    )  # fmt: skip
    rows = slice(half - N, half + N)
    by_distance = torch.einsum("ihd,jhd->ijh", q, embeddings[rows]) + biases[None, rows]
    padded = torch.cat([by_distance, by_distance.new_zeros(N, 1, HEADS)], 1).view(2 * N + 1, N, HEADS)
    shifted = padded[:-1].reshape(N, 2 * N, HEADS)[:, -N:]
    scores = torch.einsum("ihd,jhd->ijh", q + module.query_bias, k) + shifted
    mixed = torch.einsum("ijh,jhd->ihd", (scores * D**-0.5).softmax(1), v).flatten(1)
    assert_close(module(x).output[0], mixed + module.o_proj.bias)


@torch.no_grad()
def test_agent_reads_the_released_biases() -> None:
    torch.manual_seed(0)
    agents, window = 4, 5
    module, x = Agent(DIM, HEADS, agents=agents, window=window).double(), randn(1, window, window, DIM)
    an, na = randn(HEADS, agents, 7, 7), randn(HEADS, agents, 7, 7)
    ah, aw = randn(1, HEADS, agents, window, 1), randn(1, HEADS, agents, 1, window)
    ha, wa = randn(1, HEADS, window, 1, agents), randn(1, HEADS, 1, window, agents)
    module.block_bias.copy_(torch.stack([an, na]))
    module.line_bias[0, 0], module.line_bias[0, 1] = ah[0, ..., 0], aw[0, :, :, 0]
    module.line_bias[1, 0], module.line_bias[1, 1] = ha[0, :, :, 0].mT, wa[0, :, 0].mT
    q, k, v = (p(x) for p in (module.q_proj, module.k_proj, module.v_proj))
    a = F.adaptive_avg_pool2d(q.permute(0, 3, 1, 2), 2).flatten(2).mT
    q, k, values, a = (split(t.flatten(1, -2)) for t in (q, k, v, a))

    def grown(bias: Tensor) -> Tensor:
        return F.interpolate(bias, size=(window, window), mode="bilinear").reshape(1, HEADS, agents, -1)

    asking = grown(an) + (ah + aw).reshape(1, HEADS, agents, -1)
    answering = grown(na).mT + (ha + wa).reshape(1, HEADS, -1, agents)
    found = ((a * D**-0.5) @ k.mT + asking).softmax(-1) @ values
    mixed = joined(((q * D**-0.5) @ a.mT + answering).softmax(-1) @ found).view(x.shape)
    mixed = mixed + module.dwc(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert_close(module(x).output, module.o_proj(mixed))


@torch.no_grad()
def test_joint_projections_come_apart_in_the_order_of_the_code() -> None:
    """qkv of InLine, qkvu of TransNormerLLM."""
    torch.manual_seed(0)
    module, x, joint = InLine(DIM, HEADS).double(), randn(1, 3, 3, DIM), randn(3 * DIM, DIM)
    for projection, rows in zip((module.q_proj, module.k_proj, module.v_proj), joint.chunk(3), strict=True):
        projection.weight.copy_(rows)
        projection.bias.zero_()
    q, k, v = (x.flatten(1, 2) @ joint.T).reshape(1, 9, 3, DIM).permute(2, 0, 1, 3)
    kernel = module.near_out(F.gelu(module.near_in(x.mean((1, 2))[..., None]))).reshape(DIM, 1, 3, 3)
    near = F.conv2d(v.mT.view(1, DIM, 3, 3), kernel, padding=1, groups=DIM).flatten(2).mT
    q, k, v = (split(t) for t in (q, k, v))
    mixed = q @ (k.mT @ v) * D**-0.5 / 9 + (1 - q @ k.mean(2, keepdim=True).mT * D**-0.5) * v.mean(2, keepdim=True)
    assert_close(module(x).output.flatten(1, 2), module.o_proj(joined(mixed) + near))

    light, x, joint = Lightning(DIM, HEADS).double(), tokens(), randn(4 * DIM, DIM)
    own = (light.q_proj, light.k_proj, light.v_proj, light.u_proj)
    for projection, rows in zip(own, joint.chunk(4), strict=True):
        projection.weight.copy_(rows)
    q, k, v, u = (x @ joint.T).chunk(4, -1)
    matrix = light(x, need_weights=True).weights
    scores = split(F.silu(q)) @ split(F.silu(k)).mT
    assert_close((matrix / scores).diagonal(0, -2, -1), torch.ones(1, HEADS, N, dtype=torch.float64))
    decay = (matrix / scores).masked_fill(torch.ones(N, N).triu(1).bool(), 0.0)
    mixed = joined((scores * decay) @ split(v))
    mixed = mixed * mixed.square().mean(-1, keepdim=True).rsqrt()
    assert_close(light(x).output, light.o_proj(u * mixed), rtol=1e-4, atol=1e-4)  # eps apart


@torch.no_grad()
def test_dual_reads_the_released_branches() -> None:
    torch.manual_seed(0)
    module, x = Dual(DIM, HEADS, relational_heads=2, relations=2, symbols=5).double(), tokens()
    wq, wk, wq_attn, wk_attn, wr = randn(D, DIM), randn(D, DIM), randn(2 * D, DIM), randn(2 * D, DIM), randn(2, D, 2)
    module.q_proj.weight.copy_(torch.cat([wq, wq_attn]))
    module.k_proj.weight.copy_(torch.cat([wk, wk_attn]))
    module.relation_mix.copy_(wr)
    own = (x @ wq.T @ (x @ wk.T).mT * D**-0.5).softmax(-1) @ module.v_proj(x)
    alpha = (split(x @ wq_attn.T, 2) @ split(x @ wk_attn.T, 2).mT * D**-0.5).softmax(-1)
    relations = split(module.relation_q_proj(x), 2) @ split(module.relation_k_proj(x), 2).mT * D**-0.5
    symbols = split(module.symbol_proj(module._symbols(x)), 2)
    read = torch.einsum("bhij,brij->bihr", alpha, relations)
    mixed = torch.einsum("bihr,hdr->bihd", read, wr) + (alpha @ symbols).transpose(1, 2)
    assert_close(module(x).output, torch.cat([module.o_proj(own), module.relational_o_proj(mixed.flatten(-2))], -1))


@torch.no_grad()
def test_gaussian_adaptive_reads_each_released_head() -> None:
    torch.manual_seed(0)
    module, x = GaussianAdaptive(DIM, HEADS, gaussians=2).double(), tokens()
    offsets, c = randn(HEADS, 2), randn(HEADS, 2).exp()
    module.mean_offsets.copy_(offsets)
    module.widths.copy_(c)
    parts = []
    for h, part in enumerate(x.chunk(HEADS, -1)):
        mean, var = part.mean(1, keepdim=True), part.var(1, keepdim=True) + 1e-8
        product = torch.ones_like(part)
        for i in range(2):
            y = (part - mean - offsets[h, i]) / var.sqrt()
            product = product * (-(y**2) / (2 * c[h, i] ** 2)).exp()
        parts.append(part * product / product.sum(1, keepdim=True))
    assert_close(module(x).output, torch.cat(parts, -1))


def test_a_weights_line_speaks_of_parameters() -> None:
    """It begins a line: what is said of the matrix of attention weights says Matrix."""
    said = 0
    for name in list_attentions():
        text = inspect.getdoc(mechanism_class(name)) or ""
        found = re.findall(r"(?m)^(.*)\bWeights: ", text)
        assert found in ([], [""]), name
        said += len(found)
    assert said > 20
