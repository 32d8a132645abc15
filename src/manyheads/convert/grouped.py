"""Fewer key/value heads for a checkpoint: each group of them becomes one.

    W_k'[g] = mean over h in group g of W_k[h], W_v alike, biases alike; groups are neighbours; W_q and W_o stay.

`first` keeps the group's first head, `random` draws new weights (what both are compared with). `procrustes` first turns
the heads of a group towards each other by rotations that leave the model as it was, and then takes the mean: values of
head h by an orthogonal R_h, with the columns of W_o turned back; keys and queries of head h by a phase for every pair
that positions turn. Both maximise the agreement with the mean of the others on calibration text, ten rounds:

    R_h = U W of the SVD U S W of V_h^T (sum of the others);  phase_h(pair) = arg sum conj(k_h) (sum of the others)

Keys that are normed after their projection (Qwen3, Gemma 3) are not turned, as the norm's gains are per feature.

Sources: Ainslie et al., GQA, arXiv:2305.13245 (the mean, and then a twentieth of the training again); Jin et al., Align
Attention Heads Before Merging Them, arXiv:2412.20677 (the alignment).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.convert.layout import Attention, attentions, check_heads_apart, in_eval, with_kv_heads

ALIGNMENTS = ("procrustes", "mean", "first", "random")
ROUNDS = 10


def check_kv_heads(model: Any, kv_heads: int) -> None:
    """ValueError where the heads of a layer cannot be pooled into so many."""
    check_heads_apart(model)
    for layer in attentions(model):
        if not 1 <= kv_heads <= layer.kv_heads or layer.kv_heads % kv_heads:
            fit = [g for g in range(1, layer.kv_heads + 1) if layer.kv_heads % g == 0]
            raise ValueError(
                f"--kv-heads {kv_heads}: {type(model).__name__} has {layer.kv_heads} key/value heads, which can be "
                f"pooled into {', '.join(map(str, fit))}"
            )


@torch.no_grad()
def grouped(model: Any, kv_heads: int, *, align: str = "procrustes", calibration: Sequence[Sequence[int]] = ()) -> Any:
    """A model of the same class with `kv_heads` key/value heads in every layer; the given one is left as it is.

    align: see the module. calibration: rows of token ids for `procrustes`, some thousands of tokens in all.
    """
    check_kv_heads(model, kv_heads)
    if align not in ALIGNMENTS:
        raise ValueError(f"--align {align!r}: want one of {', '.join(ALIGNMENTS)}")
    source = aligned(model, kv_heads, calibration) if align == "procrustes" else model
    made = with_kv_heads(source, kv_heads)
    for old, new in zip(attentions(source), attentions(made), strict=True):
        for name in ("k_proj", "v_proj"):
            _pool(old, old.projections()[name], new.projections()[name], kv_heads, align)
    return made


def _pool(layer: Attention, old: Any, new: Any, kv_heads: int, align: str) -> None:
    for kind in ("weight", "bias"):
        held = getattr(old, kind)
        if held is not None and not (align == "random" and kind == "weight"):
            getattr(new, kind).copy_(pooled(held, layer, kv_heads, align))


def pooled(held: Tensor, layer: Attention, kv_heads: int, align: str) -> Tensor:
    """Rows of all key/value heads -> those of `kv_heads`: each group's mean, or its first."""
    heads = held.view(kv_heads, layer.kv_heads // kv_heads, layer.head_dim, *held.shape[1:])
    chosen = heads[:, 0] if align == "first" else heads.double().mean(1)
    return chosen.flatten(0, 1).to(held.dtype)


@torch.no_grad()
def aligned(model: Any, kv_heads: int, calibration: Sequence[Sequence[int]]) -> Any:
    """A copy whose heads are turned towards those they will be pooled with; what it computes is the same."""
    if not calibration:
        raise ValueError("align='procrustes' needs calibration text: rows of token ids")
    made = copy.deepcopy(model)
    products = _products(made, kv_heads, calibration)
    for layer, (keys, values) in zip(attentions(made), products, strict=True):
        if not layer.normed and layer.turned:
            _turn_keys(layer, keys)
        _turn_values(layer, values)
    return made


def _products(model: Any, kv_heads: int, calibration: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Per layer the sums over tokens of products between the heads of a group: of keys as complex pairs [G, r, r,
    pairs], of values [G, r, r, d, d]."""
    layers = attentions(model)
    sums: list[list[Any]] = [[0, 0] for _ in layers]
    hooks = []

    def gather(place: int, layer: Attention, kind: int) -> Any:
        def hook(output: Tensor) -> None:
            rows = output.flatten(0, -2).double().reshape(-1, kv_heads, layer.kv_heads // kv_heads, layer.head_dim)
            if kind == 1:
                sums[place][1] = sums[place][1] + torch.einsum("tgid,tgje->gijde", rows, rows)
            elif layer.turned:
                pairs = _complex(rows, layer.turned)
                sums[place][0] = sums[place][0] + torch.einsum("tgip,tgjp->gijp", pairs.conj(), pairs)

        return hook

    for place, layer in enumerate(layers):
        hooks += [layer.watch("k_proj", gather(place, layer, 0)), layer.watch("v_proj", gather(place, layer, 1))]
    try:
        with in_eval(model):
            for row in calibration:
                model(torch.tensor([list(row)], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return [(keys, values) for keys, values in sums]


def _complex(rows: Tensor, turned: int) -> Tensor:
    """[..., d] -> the pairs (i, i + turned / 2) as complex numbers [..., turned / 2]."""
    half = turned // 2
    return torch.complex(rows[..., :half], rows[..., half:turned])


def _turn_keys(layer: Attention, products: Tensor) -> None:
    """A phase for every head and pair, for keys and for the queries that read them."""
    groups, size, _, pairs = products.shape
    phase = torch.zeros(groups, size, pairs, dtype=torch.float64, device=products.device)
    for _ in range(ROUNDS):
        for head in range(size):
            others = [j for j in range(size) if j != head]
            if others:
                turned = products[:, head, others] * torch.exp(1j * phase[:, others])
                phase[:, head] = turned.sum(1).angle()
    by = phase.reshape(groups * size, pairs)
    projections = layer.projections()
    _turn_rows(projections["k_proj"], layer, by)
    _turn_rows(projections["q_proj"], layer, by.repeat_interleave(layer.heads // layer.kv_heads, 0))


def _turn_rows(linear: Any, layer: Attention, by: Tensor) -> None:
    """Multiplies the pairs of every head's rows by e^(i by), by [heads, pairs]."""
    assert layer.turned is not None
    half = layer.turned // 2
    for held in (linear.weight, linear.bias):
        if held is None:
            continue
        rows = held.view(by.shape[0], layer.head_dim, -1)
        left, right = rows[:, :half].double(), rows[:, half : layer.turned].double()
        cos, sin = by.cos()[..., None], by.sin()[..., None]
        turned = torch.cat([left * cos - right * sin, left * sin + right * cos], 1)
        rows[:, : layer.turned].copy_(turned)


def _turn_values(layer: Attention, products: Tensor) -> None:
    """An orthogonal matrix for every head, for values and, turned back, for the columns that read them."""
    groups, size, _, dim, _ = products.shape
    turn = torch.eye(dim, dtype=torch.float64, device=products.device).repeat(groups, size, 1, 1)
    for _ in range(ROUNDS):
        for head in range(size):
            others = [j for j in range(size) if j != head]
            if others:
                agreement = (products[:, head, others] @ turn[:, others]).sum(1)
                u, _, w = torch.linalg.svd(agreement)
                turn[:, head] = u @ w
    by = turn.reshape(groups * size, dim, dim)
    value, out = layer.projections()["v_proj"], layer.module.o_proj
    for held in (value.weight, value.bias):
        if held is not None:
            rows = held.view(layer.kv_heads, dim, -1)
            rows.copy_(by.transpose(1, 2) @ rows.double())
    columns = out.weight.view(out.out_features, layer.heads, dim)
    each = by.repeat_interleave(layer.heads // layer.kv_heads, 0)
    columns.copy_(torch.einsum("ohd,hde->ohe", columns.double(), each))
