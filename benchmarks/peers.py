"""Each mechanism against the best known package that has the same operator, with the same weights, on the CPU.

    python benchmarks/peers.py --make-env DIR        # torch, manyheads and the packages, once: 3 GB, two minutes
    DIR/bin/python benchmarks/peers.py               # every peer that is installed, in turns; the others are named
    ... --only mla lightning                         # some mechanisms, with no results file
    ... --check                                      # the comparison of outputs alone, at the shortest length

A peer is called as its users call it: as a module (an operator with our projections around it) or, where `what` says
so, as an operator alone. Before anything is timed the outputs of both sides, and the gradients of their inputs, must
agree within TOLERANCE of the largest entry: `equal` is the largest difference of outputs. Where a peer computes
something else by default, `differs` says what, and how the two were made equal; a row without `equal` compared shapes
alone. A peer that is red has no times. Rotary angles are handed to the peers of transformers, which compute them once
per model; ours computes them in the pass. One file, though a long one: a peer is a dozen lines, and the list of them
is the point.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import once, pair, save
from manyheads import Mechanism, create_attention

MEASURES = (
    "src/manyheads/mechanism.py",
    "src/manyheads/finite.py",
    "src/manyheads/shell.py",
    "src/manyheads/softmax.py",
    "src/manyheads/state.py",
    "src/manyheads/functional",
    "src/manyheads/mechanisms",
)

DIM, HEADS, D = 256, 8, 32
# Peers that hold several matrices [n, n], others, and mechanisms that hold none.
BRIEF, SHORT, LONG = (512, 1024), (512, 2048), (512, 2048, 4096)
TOLERANCE = 1e-4
SECONDS = 0.8  # what the rounds of one pair may take, at least five of them

# What --make-env installs beside the constraints file, all of them pinned.
PACKAGES = {
    "agent-attention-pytorch": "0.1.7",
    "dual-attention": "0.0.7",
    "entmax": "1.3",
    "fla-core": "0.6.0",
    "flamingo-pytorch": "0.1.2",
    "gaussian-adaptive-attention": "0.1.5",
    "linformer": "0.2.3",
    "local-attention": "1.11.2",
    "mega-pytorch": "0.1.0",
    "pytorch-nlp": "0.5.0",
    "routing-transformer": "1.6.1",
    "sinkhorn-transformer": "0.11.4",
    "taylor-series-linear-attention": "0.2.0",
    "titans-pytorch": "0.5.5",
    "torch-geometric": "2.8.1",
    "torchinfo": "1.8.0",  # which the block of clearvoice imports
    "torchmil": "1.0.2",
    "triton": "3.9.0",  # which fla imports, though its naive operators do without
    "x-transformers": "2.31.10",
}
# Of these a module or two is wanted, which imports none of the (old, or CUDA) packages that the whole asks for.
ALONE = {"clearvoice": "0.1.2", "espnet": "202511"}
# Builds itself from source, and would fetch a torch of its own to do so.
BUILT = {"natten": "0.21.7"}

# Known, and not to be had: (mechanism, package, reason).
ABSENT = [
    ("gqa", "grouped-query-attention-pytorch==0.3.0", "wants einops 0.6 and torchscale 0.2"),
    ("hyena", "nvsubquadratic==0.2.0", "wants torch 2.14 and torchvision"),
    ("hyena", "stripedhyena==0.2.2", "wants flash-attn, which builds with CUDA only; its filters are modal as well"),
    ("lightweight-convolution", "fairseq==0.12.2", "does not import on Python 3.11; ESPnet's port of it is timed"),
    ("mla", "multihead-latent-attention==0.1.0", "its forward pass raises"),
    ("moba", "fla-core==0.6.0", "its MoBA calls flash-attn, with no form for a CPU"),
    (
        "selective-temperature",
        "selective-self-attention==1.0.0",
        "its source archive lacks a file that its build reads",
    ),
]

Side = Callable[..., Tensor]


@dataclass
class Sides:
    """Two functions of the same inputs. gate: what is compared in place of them, where that cannot be."""

    ours: Side
    theirs: Side
    inputs: tuple[Tensor, ...]
    differs: str = ""
    what: str = "module"
    gate: tuple[Side, Side] | None = None
    equal: bool = True
    backward: bool = True


@dataclass(frozen=True)
class Peer:
    mechanism: str
    package: str
    lengths: tuple[int, ...]
    build: Callable[[int], Sides]


PEERS: list[Peer] = []


def peer(mechanism: str, package: str, lengths: tuple[int, ...] = SHORT) -> Callable[..., Any]:
    def registered(build: Callable[[int], Sides]) -> Callable[[int], Sides]:
        PEERS.append(Peer(mechanism, package, lengths, build))
        return build

    return registered


def create(name: str, heads: int = HEADS, **config: Any) -> Mechanism:
    return create_attention(name, DIM, heads, **config).eval()


def output(module: Mechanism) -> Side:
    return lambda *inputs: module(*inputs).output


def tokens(n: int, *shape: int, count: int = 1) -> tuple[Tensor, ...]:
    """Inputs [1, n, DIM], or [1, *shape]."""
    return tuple(torch.randn(1, *(shape or (n, DIM)), requires_grad=True) for _ in range(count))


@torch.no_grad()
def tie(*pairs: tuple[Any, Any]) -> None:
    """The first of each pair takes what the second has: tensors, or layers with weights of the same names."""
    for taker, giver in pairs:
        if isinstance(taker, nn.Module):
            taker.load_state_dict(giver.state_dict())
        else:
            assert taker.shape == giver.shape, f"{tuple(taker.shape)} cannot take {tuple(giver.shape)}"
            taker.copy_(giver)


def fill(value: float, *tensors: Tensor) -> None:
    for tensor in tensors:
        nn.init.constant_(tensor, value)


def doubled(sides: Callable[..., tuple[Side, Side]], *modules: nn.Module) -> tuple[Side, Side]:
    """The sides in float64, for a choice among scores: in float32 two of thousands are one now and then."""
    one, other = sides(*(copy.deepcopy(module).double() for module in modules))
    return lambda *inputs: one(*(x.double() for x in inputs)), lambda *inputs: other(*(x.double() for x in inputs))


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


def projections(names: str, *pairs: tuple[nn.Module, nn.Module]) -> None:
    for ours, theirs in pairs:
        tie(*((getattr(theirs, name), getattr(ours, name)) for name in names.split()))


# -- softmax and what it is made of ------------------------------------------------------------------------------------


@peer("softmax", "torch")
def _(n: int) -> Sides:
    ours, theirs = create("softmax", causal=True, bias=True), nn.MultiheadAttention(DIM, HEADS, batch_first=True).eval()
    parts = (ours.q_proj, ours.k_proj, ours.v_proj)
    tie(
        (theirs.in_proj_weight, torch.cat([part.weight for part in parts])),
        (theirs.in_proj_bias, torch.cat([part.bias for part in parts])),
        (theirs.out_proj, ours.o_proj),
    )
    future = nn.Transformer.generate_square_subsequent_mask(n)
    return Sides(
        output(ours),
        lambda x: theirs(x, x, x, attn_mask=future, is_causal=True, need_weights=False)[0],
        tokens(n),
    )


@peer("mqa", "x-transformers")
def _(n: int) -> Sides:
    return _x_transformers(create("mqa", causal=True), n, 1)


@peer("gqa", "x-transformers")
def _(n: int) -> Sides:
    return _x_transformers(create("gqa", kv_heads=2, causal=True), n, 2)


def _x_transformers(ours: Mechanism, n: int, kv_heads: int) -> Sides:
    from x_transformers.x_transformers import Attention

    theirs = Attention(DIM, dim_head=D, heads=HEADS, causal=True, kv_heads=kv_heads, flash=True).eval()
    # Its query head h reads key head h % kv_heads, ours h // (heads / kv_heads).
    order = torch.arange(HEADS).view(kv_heads, -1).T.flatten()
    features = (order[:, None] * D + torch.arange(D)).flatten()
    tie((theirs.to_q.weight, ours.q_proj.weight[features]), (theirs.to_out.weight, ours.o_proj.weight[:, features]))
    tie((theirs.to_k, ours.k_proj), (theirs.to_v, ours.v_proj))
    return Sides(output(ours), theirs, tokens(n))


@peer("gqa", "transformers")
def _(n: int) -> Sides:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    sizes = {"hidden_size": DIM, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, attn_implementation="sdpa")
    ours, theirs = create("gqa", kv_heads=2, causal=True, rotary={}), LlamaAttention(config, 0).eval()
    projections("q_proj k_proj v_proj o_proj", (ours, theirs))
    x = tokens(n)
    angles = LlamaRotaryEmbedding(config)(x[0], torch.arange(n)[None])
    return Sides(output(ours), lambda x: theirs(x, position_embeddings=angles)[0], x)


@peer("mla", "transformers")
def _(n: int) -> Sides:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding

    ours = create("mla", causal=True)
    config = DeepseekV2Config(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=None,
        kv_lora_rank=ours.rank,
        qk_nope_head_dim=ours.nope,
        qk_rope_head_dim=ours.rope,
        v_head_dim=ours.value,
        attn_implementation="sdpa",
    )
    theirs = DeepseekV2Attention(config, 0).eval()
    projections("q_proj kv_b_proj o_proj", (ours, theirs))
    tie((theirs.kv_a_proj_with_mqa, ours.kv_a_proj), (theirs.kv_a_layernorm, ours.kv_a_norm))
    x = tokens(n)
    angles = DeepseekV2RotaryEmbedding(config)(x[0], torch.arange(n)[None])
    return Sides(output(ours), lambda x: theirs(x, position_embeddings=angles)[0], x)


@peer("shaw", "transformers", BRIEF)
def _(n: int) -> Sides:
    from transformers import Wav2Vec2BertConfig
    from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

    config = Wav2Vec2BertConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=16,
        right_max_position_embeddings=16,
        attention_dropout=0.0,
        attn_implementation="sdpa",
    )
    ours, theirs = create("shaw", bias=True), Wav2Vec2BertSelfAttention(config).eval()
    names = zip(("q", "k", "v", "out"), "qkvo", strict=True)
    tie(*((getattr(theirs, f"linear_{a}"), getattr(ours, f"{b}_proj")) for a, b in names))
    tie((theirs.distance_embedding.weight, ours.key_table))
    fill(0.0, ours.value_table)
    return Sides(
        output(ours), lambda x: theirs(x)[0], tokens(n), "has no vectors for values: ours are zero, and computed"
    )


@peer("entmax", "entmax", (256, 512))
def _(n: int) -> Sides:
    from entmax import entmax_bisect

    from manyheads.functional.entmax import entmax

    beta = torch.randn(HEADS).sigmoid()[:, None, None].requires_grad_()
    return Sides(
        entmax,
        lambda scores, beta: entmax_bisect(scores, 1 + beta, dim=-1),
        (*tokens(n, HEADS, n, n), beta),
        what="operator",
    )


@peer("sinkhorn", "fla-core", (256, 512))
def _(n: int) -> Sides:
    from fla.ops.utils.sinkhorn.naive import naive_sinkhorn

    from manyheads.functional.sinkhorn import transport_plan

    return Sides(
        lambda logits: transport_plan(logits, None, 20),
        lambda logits: naive_sinkhorn(logits, 20),
        tokens(n, HEADS, n, n),
        what="operator",
    )


# -- selection ---------------------------------------------------------------------------------------------------------


@peer("dma", "transformers")
def _(n: int) -> Sides:
    from transformers import DogeConfig
    from transformers.models.doge.modeling_doge import DogeAttention, DogeRotaryEmbedding

    sizes = {"hidden_size": DIM, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config = DogeConfig(**sizes, keep_window_size=256, attn_implementation="sdpa")
    ours, theirs = create("dma", window=256, causal=True, rotary={}), DogeAttention(config, 0).eval()
    projections("q_proj k_proj v_proj o_proj", (ours, theirs))
    theirs.q_norm = theirs.k_norm = nn.Identity()
    fill(1.0, ours.amount, theirs.A)
    # exp(softplus(.)) of this is ours and 1.5, which no softmax and no choice of the largest sees.
    theirs.dt_proj = _Undone(ours.delta_proj)
    x = tokens(n)
    angles = DogeRotaryEmbedding(config)(x[0], torch.arange(n)[None])
    past = torch.ones(n, n, dtype=torch.bool).tril()[None, None]

    def sides(ours: Mechanism, theirs: nn.Module) -> tuple[Side, Side]:
        return output(ours), lambda x: theirs(x, position_embeddings=angles, attention_mask=past)[0]

    return Sides(
        *sides(ours, theirs),
        x,
        "norms q and k (made identities) and takes the exponential of the bias (undone in its projection)",
        gate=doubled(sides, ours, theirs),
    )


class _Undone(nn.Module):
    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, values: Tensor) -> Tensor:
        return (F.softplus(self.projection(values)) + 1.5).log().expm1().log()


@peer("mswa", "local-attention", LONG)
def _(n: int) -> Sides:
    ours = create("mswa", window=256, causal=True)
    quarters = [(part, _local(window)) for part, window in zip(range(0, HEADS, 2), ours.windows[::2], strict=True)]

    def theirs(x: Tensor) -> Tensor:
        q, k, v = (split(layer(x)) for layer in (ours.q_proj, ours.k_proj, ours.v_proj))
        found = [local(*(t[:, at : at + 2] for t in (q, k, v))) for at, local in quarters]
        return ours.o_proj(join(torch.cat(found, 1)))

    return Sides(output(ours), theirs, tokens(n), "one window per call: four calls, two heads each")


@peer("neighborhood", "local-attention", LONG)
def _(n: int) -> Sides:
    ours, local = create("neighborhood", window=64, causal=True), _local(64)

    def theirs(x: Tensor) -> Tensor:
        return ours.o_proj(join(local(*(split(layer(x)) for layer in (ours.q_proj, ours.k_proj, ours.v_proj)))))

    return Sides(output(ours), theirs, tokens(n))


def _local(window: int) -> nn.Module:
    """Its windows look back that far from a token, which it does not count."""
    from local_attention import LocalAttention

    return LocalAttention(
        window - 1, causal=True, look_backward=1, exact_windowsize=True, autopad=True, use_rotary_pos_emb=False
    )


@peer("neighborhood", "natten")
def _(n: int) -> Sides:
    from natten import na1d

    ours = create("neighborhood", window=63)

    def theirs(x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, D)) for layer in (ours.q_proj, ours.k_proj, ours.v_proj))
        return ours.o_proj(na1d(q, k, v, kernel_size=63).flatten(-2))

    return Sides(
        output(ours),
        theirs,
        tokens(n),
        "on a CPU it has FlexAttention alone, not compiled and without a backward pass",
        backward=False,
    )


@peer("routing-transformer", "routing-transformer", LONG)
def _(n: int) -> Sides:
    from routing_transformer.routing_transformer import KmeansAttention

    clusters = n // 64
    ours = create("routing-transformer", clusters=clusters, window=64, local_heads=0)
    kmeans = KmeansAttention(clusters, 64, HEADS, D).eval()
    with torch.no_grad():  # so that what a norm adds to the variance is nothing: theirs divides by the length alone
        ours.q_proj.weight.mul_(100)
        ours.k_proj.weight.mul_(100)
    tie((kmeans.kmeans.means, ours.centroids), (kmeans.kmeans.initted, torch.tensor(True)))

    def sides(ours: Mechanism, kmeans: nn.Module) -> tuple[Side, Side]:
        def theirs(x: Tensor) -> Tensor:
            q, k, v = (split(layer(x)) for layer in (ours.q_proj, ours.k_proj, ours.v_proj))
            return ours.o_proj(join(kmeans(F.layer_norm(q, (D,)), F.layer_norm(k, (D,)), v)[0]))

        return output(ours), theirs

    return Sides(
        *sides(ours, kmeans),
        tokens(n),
        "leaves q and k as they are: given normed ones",
        gate=doubled(sides, ours, kmeans),
    )


@peer("sparse-sinkhorn", "sinkhorn-transformer", LONG)
def _(n: int) -> Sides:
    from sinkhorn_transformer import sinkhorn_transformer as package

    package.sample_gumbel = lambda shape, device, dtype: torch.zeros(shape, device=device, dtype=dtype)
    sizes = {"dim": DIM, "dim_heads": D, "heads": HEADS, "max_seq_len": n}

    def built(iterations: int) -> tuple[Side, Side]:
        ours = create("sparse-sinkhorn", block=64, iterations=iterations, temperature=0.7)
        tie((ours.k_proj, ours.q_proj), (ours.v_proj, ours.q_proj))
        sort = package.SinkhornAttention(
            64, **sizes, temperature=0.7, non_permutative=False, sinkhorn_iter=iterations
        ).eval()

        def theirs(x: Tensor) -> Tensor:
            return ours.o_proj(join(sort(*(split(layer(x)) for layer in (ours.q_proj, ours.k_proj, ours.v_proj)))))

        return output(ours), theirs

    # Blocks that are alike but not equal, so that rows before columns and columns before rows soon agree.
    blocks = 1 + 0.3 * torch.randn(1, n // 64, 1, DIM)
    x = (blocks + torch.randn(1, n // 64, 64, DIM)).flatten(1, 2).requires_grad_()
    torch.manual_seed(1)
    gate = built(200)
    torch.manual_seed(1)
    return Sides(
        *built(8),
        (x,),
        "balances rows before columns, uses sorted keys as values and adds noise in evaluation: compared after 200 "
        "iterations with equal projections and no noise, timed at 8",
        gate=gate,
    )


# -- linear attention --------------------------------------------------------------------------------------------------


@peer("lightning", "transformers", LONG)
def _(n: int) -> Sides:
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    from manyheads.functional.linear import Kernel, causal_read

    config = MiniMaxConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_hidden_layers=3, layer_types=["linear_attention"] * 3
    )
    theirs = MiniMaxLightningAttention(config, 1).eval()
    slopes = theirs.slope_rate.flatten()

    def ours(x: Tensor) -> Tensor:
        q, k, v = split(theirs.act_fn(theirs.qkv_proj(x))).split(D, -1)
        mixed = theirs.norm(join(causal_read(q, k, v, Kernel(floor=None), slopes=slopes).mixed))
        return theirs.out_proj(theirs.output_gate(x).sigmoid() * mixed)

    return Sides(
        ours,
        lambda x: theirs(x, None, None)[0],
        tokens(n),
        "another block (silu on v, a norm with a weight, a sigmoid gate): the decayed sum is ours within its block",
    )


@peer("lightning", "fla-core", LONG)
def _(n: int) -> Sides:
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    from manyheads.functional.linear import Kernel, causal_read

    slopes = torch.tensor(create("lightning", causal=True).slopes)
    decay = -slopes.expand(1, n, HEADS)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return naive_chunk_simple_gla(q, k, v, decay, scale=1.0)[0].transpose(1, 2)

    return Sides(
        lambda q, k, v: causal_read(q, k, v, Kernel(floor=None), slopes=slopes).mixed,
        theirs,
        tokens(n, HEADS, n, D, count=3),
        what="operator",
    )


@peer("based", "fla-core", (512, 2048))
def _(n: int) -> Sides:
    from fla.ops.based.naive import naive_chunk_based

    from manyheads.functional.linear import causal_read
    from manyheads.mechanisms.linear.based import TAYLOR

    q, k = tokens(n, HEADS, n, 16, count=2)
    return Sides(
        lambda q, k, v: causal_read(q / 2, k / 2, v, TAYLOR).mixed,
        naive_chunk_based,
        (q, k, *tokens(n, HEADS, n, D)),
        what="operator",
    )


@peer("based", "taylor-series-linear-attention", LONG)
def _(n: int) -> Sides:
    from taylor_series_linear_attention import TaylorSeriesLinearAttn

    ours = create("based", heads=16, feature_dim=16)
    theirs = TaylorSeriesLinearAttn(DIM, dim_head=16, heads=16).eval()
    tie(
        (theirs.to_q[0], ours.q_proj),
        (theirs.to_kv[0].weight, torch.cat([ours.k_proj.weight, ours.v_proj.weight])),
        (theirs.to_out[0], ours.o_proj),
    )
    return Sides(output(ours), theirs, tokens(n), "noncausal, as its causal form needs a package that is not to be had")


@peer("hedgehog", "fla-core", LONG)
def _(n: int) -> Sides:
    from fla.ops.linear_attn.naive import naive_chunk_linear_attn

    from manyheads.functional.linear import Kernel, causal_read
    from manyheads.mechanisms.linear.hedgehog import feature_map

    q_map, k_map = (torch.randn(HEADS, D, D) for _ in range(2))
    kernel = Kernel(lambda q: feature_map(q, q_map), lambda k: feature_map(k, k_map))

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (feature_map(q, q_map), feature_map(k, k_map), v))
        return naive_chunk_linear_attn(q, k, v, scale=1.0, normalize=True).transpose(1, 2)

    return Sides(
        lambda q, k, v: causal_read(q, k, v, kernel).mixed,
        theirs,
        tokens(n, HEADS, n, D, count=3),
        "its own feature map is one for q and k, with one softmax over both halves: given ours",
        "operator",
    )


# -- recurrence and convolution ----------------------------------------------------------------------------------------


@peer("mega", "mega-pytorch", BRIEF)
def _(n: int) -> Sides:
    from mega_pytorch.mega_pytorch import MegaLayer

    ours = create("mega", heads=1, causal=True, chunk=None, z_dim=128, v_dim=512)
    theirs = MegaLayer(dim=DIM, ema_heads=16, attn_dim_qk=128, attn_dim_value=512, causal=True).eval()
    return Sides(
        output(ours),
        theirs,
        tokens(n),
        "one decay per EMA for all features, no silu and no skip around it, and T5's buckets as bias",
        equal=False,
    )


@peer("titans", "titans-pytorch")
def _(n: int) -> Sides:
    from titans_pytorch import NeuralMemory

    ours = create("titans", form="lmm", causal=True, chunk=64, depth=2, expansion=4)
    theirs = NeuralMemory(DIM, chunk_size=64, dim_head=D, heads=HEADS).eval()
    return Sides(
        output(ours),
        lambda x: theirs(x)[0],
        tokens(n),
        "momentum and forgetting per chunk, not per token; read a chunk later; gelu, a norm and a skip in the memory",
        equal=False,
    )


@peer("lightweight-convolution", "espnet", LONG)
def _(n: int) -> Sides:
    from espnet.nets.pytorch_backend.transformer.lightconv import LightweightConvolution

    ours = create("lightweight-convolution", head_mapping="interleaved")
    theirs = LightweightConvolution(HEADS, DIM, 0.0, 15).eval()
    tie((theirs.linear1, ours.in_proj), (theirs.linear2, ours.out_proj), (theirs.weight, ours.kernel[:, None]))
    return Sides(output(ours), lambda x: theirs(x, x, x, None), tokens(n))


@peer("dynamic-convolution", "espnet")
def _(n: int) -> Sides:
    from espnet.nets.pytorch_backend.transformer.dynamic_conv import DynamicConvolution

    ours, theirs = create("dynamic-convolution"), DynamicConvolution(HEADS, DIM, 0.0, 15).eval()
    tie((theirs.linear1, ours.in_proj), (theirs.linear2, ours.out_proj))
    tie((theirs.linear_weight.weight, ours.kernel_proj.weight))
    fill(0.0, theirs.linear_weight.bias)

    def whole(x: Tensor) -> Tensor:
        return theirs(x, x, x, None)

    return Sides(
        output(ours),
        whole,
        tokens(n),
        "raises the taps within the sequence at its ends: compared without the first and last 7 tokens",
        gate=(lambda x: ours(x).output[:, 7:-7], lambda x: whole(x)[:, 7:-7]),
    )


@peer("mossformer", "clearvoice", LONG)
def _(n: int) -> Sides:
    # The package itself imports what plays and reads sound; the folder of the block does not.
    spec = find_spec("clearvoice")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'clearvoice'")
    sys.path.append(str(Path(spec.submodule_search_locations[0]) / "models"))
    from mossformer2_ss.mossformer2_block import FLASH_ShareA_FFConvM
    from rotary_embedding_torch import RotaryEmbedding

    ours = create("mossformer", heads=1)
    theirs = FLASH_ShareA_FFConvM(
        dim=DIM, expansion_factor=4.0, dropout=0.0, shift_tokens=False, rotary_pos_emb=RotaryEmbedding(32)
    ).eval()
    for module, (norm, linear, _, convolution, _) in (
        (ours.to_z, theirs.to_qk.mdl),
        (ours.to_out, theirs.to_out.mdl),
    ):
        tie((norm, module.norm), (linear, module.linear), (convolution.sequential[1].conv, module.conv))
    norm, linear, _, convolution, _ = theirs.to_hidden.mdl
    streams = (ours.to_v, ours.to_u)
    tie(
        (linear.weight, torch.cat([each.linear.weight for each in streams])),
        (linear.bias, torch.cat([each.linear.bias for each in streams])),
        (convolution.sequential[1].conv.weight, torch.cat([each.conv.weight for each in streams])),
    )
    # Small as they start, nothing but the streams would be compared.
    nn.init.normal_(ours.gamma)
    tie((theirs.qk_offset_scale.gamma, ours.gamma[:, 0]), (theirs.qk_offset_scale.beta, ours.beta[:, 0]))
    return Sides(
        lambda x: x + ours(x).output, theirs, tokens(n), "shifts half of the features by a token: turned off there"
    )


# -- few tokens for many -----------------------------------------------------------------------------------------------


@peer("linformer", "linformer", LONG)
def _(n: int) -> Sides:
    from linformer.linformer import LinformerSelfAttention

    ours = create("linformer", max_length=n, compressed_length=128)
    theirs = LinformerSelfAttention(DIM, n, k=128, heads=HEADS).eval()
    tie(*((getattr(theirs, f"to_{name}"), getattr(ours, f"{name}_proj")) for name in "qkv"))
    tie((theirs.to_out.weight, ours.o_proj.weight))
    tie((theirs.proj_k, ours.key_mix[0].T), (theirs.proj_v, ours.value_mix[0].T))
    fill(0.0, theirs.to_out.bias)
    return Sides(output(ours), theirs, tokens(n))


@peer("agent", "agent-attention-pytorch", LONG)
def _(n: int) -> Sides:
    from agent_attention_pytorch.agent_attention_pytorch import AgentSelfAttention

    ours = create("agent", agents=49)
    theirs = AgentSelfAttention(
        DIM, num_agent_tokens=49, dim_head=D, heads=HEADS, talking_heads=False, gate=False
    ).eval()
    qkv = torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight])
    tie((theirs.to_qkv[0].weight, qkv), (theirs.to_out[1].weight, ours.o_proj.weight))
    fill(0.0, ours.o_proj.bias, ours.dwc.weight, ours.dwc.bias, ours.block_bias, ours.line_bias)

    def pooled(x: Tensor) -> Tensor:
        agents = F.adaptive_avg_pool1d(x.transpose(1, 2), 49).transpose(1, 2)
        return theirs(x, agent_tokens=split(F.linear(agents, ours.q_proj.weight)))

    return Sides(
        output(ours),
        pooled,
        tokens(n),
        "learns its agents (given averages), and has neither biases by place nor the convolution: ours are zero, and "
        "computed",
    )


@peer("induced-set", "torch-geometric", LONG)
def _(n: int) -> Sides:
    from torch_geometric.nn.aggr.utils import InducedSetAttentionBlock

    ours = create("induced-set", points=32, norm=True)
    theirs = InducedSetAttentionBlock(DIM, 32, HEADS).eval()
    tie((theirs.ind, ours.points[None]))
    _set_block(ours.gather, theirs.mab1)
    _set_block(ours.spread, theirs.mab2)
    return Sides(output(ours), theirs, tokens(n), SET_BLOCK)


@peer("attention-pooling", "torch-geometric", LONG)
def _(n: int) -> Sides:
    from torch_geometric.nn.aggr.utils import PoolingByMultiheadAttention

    ours, theirs = create("attention-pooling", norm=True), PoolingByMultiheadAttention(DIM, 1, HEADS).eval()
    tie((theirs.seed, ours.seed[None]), (theirs.lin, ours.feed_forward))
    _set_block(ours.pool, theirs.mab)
    return Sides(output(ours), lambda x: theirs(x)[:, 0], tokens(n), SET_BLOCK)


SET_BLOCK = (
    "adds x where ours adds W_q x, scales by a head's width, and projects what it mixed: equal where W_q and that "
    "projection are the identity and W_k makes up for the scale"
)


@torch.no_grad()
def _set_block(ours: nn.Module, theirs: nn.Module) -> None:
    one, none, more = torch.eye(DIM), torch.zeros(DIM), (D / DIM) ** 0.5
    fill(0.0, ours.q_proj.bias, ours.k_proj.bias)
    tie(
        (ours.q_proj.weight, one),
        (theirs.attn.in_proj_weight, torch.cat([one, more * ours.k_proj.weight, ours.v_proj.weight])),
        (theirs.attn.in_proj_bias, torch.cat([none, none, ours.v_proj.bias])),
        (theirs.attn.out_proj.weight, one),
        (theirs.attn.out_proj.bias, none),
        (theirs.lin, ours.o_proj),
        (theirs.layer_norm1, ours.first_norm),
        (theirs.layer_norm2, ours.second_norm),
    )


@peer("acmil", "torchmil", LONG)
def _(n: int) -> Sides:
    from torchmil.nn.attention import AttentionPool

    ours, theirs = create("acmil", heads=1), AttentionPool(DIM, 128, gated=True).eval()
    tie((theirs.fc1.module, ours.tanh_proj), (theirs.fc_gated.module, ours.gate_proj), (theirs.fc2, ours.branches))
    return Sides(
        output(ours), lambda x: theirs(ours.reduce(x).relu()), tokens(n), "has one branch, and no layer before it"
    )


@peer("gaussian-adaptive", "gaussian-adaptive-attention", LONG)
def _(n: int) -> Sides:
    from gaussian_adaptive_attention import MultiHeadGaussianAdaptiveAttention

    ours, theirs = create("gaussian-adaptive", heads=1), MultiHeadGaussianAdaptiveAttention(1, 1, 4).eval()
    nn.init.normal_(ours.mean_offsets)
    nn.init.uniform_(ours.widths, 1.0, 2.0)
    own = theirs.attention_heads[0]
    tie((own.mean_offsets, ours.mean_offsets[0]), (own.c, ours.widths[0]))
    return Sides(output(ours), theirs, tokens(n), "cuts the tokens into heads where ours cuts features: one head")


# -- two kinds of tokens, or of heads ----------------------------------------------------------------------------------


@peer("lxmert", "transformers", BRIEF)
def _(n: int) -> Sides:
    from transformers import LxmertConfig
    from transformers.models.lxmert.modeling_lxmert import LxmertXLayer

    config = LxmertConfig(hidden_size=DIM, num_attention_heads=HEADS, intermediate_size=4 * DIM, hidden_act="gelu")
    theirs, text, image = LxmertXLayer(config).eval(), create("lxmert"), create("lxmert")
    image.cross, image.norm_cross = text.cross, text.norm_cross
    shared, names = theirs.visual_attention, zip(("query", "key", "value"), "qkv", strict=True)
    for a, b in [*names]:
        tie((getattr(shared.att, a), getattr(text.cross, f"{b}_proj")))
        tie((getattr(theirs.lang_self_att.self, a), getattr(text.own, f"{b}_proj")))
        tie((getattr(theirs.visn_self_att.self, a), getattr(image.own, f"{b}_proj")))
    tie((shared.output.dense, text.cross.o_proj), (shared.output.LayerNorm, text.norm_cross))
    for ours, own, inter, out in (
        (text, theirs.lang_self_att.output, theirs.lang_inter, theirs.lang_output),
        (image, theirs.visn_self_att.output, theirs.visn_inter, theirs.visn_output),
    ):
        tie((own.dense, ours.own.o_proj), (own.LayerNorm, ours.norm_own), (inter.dense, ours.up))
        tie((out.dense, ours.down), (out.LayerNorm, ours.norm_out))
    return Sides(
        lambda x, y: torch.cat([text(x, y).output, image(y, x).output], 1),
        lambda x, y: torch.cat(theirs(x, None, y, None)[:2], 1),
        tokens(n, count=2),
    )


@peer("gated-cross", "transformers")
def _(n: int) -> Sides:
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

    config = MllamaTextConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=HEADS, attn_implementation="sdpa"
    )
    ours, theirs = create("gated-cross"), MllamaTextCrossAttention(config, 0).eval()
    fill(0.7, ours.gate)
    projections("q_proj k_proj v_proj o_proj", (ours, theirs))
    theirs.q_norm = theirs.k_norm = nn.Identity()
    return Sides(
        output(ours),
        lambda x, y: theirs(x, y, is_causal=False)[0] * ours.gate.tanh(),
        tokens(n, count=2),
        "norms q and k (made identities); its gate is in the layer around it",
    )


@peer("gated-cross", "flamingo-pytorch")
def _(n: int) -> Sides:
    from flamingo_pytorch.flamingo_pytorch import MaskedCrossAttention

    ours, theirs = create("gated-cross"), MaskedCrossAttention(dim=DIM, dim_head=D, heads=HEADS).eval()
    fill(0.7, ours.gate)
    tie(
        (theirs.to_q, ours.q_proj),
        (theirs.to_kv.weight, torch.cat([ours.k_proj.weight, ours.v_proj.weight])),
        (theirs.to_out, ours.o_proj),
    )
    theirs.norm = nn.Identity()
    return Sides(
        output(ours),
        lambda x, y: theirs(x, y[:, None]) * ours.gate.tanh(),
        tokens(n, count=2),
        "norms x (made an identity); its gate is in the block around it",
    )


@peer("luong", "pytorch-nlp")
def _(n: int) -> Sides:
    from torchnlp.nn.attention import Attention

    ours, theirs = create("luong", heads=1, score="dot"), Attention(DIM, "dot").eval()
    tie((theirs.linear_out, ours.o_proj))
    inputs = tuple((0.2 * x).detach().requires_grad_() for x in tokens(n, count=2))
    return Sides(output(ours), lambda x, y: theirs(x, y)[0], inputs)


@peer("dual", "dual-attention")
def _(n: int) -> Sides:
    from dual_attention.dual_attention import DualAttention
    from dual_attention.symbol_retrieval import SymbolicAttention

    ours = create("dual", causal=True)
    symbols, dual = SymbolicAttention(DIM, HEADS, 64).eval(), DualAttention(DIM, 4, 4, 0.0).eval()
    sensory, relational, half = dual.self_attention, dual.relational_attention, DIM // 2
    tie(
        (symbols.q_proj, ours.template_q_proj),
        (symbols.template_features, ours.templates),
        (symbols.symbol_library, ours.library),
        (sensory.wq.weight, ours.q_proj.weight[:half]),
        (sensory.wk.weight, ours.k_proj.weight[:half]),
        (sensory.wv, ours.v_proj),
        (sensory.wo, ours.o_proj),
        (relational.wq_attn.weight, ours.q_proj.weight[half:]),
        (relational.wk_attn.weight, ours.k_proj.weight[half:]),
        (relational.wq_rel, ours.relation_q_proj),
        (relational.wk_rel, ours.relation_k_proj),
        (relational.wr, ours.relation_mix),
        (relational.wv, ours.symbol_proj),
        (relational.wo, ours.relational_o_proj),
    )
    return Sides(output(ours), lambda x: dual(x, symbols(x), is_causal=True)[0], tokens(n))


@peer("moa", "transformers")
def _(n: int) -> Sides:
    from transformers import JetMoeConfig
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention, JetMoeRotaryEmbedding

    config = JetMoeConfig(
        hidden_size=DIM,
        num_key_value_heads=1,
        kv_channels=DIM // 2,
        num_local_experts=HEADS,
        num_experts_per_tok=2,
        attn_implementation="sdpa",
    )
    ours, theirs = create("moa", active=2, causal=True, rotary={}), JetMoeAttention(config, 0).eval()
    tie(
        (theirs.experts.router.layer, ours.router),
        (theirs.experts.input_linear.weight, ours.q_experts.mT),
        (theirs.experts.output_linear.weight, ours.o_experts.mT),
        (theirs.kv_proj.weight, torch.cat([ours.k_proj.weight, ours.v_proj.weight])),
    )
    fill(0.0, theirs.experts.bias)
    x = tokens(n)
    angles = JetMoeRotaryEmbedding(config)(x[0], torch.arange(n)[None])

    def scaled(x: Tensor) -> Tensor:
        found, _, logits = theirs(x, position_embeddings=angles)
        return found * logits.softmax(-1).topk(2, -1).values.sum(-1)[None, :, None]

    return Sides(output(ours), scaled, x, "divides gates by their sum over the chosen: undone; ours adds three losses")


# -- comparing and timing ----------------------------------------------------------------------------------------------


def compare(sides: Sides) -> float | None:
    """The largest difference of outputs; AssertionError where they, or gradients of inputs, are not equal."""
    found = []
    for side in sides.gate or (sides.ours, sides.theirs):
        with torch.no_grad():
            results = [side(*sides.inputs)]
        if sides.backward:
            out = side(*sides.inputs)
            weigh = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
            results += [out, *torch.autograd.grad((out * weigh).sum(), sides.inputs)]
        found.append(results)
    if not sides.equal:
        assert found[0][0].shape == found[1][0].shape, f"{found[0][0].shape} against {found[1][0].shape}"
        return None
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * float(theirs.abs().max()))
    return float((found[0][0] - found[1][0]).abs().max())


def timed(one: Peer, n: int) -> Iterator[dict[str, Any]]:
    sides = built(one, n)
    row = {"mechanism": one.mechanism, "peer": f"{one.package}=={version(one.package)}", "what": sides.what, "n": n}
    try:
        equal = compare(sides)
    except AssertionError as error:
        yield row | {"red": " ".join(str(error).split())}
        return
    more = ({} if equal is None else {"equal": equal}) | ({"differs": sides.differs} if sides.differs else {})
    passes = {"forward": torch.no_grad, "forward+backward": torch.enable_grad}
    for name, context in list(passes.items())[: 1 + sides.backward]:
        ours, theirs = (_call(side, sides.inputs, name) for side in (sides.ours, sides.theirs))
        with context():
            ours(), theirs()
            seconds = once(ours) + once(theirs)
            found = pair(ours, theirs, rounds=min(15, max(5, int(SECONDS / seconds))))
        yield row | {"pass": name} | found | more


def _call(side: Side, inputs: tuple[Tensor, ...], name: str) -> Callable[[], Any]:
    if name == "forward":
        return lambda: side(*inputs)
    return lambda: side(*inputs).sum().backward()


def built(one: Peer, n: int) -> Sides:
    torch.manual_seed(0)
    return one.build(n)


def missing(one: Peer) -> str:
    """Why a peer cannot be timed here, or nothing."""
    try:
        version(one.package)
        built(one, one.lengths[0])
    except PackageNotFoundError:
        return "not installed: --make-env makes an environment that has it"
    except ImportError as error:
        return f"does not import: {error}"
    return ""


def run(only: list[str], check: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for one in PEERS:
        if only and one.mechanism not in only:
            continue
        why = missing(one)
        if why:
            wanted = {**PACKAGES, **ALONE, **BUILT}.get(one.package)
            rows.append({"mechanism": one.mechanism, "peer": f"{one.package}=={wanted}", "left_out": why})
        elif check:
            found = compare(built(one, one.lengths[0]))
            print(f"{one.mechanism} {one.package}: {'shapes alone' if found is None else f'{found:.2g}'}", flush=True)
        else:
            for n in one.lengths:
                for row in timed(one, n):
                    print(_short(row), flush=True)
                    rows.append(row)
    absent = [(name, peer, why) for name, peer, why in ABSENT if not only or name in only]
    return rows + [{"mechanism": name, "peer": peer, "left_out": why} for name, peer, why in absent]


def _short(row: dict[str, Any]) -> str:
    if "red" in row:
        return f"{row['mechanism']:24}{row['peer']:40}{row['n']:>5} red: {row['red']}"
    equal = f"{row['equal']:.1g}" if "equal" in row else "-"
    return (
        f"{row['mechanism']:24}{row['peer']:40}{row['n']:>5} {row['pass']:17}"
        f"{row['ours_ms']:9.2f}{row['theirs_ms']:9.2f}{row['ratio']:7.2f}  {equal}"
    )


def make_environment(folder: str) -> None:
    """The torch that is here, then manyheads and the packages, then those of which a module is enough."""
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(Path(folder) / "bin" / "python"), "-m", "pip", "install", "-c", str(root / "constraints.txt")]
    subprocess.run([*pip, f"torch=={torch.__version__.partition('+')[0]}", "setuptools>=77", "wheel"], check=True)
    subprocess.run([*pip, "-e", str(root), *(f"{name}=={own}" for name, own in PACKAGES.items())], check=True)
    subprocess.run([*pip, "--no-deps", *(f"{name}=={own}" for name, own in ALONE.items())], check=True)
    built = [f"{name}=={own}" for name, own in BUILT.items()]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", *built], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-env", metavar="DIR")
    parser.add_argument("--only", nargs="+", default=[], metavar="MECHANISM")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.make_env:
        return make_environment(given.make_env)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some packages warn about old calls of their own
        rows = run(given.only, given.check)
    if given.only or given.check:
        for row in rows:
            if "left_out" in row:
                print(f"{row['mechanism']} {row['peer']}: left out: {row['left_out']}")
    else:
        save("peers", "cpu", rows)
    if any("red" in row for row in rows):
        raise SystemExit("outputs differ, see the rows that say red")
    return None


if __name__ == "__main__":
    main()
