"""RoRoPE: keys of all heads turned into components of which the first keep their positions.

The keys of G heads of D features are G D / 2 pairs, pair p of every head turning with frequency p. F neighbouring
frequencies are folded into one block (FreqFold): block i holds the G F pairs k_g[iF + f], as complex numbers. Over
calibration tokens,

    U_i: eigenvectors, greatest first, of sum over tokens of Re(k k^H)  [G F, G F]
    c_{i,a} = sum_{g,f} U_i[gf, a] k_g[iF + f]
    q_h . k_g(h) = sum_{i,a} (sum_f U_i[g(h) f, a] q_h[iF + f]) . c_{i,a}

Component a of block i turns with frequency iF + a mod F. With F = 1 a block has one frequency, and turning its heads by
one U commutes with positions: nothing changes while all components keep theirs. With F > 1 components mix frequencies,
which is lossy, and in exchange the first ones hold more of the keys.

Kept are `rope_dim` features = D / C: frequencies 0, C, 2C, .., which are those of a rotary embedding of D / C features
with the same base. Frequency jC is carried by component (jC mod F) / C of block jC // F.

Source: Meng et al., TransMLA, arXiv:2502.07864, and its code (fxmeng/TransMLA, partial_rope.py), which wants C to
divide F; F dividing C is added here, where blocks in between keep none.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.convert.layout import Attention, attentions, in_eval

Rows = Sequence[Sequence[int]]
_MOST = 1 << 27  # numbers of one projection, 1 GB in float64


def check_turn(name: str, dim: int, rope_dim: int, fold: int | None) -> None:
    """ValueError where heads of `dim` features cannot keep `rope_dim` of them, or fold so many frequencies."""
    fit = [n for n in range(2, dim + 1, 2) if dim % n == 0]
    if rope_dim not in fit:
        raise ValueError(
            f"--rope-dim {rope_dim}: want an even divisor of {name}'s head size {dim}: {', '.join(map(str, fit))}"
        )
    each = dim // rope_dim
    good = folds(dim, rope_dim)
    if fold is not None and fold not in good:
        raise ValueError(
            f"--fold {fold}: want a divisor of {name}'s {dim // 2} frequencies that divides {each} (head size / "
            f"--rope-dim) or is a multiple of it: {', '.join(map(str, good))}"
        )


def folds(dim: int, rope_dim: int) -> list[int]:
    """How many neighbouring frequencies may be folded into one."""
    pairs, each = dim // 2, dim // rope_dim
    return [f for f in range(1, pairs + 1) if pairs % f == 0 and (f % each == 0 or each % f == 0)]


def turns(moment: Tensor, groups: int, dim: int, fold: int) -> tuple[Tensor, list[int]]:
    """An orthogonal matrix [G D, G D] from keys [head, feature] to components, real and imaginary parts of a pair side
    by side, components of a block greatest first and blocks in turn; and the frequency of each component.

    moment: of keys before positions, [G D, G D].
    """
    half, size = dim // 2, groups * dim
    matrix, frequencies = moment.new_zeros(size, size), []
    heads = torch.arange(groups, device=moment.device)[:, None] * dim
    row = 0
    for first in range(0, half, fold):
        real = (heads + torch.arange(first, first + fold, device=moment.device)).flatten()
        other = real + half
        joint = moment[real][:, real] + moment[other][:, other]
        vectors = torch.linalg.eigh(joint).eigenvectors.flip(1)
        for a in range(groups * fold):
            matrix[row, real] = matrix[row + 1, other] = vectors[:, a]
            frequencies.append(first + a % fold)
            row += 2
    return matrix, frequencies


def split(moment: Tensor, groups: int, dim: int, rope_dim: int, fold: int) -> tuple[Tensor, Tensor]:
    """The rows of `turns` that keep their positions, [rope_dim, G D], in the order of frequencies; and the rest."""
    matrix, _ = turns(moment, groups, dim, fold)
    each, kept = dim // rope_dim, []
    for frequency in range(0, dim // 2, each):
        block, place = divmod(frequency, fold)
        component = block * groups * fold + place // each
        kept += [2 * component, 2 * component + 1]
    left = [row for row in range(groups * dim) if row not in set(kept)]
    return matrix[kept], matrix[left]


def key_moments(model: Any, calibration: Rows) -> list[Tensor]:
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
        with in_eval(model):
            for row in calibration:
                model(torch.tensor([list(row)], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(len(row) for row in calibration)
    return [total / tokens for total in sums]


@torch.no_grad()
def rorope(model: Any, *, fold: int = 1, calibration: Rows = ()) -> Any:
    """A ManyheadsForCausalLM with one key/value head of G D features per layer: the turned keys, all of which keep
    their positions, and the values of all heads side by side. With fold 1 it computes what the model does, which is the
    first step of a latent and its proof; its cache is as large as before."""
    from manyheads.convert.hosted import hosted

    first = attentions(model)[0]
    check_turn(type(model).__name__, first.head_dim, first.head_dim, fold)
    if not calibration:
        raise ValueError("RoRoPE needs calibration text: rows of token ids")
    wide = first.kv_heads * first.head_dim
    moments = key_moments(model, calibration)
    found = [_turned(layer, moment, fold) for layer, moment in zip(attentions(model), moments, strict=True)]
    inverse = model.get_decoder().rotary_emb.inv_freq.tolist()
    spec = {
        "name": "softmax",
        "shell": {"head_dim": wide, "kv_heads": 1, "scale": first.head_dim**-0.5},
        "rotary": {"angles": [inverse[f] for f in found[0][1]], "interleaved": True},
    }
    made = hosted(model, spec, range(len(found)))
    for layer, (weights, _) in zip(made.model.stack.layers, found, strict=True):
        for name, value in weights.items():
            getattr(layer.self_attn.mechanism, name).weight.copy_(value)
    return made


def _turned(layer: Attention, moment: Tensor, fold: int) -> tuple[dict[str, Tensor], list[int]]:
    heads, groups, dim = layer.heads, layer.kv_heads, layer.head_dim
    size = groups * dim
    matrix, frequencies = turns(moment[:size, :size], groups, dim, fold)
    part = {name: held.weight.detach().double() for name, held in layer.projections().items()}
    of = torch.arange(heads, device=matrix.device) // (heads // groups)
    query = torch.einsum("chd,hde->hce", matrix.view(size, groups, dim)[:, of], part["q_proj"].view(heads, dim, -1))
    out = part["o_proj"].new_zeros(part["o_proj"].shape[0], heads, groups, dim)
    out[:, torch.arange(heads, device=out.device), of] = part["o_proj"].view(-1, heads, dim)
    weights = {
        "q_proj": query.flatten(0, 1),
        "k_proj": matrix @ part["k_proj"],
        "v_proj": part["v_proj"],
        "o_proj": out.flatten(1),
    }
    return weights, frequencies


def can_turn(model: Any) -> bool:
    """Whether `rorope` has a place for what the model has, and memory for a layer: H G D times the hidden size."""
    from manyheads.convert.hosted import check_hosted

    layer = attentions(model)[0]
    try:
        check_hosted(model)
    except ValueError:
        return False
    return layer.heads * layer.kv_heads * layer.head_dim * int(model.config.hidden_size) <= _MOST


def first_layer(model: Any) -> Any:
    """The model with its first layer alone, on which an identity is tried at a fraction of the memory."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    made = type(model)._from_config(config, dtype=model.dtype)
    wanted = made.state_dict()
    made.load_state_dict({key: value for key, value in model.state_dict().items() if key in wanted})
    return made.to(model.device).eval()
