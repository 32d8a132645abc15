"""Grouped heads into one latent for all: a checkpoint of llama's layout becomes a DeepseekV3ForCausalLM (MLA).

G key/value heads of D features become a latent of `rank` numbers, from which every head's positionless keys and values
are made, and one rotary key of D numbers that all heads share. Per pair p of rotary features, with k_g[p] the keys of
head g before positions, as complex numbers over calibration tokens:

    U_p: eigenvectors, greatest first, of sum over tokens of Re(k[p] k[p]^H)  [G, G]
    component a of the keys:  c_a[p] = sum_g U_p[g, a] k_g[p];  q_h . k_g(h) = sum_a (U_p[g(h), a] q_h[p]) . c_a[p]

Turning all heads of a pair by one U_p commutes with positions, so that this changes nothing as long as all components
keep theirs. Component 0 does; the others lose them, which is the damage (RoRoPE, with one frequency to a fold). What is
left, N = [c_1 .. c_{G-1}] and the values V, is projected together, keys first brought to the size of values:

    R: the first `rank` eigenvectors of the second moment of [N / s, V];  s = mean |N's features| / mean |V's features|
    latent = R^T [N / s, V];  keys of head h = (sum_a U[g(h), a] .) s R_N latent;  values of head h = R_V[g(h)] latent

Scores are scaled by (2 D)^-0.5 there, so queries are multiplied by sqrt 2. Stock classes always norm the latent.
`exact` makes the norm harmless: one more latent channel, held at a constant K far above the others by a bias, so that
the root mean square is K / sqrt(rank + 1) for every token, and gains that multiply by it. Serving engines that drop the
bias cannot load that; `fitted` has no channel and no bias, and gains of the mean root mean square: lossy, to be healed.

Source: Meng et al., TransMLA, arXiv:2502.07864, and its code (fxmeng/TransMLA): RoRoPE, balanced joint PCA. There the
released converter's norm is left out and needs its own modelling file; folding several frequencies (FreqFold) and fewer
rotary features are left out here, as they broke small models.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.convert.layout import Attention, attentions

NORMS = ("exact", "fitted")
FAMILIES = ("llama", "mistral")
# How far the constant channel stands above the largest latent.
_ABOVE = 3e4


def full_rank(model: Any) -> int:
    """The rank from which on the latent loses nothing."""
    layer = attentions(model)[0]
    return (2 * layer.kv_heads - 1) * layer.head_dim


def check_latent(model: Any, rank: int, norm: str = "exact") -> None:
    """ValueError where the target class has no place for what the model has."""
    config, name = model.config, type(model).__name__
    if config.model_type not in FAMILIES:
        raise ValueError(f"{name} has no converter to a latent; want one of {list(FAMILIES)}")
    if norm not in NORMS:
        raise ValueError(f"--norm {norm!r}: want {' or '.join(NORMS)}")
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind != "default" or any(layer.turned != layer.head_dim for layer in attentions(model)):
        raise ValueError(
            f"{name} has rotary scaling {kind!r}, which the target class cannot express for one shared key"
        )
    if getattr(config, "sliding_window", None) or getattr(config, "mlp_bias", False):
        raise ValueError(f"{name} has a sliding window or biases in its MLP, for which DeepseekV3 has no place")
    if any(p.bias is not None for layer in attentions(model) for p in layer.projections().values()):
        raise ValueError(f"{name} has biases in its attention, for which DeepseekV3's queries have no place")
    most = full_rank(model)
    if not 1 <= rank <= most:
        raise ValueError(f"--rank {rank}: want 1 to {most}, the full rank of {name}")


@torch.no_grad()
def latent(model: Any, rank: int, *, norm: str = "exact", calibration: Sequence[Sequence[int]] = ()) -> Any:
    """A DeepseekV3ForCausalLM that computes what the model does, but for positions of all key components but one, and
    for what a rank below the full one leaves out. The given model is left as it is."""
    check_latent(model, rank, norm)
    if not calibration:
        raise ValueError("a latent needs calibration text: rows of token ids")
    moments = _moments(model, calibration)
    made = _empty(model, rank + (norm == "exact"), norm)
    own = model.state_dict()
    state = {key: value for key, value in own.items() if ".self_attn." not in key}
    state.setdefault("lm_head.weight", own["model.embed_tokens.weight"])
    for place, (layer, held) in enumerate(zip(attentions(model), moments, strict=True)):
        for key, value in _layer(layer, held, rank, norm).items():
            state[f"model.layers.{place}.self_attn.{key}"] = value.to(model.dtype)
    made.load_state_dict(state)
    return made.to(model.device).eval()


def _empty(model: Any, width: int, norm: str) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    old, layer = model.config, attentions(model)[0]
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "max_position_embeddings", "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    config = DeepseekV3Config(
        **{key: getattr(old, key) for key in same},
        num_key_value_heads=old.num_attention_heads,
        q_lora_rank=None,
        kv_lora_rank=width,
        qk_rope_head_dim=layer.head_dim,
        qk_nope_head_dim=layer.head_dim,
        v_head_dim=layer.head_dim,
        first_k_dense_replace=old.num_hidden_layers,
        # No expert is built; servers still add these numbers up.
        n_routed_experts=1,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        moe_intermediate_size=1,
        num_mtp_layers=0,
        rope_interleave=True,
        rope_parameters={"rope_type": "default", "rope_theta": old.rope_parameters["rope_theta"]},
        attention_bias=norm == "exact",
        tie_word_embeddings=False,
    )
    made = DeepseekV3ForCausalLM._from_config(config, dtype=model.dtype)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made


def _moments(model: Any, calibration: Sequence[Sequence[int]]) -> list[Tensor]:
    """Per layer the second moment of [keys of all heads, values of all heads] before positions, [2 G D, 2 G D], a mean
    over the tokens."""
    layers = attentions(model)
    sums: list[Any] = [0] * len(layers)
    keys: dict[int, Tensor] = {}

    def of_keys(place: int) -> Any:
        return lambda module, args, output: keys.__setitem__(place, output)

    def of_values(place: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            rows = torch.cat([keys.pop(place), output], -1).flatten(0, -2).double()
            sums[place] = sums[place] + rows.T @ rows

        return hook

    hooks = []
    for place, layer in enumerate(layers):
        hooks.append(layer.module.k_proj.register_forward_hook(of_keys(place)))
        hooks.append(layer.module.v_proj.register_forward_hook(of_values(place)))
    try:
        for row in calibration:
            model(torch.tensor([list(row)], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(len(row) for row in calibration)
    return [total / tokens for total in sums]


def _layer(layer: Attention, moment: Tensor, rank: int, norm: str) -> dict[str, Tensor]:
    """The weights of one layer's attention."""
    heads, groups, dim = layer.heads, layer.kv_heads, layer.head_dim
    part = {name: held.weight.detach().double() for name, held in layer.projections().items()}
    turn = _components(moment[: groups * dim, : groups * dim], groups, dim)  # [components, features, G]
    key = part["k_proj"].view(groups, dim, -1)
    components = torch.einsum("adg,gde->ade", turn, key)  # as weights
    rest = torch.cat([components[1:].flatten(0, 1), part["v_proj"]])
    left = _turned_moment(moment, turn, groups, dim)
    size, basis = _joint(left, (groups - 1) * dim, rank)
    inverse = torch.cat([torch.full(((groups - 1) * dim,), 1 / size), torch.ones(groups * dim)]).to(basis)
    down = basis.T @ (inverse[:, None] * rest)  # [rank, e]
    up_keys = (size * basis[: (groups - 1) * dim]).view(groups - 1, dim, rank)
    up_values = basis[(groups - 1) * dim :].view(groups, dim, rank)
    of = torch.arange(heads, device=basis.device) // (heads // groups)
    nope = torch.einsum("adh,adr->hdr", turn[1:, :, of], up_keys)
    query = part["q_proj"].view(heads, dim, -1) * 2**0.5
    roped = turn[0, :, of].T[..., None] * query
    order = torch.arange(dim, device=basis.device).view(2, dim // 2).T.flatten()  # pairs side by side
    made = {
        "q_proj.weight": torch.cat([query, roped[:, order]], 1).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat([down, components[0, order]]),
        "kv_b_proj.weight": torch.cat([nope, up_values[of]], 1).flatten(0, 1),
        "o_proj.weight": part["o_proj"],
    }
    sizes = (basis.T @ _scaled(left, inverse) @ basis).diagonal().clamp(min=0)
    return made | (_constant_channel(made, sizes, dim) if norm == "exact" else _fitted_gains(sizes))


def _components(moment: Tensor, groups: int, dim: int) -> Tensor:
    """U as [component a, feature, head g]; the two features of a pair have the same."""
    heads = moment.view(groups, dim, groups, dim)
    half = dim // 2
    turn = moment.new_zeros(groups, dim, groups)
    for pair in range(half):
        real = heads[:, pair, :, pair] + heads[:, pair + half, :, pair + half]
        vectors = torch.linalg.eigh(real).eigenvectors.flip(1)  # greatest first
        turn[:, pair] = turn[:, pair + half] = vectors.T
    return turn


def _turned_moment(moment: Tensor, turn: Tensor, groups: int, dim: int) -> Tensor:
    """The second moment of [components but the first, values]."""
    size = groups * dim
    mixing = moment.new_zeros(size, size)  # components from keys
    view = mixing.view(groups, dim, groups, dim)
    for feature in range(dim):
        view[:, feature, :, feature] = turn[:, feature]
    whole = torch.block_diag(mixing[dim:], torch.eye(size, dtype=moment.dtype, device=moment.device))
    return whole @ moment @ whole.T


def _scaled(moment: Tensor, by: Tensor) -> Tensor:
    return by[:, None] * moment * by


def _joint(moment: Tensor, keys: int, rank: int) -> tuple[float, Tensor]:
    """The size of keys to that of values, and the basis [features, rank]."""
    sizes = moment.diagonal().clamp(min=0).sqrt()
    size = float(sizes[:keys].mean() / sizes[keys:].mean()) if keys else 1.0
    size = size if size > 0 else 1.0
    by = torch.ones_like(sizes)
    by[:keys] = 1 / size
    vectors = torch.linalg.eigh(_scaled(moment, by)).eigenvectors.flip(1)
    return size, vectors[:, :rank]


def _fitted_gains(sizes: Tensor) -> dict[str, Tensor]:
    """Gains of the latent's mean size: what is small is made as large as what is large, so that this is lossy."""
    return {"kv_a_layernorm.weight": torch.full_like(sizes, float(sizes.mean().sqrt()))}


def _constant_channel(made: dict[str, Tensor], sizes: Tensor, dim: int) -> dict[str, Tensor]:
    """One more channel, so far above the others that the norm divides by the same number for every token."""
    rank = len(sizes)
    down, up, out = made["kv_a_proj_with_mqa.weight"], made["kv_b_proj.weight"], made["o_proj.weight"]
    # Both are exact in bfloat16; what their quotient lacks is in kv_b, whose rounding is no common factor.
    held = float(torch.tensor(_ABOVE * max(float(sizes.sum().sqrt()), 1e-6)).bfloat16())
    common = held / (rank + 1) ** 0.5
    gain = 2.0 ** round(math.log2(common))
    bias, gains = down.new_zeros(rank + 1 + dim), down.new_full((rank + 1,), gain)
    bias[rank], gains[rank] = held, 0.0
    return {
        "kv_a_proj_with_mqa.weight": torch.cat([down[:rank], torch.zeros_like(down[:1]), down[rank:]]),
        "kv_a_proj_with_mqa.bias": bias,
        "kv_a_layernorm.weight": gains,
        "kv_b_proj.weight": torch.cat([up * (common / gain), torch.zeros_like(up[:, :1])], 1),
        "o_proj.bias": torch.zeros(out.shape[0], dtype=out.dtype),
    }
