"""Grouped heads into one latent for all: a checkpoint of llama's layout becomes a multi-head latent attention (MLA).

G key/value heads of D features become a latent of `rank` numbers, from which every head's positionless keys and values
are made, and one rotary key of `rope_dim` numbers that all heads share. Keys are first turned (`rorope`), so that the
shared key is the components that hold most; the others lose their positions, which is most of the damage. What is left
of the keys, N, and the values V are projected together, keys first brought to the size of values (balanced joint PCA):

    R: the first `rank` eigenvectors of the second moment of [N / s, V];  s = mean |N's features| / mean |V's features|
    latent = R^T [N / s, V];  keys of head h = (U^T[g(h)]) s R_N latent;  values of head h = R_V[g(h)] latent

The full rank, 2 G D - rope_dim, loses nothing here. Scores are scaled by (D + rope_dim)^-0.5 there, so queries are
multiplied by ((D + rope_dim) / D)^0.5. Stock classes always norm the latent. `exact` makes the norm harmless: one more
latent channel, held at a constant K far above the others by a bias, so that the root mean square is K / sqrt(rank + 1)
for every token, and gains that multiply by it. Serving engines that drop the bias cannot load that; `fitted` has no
channel and no bias, and gains of the mean root mean square: lossy, to be healed.

Formats, all with the same weights: `deepseek_v3`, a DeepseekV3ForCausalLM; `youtu`, a YoutuForCausalLM, the dense class
without fields for experts; `manyheads`, a ManyheadsForCausalLM of `mla`, whose decoding never expands the latents.

Source: Meng et al., TransMLA, arXiv:2502.07864, and its code (fxmeng/TransMLA): RoRoPE, FreqFold, balanced joint PCA.
There the released converter's norm is left out and needs its own modelling file, and the size of the values leaves
out their first `rope_dim` features, which lose nothing: here all count. Low-rank queries shrink no cache and are left
out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from manyheads.convert.layout import Attention, attentions
from manyheads.convert.rorope import check_turn, folds, key_moments, split

NORMS = ("exact", "fitted")
FAMILIES = ("llama", "mistral")
# How far the constant channel stands above the largest latent.
_ABOVE = 3e4
Rows = Sequence[Sequence[int]]


def rotary_features(model: Any, rope_dim: int | None) -> int:
    """Numbers of the shared key: as many as a head has, where nothing is said."""
    return attentions(model)[0].head_dim if rope_dim is None else rope_dim


def full_rank(model: Any, rope_dim: int | None = None) -> int:
    """The rank from which on the latent loses nothing."""
    layer = attentions(model)[0]
    return 2 * layer.kv_heads * layer.head_dim - rotary_features(model, rope_dim)


def check_latent(
    model: Any,
    rank: int,
    norm: str = "exact",
    *,
    rope_dim: int | None = None,
    fold: int | Literal["auto"] | None = None,
    format: str = "deepseek_v3",
) -> None:
    """ValueError where the target class has no place for what the model has."""
    config, name = model.config, type(model).__name__
    if config.model_type not in FAMILIES:
        raise ValueError(f"{name} has no converter to a latent; want one of {list(FAMILIES)}")
    if norm not in NORMS:
        raise ValueError(f"--norm {norm!r}: want {' or '.join(NORMS)}")
    check_room(str(model.dtype).removeprefix("torch."), norm)
    if format not in FORMATS:
        raise ValueError(f"--format {format!r}: want one of {', '.join(FORMATS)}")
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind != "default" or any(layer.turned != layer.head_dim for layer in attentions(model)):
        raise ValueError(
            f"{name} has rotary scaling {kind!r}, which the target class cannot express for one shared key"
        )
    if getattr(config, "sliding_window", None) or getattr(config, "mlp_bias", False):
        raise ValueError(f"{name} has a sliding window or biases in its MLP, for which DeepseekV3 has no place")
    if format == "manyheads":
        from manyheads.convert.hosted import check_hosted

        check_hosted(model)
    if any(p.bias is not None for layer in attentions(model) for p in layer.projections().values()):
        raise ValueError(f"{name} has biases in its attention, for which DeepseekV3's queries have no place")
    dim = attentions(model)[0].head_dim
    rope = rotary_features(model, rope_dim)
    check_turn(name, dim, rope, fold if isinstance(fold, int) else None)
    most = full_rank(model, rope)
    if not 1 <= rank <= most:
        raise ValueError(f"--rank {rank}: want 1 to {most}, the full rank of {name}")


def check_room(dtype: str, norm: str) -> None:
    """ValueError where the constant channel of an exact norm, far above all latents, is beyond the type's numbers."""
    if dtype == "float16" and norm == "exact":
        raise ValueError(
            "--norm exact holds a channel beyond what float16 counts to, so that every logit would be NaN: give "
            "--dtype bfloat16 or float32, or --norm fitted"
        )


@torch.no_grad()
def latent(
    model: Any,
    rank: int,
    *,
    norm: str = "exact",
    rope_dim: int | None = None,
    fold: int | Literal["auto"] | None = None,
    format: str = "deepseek_v3",
    calibration: Rows = (),
) -> Any:
    """A model with multi-head latent attention that computes what the given one does, but for positions of the key
    components that lose them, and for what a rank below the full one leaves out. The given model is left as it is.

    rope_dim: numbers of the shared rotary key, a divisor of the head size; the head size by default. fold: neighbouring
    frequencies in one block, head size / rope_dim without it; `auto`: more while the loss on the calibration text
    falls (the paper's code asks its test text). calibration: rows of token ids, some thousands of tokens in all.
    """
    check_latent(model, rank, norm, rope_dim=rope_dim, fold=fold, format=format)
    if not calibration:
        raise ValueError("a latent needs calibration text: rows of token ids")
    rope, moments = rotary_features(model, rope_dim), key_moments(model, calibration)

    def made(count: int) -> Any:
        return _made(model, moments, _Sizes(rank, rope, count, norm), format)

    if fold == "auto":
        return _best_fold(model, made, rope, calibration)
    return made(attentions(model)[0].head_dim // rope if fold is None else fold)


@dataclass(frozen=True)
class _Sizes:
    rank: int
    rope: int
    fold: int
    norm: str

    @property
    def width(self) -> int:
        return self.rank + (self.norm == "exact")


def _best_fold(model: Any, made: Callable[[int], Any], rope: int, rows: Rows) -> Any:
    """Of ever more folds the last before the loss rises."""
    best, least = None, math.inf
    for count in folds(attentions(model)[0].head_dim, rope):
        one = made(count)
        loss = sum(float(one(ids, labels=ids, use_cache=False).loss) for ids in _ids(model, rows))
        if best is not None and loss >= least:
            break
        best, least = one, loss
    return best


def _ids(model: Any, rows: Rows) -> list[Tensor]:
    return [torch.tensor([list(row)], device=model.device) for row in rows]


def _made(model: Any, moments: Sequence[Tensor], sizes: _Sizes, format: str) -> Any:
    layers = [_layer(layer, held, sizes) for layer, held in zip(attentions(model), moments, strict=True)]
    made = FORMATS[format](model, sizes, layers)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).eval()


# -- what it is saved as -----------------------------------------------------------------------------------------------


def _dense(model: Any, sizes: _Sizes) -> dict[str, Any]:
    """Settings that every stock class with a latent has."""
    old, layer = model.config, attentions(model)[0]
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "max_position_embeddings", "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    return {key: getattr(old, key) for key in same} | {
        "num_key_value_heads": old.num_attention_heads,
        "q_lora_rank": None,
        "kv_lora_rank": sizes.width,
        "qk_rope_head_dim": sizes.rope,
        "qk_nope_head_dim": layer.head_dim,
        "v_head_dim": layer.head_dim,
        "rope_interleave": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": old.rope_parameters["rope_theta"]},
        "attention_bias": sizes.norm == "exact",
        "tie_word_embeddings": False,
    }


def _deepseek(model: Any, sizes: _Sizes, layers: Sequence[Mapping[str, Tensor]]) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **_dense(model, sizes),
        first_k_dense_replace=model.config.num_hidden_layers,
        # No expert is built; servers still add these numbers up.
        n_routed_experts=1,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        moe_intermediate_size=1,
        num_mtp_layers=0,
    )
    return _filled(DeepseekV3ForCausalLM._from_config(config, dtype=model.dtype), model, layers)


def _youtu(model: Any, sizes: _Sizes, layers: Sequence[Mapping[str, Tensor]]) -> Any:
    from transformers import YoutuConfig, YoutuForCausalLM

    return _filled(YoutuForCausalLM._from_config(YoutuConfig(**_dense(model, sizes)), dtype=model.dtype), model, layers)


def _filled(made: Any, model: Any, layers: Sequence[Mapping[str, Tensor]]) -> Any:
    own = model.state_dict()
    state = {key: value for key, value in own.items() if ".self_attn." not in key}
    state.setdefault("lm_head.weight", own["model.embed_tokens.weight"])
    for place, layer in enumerate(layers):
        for key, value in layer.items():
            state[f"model.layers.{place}.self_attn.{key}"] = value.to(model.dtype)
    made.load_state_dict(state)
    return made


def _ours(model: Any, sizes: _Sizes, layers: Sequence[Mapping[str, Tensor]]) -> Any:
    from manyheads.convert.hosted import hosted

    dim = attentions(model)[0].head_dim
    spec = {
        "name": "mla",
        "kv_lora_rank": sizes.width,
        "qk_nope_head_dim": dim,
        "qk_rope_head_dim": sizes.rope,
        "v_head_dim": dim,
        "base": float(model.config.rope_parameters["rope_theta"]),
        "bias": sizes.norm == "exact",
    }
    made = hosted(model, spec, range(len(layers)))
    names = {"kv_a_proj_with_mqa": "kv_a_proj", "kv_a_layernorm": "kv_a_norm"}
    for block, layer in zip(made.model.stack.layers, layers, strict=True):
        own = {".".join(names.get(part, part) for part in key.split(".")): value for key, value in layer.items()}
        block.self_attn.mechanism.load_state_dict(own)
    return made


FORMATS: Mapping[str, Callable[[Any, _Sizes, Sequence[Mapping[str, Tensor]]], Any]] = {
    "deepseek_v3": _deepseek,
    "youtu": _youtu,
    "manyheads": _ours,
}


# -- the weights -------------------------------------------------------------------------------------------------------


def _layer(layer: Attention, moment: Tensor, sizes: _Sizes) -> dict[str, Tensor]:
    """The weights of one layer's attention."""
    heads, groups, dim = layer.heads, layer.kv_heads, layer.head_dim
    wide = groups * dim
    part = {name: held.weight.detach().double() for name, held in layer.projections().items()}
    keep, lose = split(moment[:wide, :wide], groups, dim, sizes.rope, sizes.fold)
    rest = torch.cat([lose @ part["k_proj"], part["v_proj"]])
    left = _turned_moment(moment, lose, wide)
    size, basis = _joint(left, len(lose), sizes.rank)
    inverse = torch.cat([torch.full((len(lose),), 1 / size), torch.ones(wide)]).to(basis)
    down = basis.T @ (inverse[:, None] * rest)  # [rank, e]
    of = torch.arange(heads, device=basis.device) // (heads // groups)
    up_keys = (lose.T @ (size * basis[: len(lose)])).view(groups, dim, -1)
    up_values = basis[len(lose) :].view(groups, dim, -1)
    query = part["q_proj"].view(heads, dim, -1) * ((dim + sizes.rope) / dim) ** 0.5
    roped = torch.einsum("rhd,hde->hre", keep.view(-1, groups, dim)[:, of], query)
    made = {
        "q_proj.weight": torch.cat([query, roped], 1).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat([down, keep @ part["k_proj"]]),
        "kv_b_proj.weight": torch.cat([up_keys[of], up_values[of]], 1).flatten(0, 1),
        "o_proj.weight": part["o_proj"],
    }
    squares = (basis.T @ _scaled(left, inverse) @ basis).diagonal().clamp(min=0)
    return made | (_constant_channel(made, squares, sizes.rope) if sizes.norm == "exact" else _fitted_gains(squares))


def _turned_moment(moment: Tensor, lose: Tensor, wide: int) -> Tensor:
    """The second moment of [components without positions, values]."""
    keys, both, values = moment[:wide, :wide], lose @ moment[:wide, wide:], moment[wide:, wide:]
    return torch.cat([torch.cat([lose @ keys @ lose.T, both], 1), torch.cat([both.T, values], 1)])


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


def _constant_channel(made: dict[str, Tensor], sizes: Tensor, rope: int) -> dict[str, Tensor]:
    """One more channel, so far above the others that the norm divides by the same number for every token."""
    rank = len(sizes)
    down, up, out = made["kv_a_proj_with_mqa.weight"], made["kv_b_proj.weight"], made["o_proj.weight"]
    # Both are exact in bfloat16; what their quotient lacks is in kv_b, whose rounding is no common factor.
    held = float(torch.tensor(_ABOVE * max(float(sizes.sum().sqrt()), 1e-6)).bfloat16())
    common = held / (rank + 1) ** 0.5
    gain = 2.0 ** round(math.log2(common))
    bias, gains = down.new_zeros(rank + 1 + rope), down.new_full((rank + 1,), gain)
    bias[rank], gains[rank] = held, 0.0
    return {
        "kv_a_proj_with_mqa.weight": torch.cat([down[:rank], torch.zeros_like(down[:1]), down[rank:]]),
        "kv_a_proj_with_mqa.bias": bias,
        "kv_a_layernorm.weight": gains,
        "kv_b_proj.weight": torch.cat([up * (common / gain), torch.zeros_like(up[:, :1])], 1),
        "o_proj.bias": torch.zeros(out.shape[0], dtype=out.dtype),
    }
