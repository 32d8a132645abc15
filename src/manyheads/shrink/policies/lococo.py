"""LoCoCo: heavy hitters stay, the rest is fused into a few entries by a convolution that is learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import conv1d, kl_div

from manyheads.cache_names import with_cache
from manyheads.hosts.device import evaluating
from manyheads.shrink.compress import View
from manyheads.shrink.policy import Policy

PARTS = ("weight", "bias", "normalizer")


@dataclass(kw_only=True)
class LoCoCo(Policy):
    """Claim: what heavy hitters leave over is worth fusing, not dropping; how is learned by a small convolution.

    Of a head's budget recent_size entries are the latest, mem_compress fused, and the others those that got most
    attention. The S entries left over, in the order of the text, give W = (1 - n) E + n softmax_S(conv1d([K; V])),
    [mem_compress, S], with E the one-hot rows of the mem_compress heaviest of them and n learned; K' = W K, V' = W V.
    weights: what fit_lococo or `save` wrote; without them n = 0, which is plain heavy-hitter eviction. Fitted on a few
    rows it was better than that on their like, and on other held-out text not: measure before you choose it.
    Source: arXiv 2406.05317, VITA-Group/LoCoCo `llama/memory_compressor.py`, one layer of convolution. There entries
    are fused every 512 tokens (`interval`); here fused ones carry their share of attention received on, W mass.
    """

    mem_compress: int = 64
    recent_size: int = 32
    weights: str | Path | Mapping[str, Tensor] | None = None
    notes: ClassVar[tuple[str, ...]] = ("mass",)
    fuses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("mem_compress", "recent_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"LoCoCo: {name} must be a whole number of at least 1; got {getattr(self, name)!r}")
        self.layers = [] if self.weights is None else _read(self.weights, self.mem_compress)
        super().__post_init__()

    @property
    def smallest(self) -> int:
        return self.recent_size + self.mem_compress

    def prepare(self, model: Any, cache: Any) -> None:
        if self.layers and len(self.layers) != cache.depth:
            raise ValueError(
                f"LoCoCo: weights are for {len(self.layers)} layers, {type(model).__name__} has {cache.depth}; "
                "fit them on this model"
            )

    def observe(self, view: View) -> None:
        mass = view.note("mass")
        mass += view.received()

    def score(self, view: View) -> Tensor:
        return torch.where(self._recent(view), 1e300, view.note("mass").double())

    def merge(self, view: View, keep: Tensor) -> Tensor:
        own = self.layers[view.layer] if self.layers else None
        if own is None or not float(own["normalizer"]):
            return keep
        assert view.targets is not None
        own = {name: part.to(view.keys.device) for name, part in own.items()}
        mass, recent = view.note("mass"), self._recent(view)
        slots = (view.targets - self.recent_size).clamp(0, self.mem_compress)
        lightest = mass.masked_fill(~keep | recent, torch.inf).argsort(-1).argsort(-1) < slots[..., None]
        gone = view.alive & ~keep
        base = keep & ~recent & lightest & gone.any(-1, keepdim=True)
        order, kept, base = _in_order(view.slots, base | gone, base)
        if not order.shape[-1]:
            return keep
        rows = {"keys": _at(view.keys, order), "values": _at(view.values, order), "mass": _at(mass, order)}
        weights = _weights(own, rows["keys"], rows["values"], kept, base)
        place = (base.cumsum(-1) - 1).clamp(0, self.mem_compress - 1)
        for name, row in rows.items():
            wide = row if row.dim() == 4 else row[..., None]
            fused = _at((weights @ wide.to(weights.dtype)).to(row.dtype), place)
            rows[name] = torch.where(base[..., None], fused, wide).view(row.shape)
        view.put(order, **rows)
        return keep

    def _recent(self, view: View) -> Tensor:
        return view.count[:, None, None] - view.positions - 1 < self.recent_size

    def save(self, path: str | Path) -> None:
        """The learned weights as safetensors, to be given as weights=path."""
        from safetensors.torch import save_file

        if not self.layers:
            raise ValueError("LoCoCo: there are no weights to save; fit some with fit_lococo")
        flat = {
            f"layers.{i}.{name}": part.contiguous() for i, own in enumerate(self.layers) for name, part in own.items()
        }
        save_file(flat, str(path), metadata={"format": "manyheads-lococo", "mem_compress": str(self.mem_compress)})


def _in_order(slots: Tensor, chosen: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places [b, g, S] of the chosen entries in the order of the text, which of them are any, and which are base."""
    longest = int(chosen.sum(-1).max())
    order = torch.where(chosen, slots.long(), 2**40).argsort(-1)[..., :longest]
    return order, chosen.gather(-1, order), base.gather(-1, order)


def _at(rows: Tensor, places: Tensor) -> Tensor:
    if rows.dim() == 3:
        return rows.gather(2, places)
    return rows.gather(2, places[..., None].expand(*places.shape, rows.shape[-1]))


def _weights(own: Mapping[str, Tensor], keys: Tensor, values: Tensor, real: Tensor, base: Tensor) -> Tensor:
    """W [b, g, mem_compress, S] of sequences [b, g, S, d], of which `real` hold anything and `base` are E's ones."""
    b, g, length, _ = keys.shape
    kernel = own["weight"]
    lines = torch.cat([keys, values], -1).to(kernel.dtype) * real[..., None]
    if lines.shape[-1] != kernel.shape[1]:
        raise ValueError(
            f"LoCoCo: weights are for keys and values of {kernel.shape[1]} numbers together, this model's have "
            f"{lines.shape[-1]}; fit them on this model"
        )
    logits = conv1d(lines.flatten(0, 1).transpose(1, 2), kernel, own["bias"], padding=kernel.shape[-1] // 2)
    soft = logits.view(b, g, -1, length).masked_fill(~real[:, :, None], -1e30).softmax(-1)
    row = torch.arange(kernel.shape[0], device=keys.device)[:, None]
    ones = (base[:, :, None] & ((base.cumsum(-1) - 1)[:, :, None] == row)).to(soft.dtype)
    return ones * (1 - own["normalizer"]) + soft * own["normalizer"]


def _read(weights: str | Path | Mapping[str, Tensor], slots: int) -> list[dict[str, Tensor]]:
    """Layer by layer, checked; ValueError for anything that fit_lococo did not write."""
    where = "the given mapping" if isinstance(weights, Mapping) else str(weights)
    flat = weights if isinstance(weights, Mapping) else _load(Path(weights))
    count = len(flat) // len(PARTS)
    names = {f"layers.{i}.{name}" for i in range(count) for name in PARTS}
    if not count or set(flat) != names:
        raise ValueError(f"{where} holds no LoCoCo weights (layers.0.weight, ...); make some with fit_lococo")
    layers = [{name: flat[f"layers.{i}.{name}"].detach().float() for name in PARTS} for i in range(count)]
    for i, own in enumerate(layers):
        shape = tuple(own["weight"].shape)
        fits = (
            len(shape) == 3 and shape[2] % 2 == 1 and own["bias"].shape == shape[:1] and own["normalizer"].numel() == 1
        )
        if not fits or not all(bool(part.isfinite().all()) for part in own.values()):
            raise ValueError(f"{where}: layer {i} is damaged (weight {shape}); fit the weights again")
        if shape[0] != slots:
            raise ValueError(f"{where} fuses into {shape[0]} entries, mem_compress is {slots}; give the same number")
    return layers


def _load(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file that can be read: {error}") from error


@dataclass(kw_only=True)
class _Record(Policy):
    """Drops nothing; keeps each layer's keys, values and attention received of the pass for the trainer."""

    found: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        return False

    def acts(self, *, decoding: bool, context: bool = False) -> bool:
        return False

    def observe(self, view: View) -> None:
        self.found[view.layer] = (view.keys.clone(), view.values.clone(), view.received())


def fit_lococo(
    model: Any,
    ids: Tensor,
    policy: LoCoCo,
    *,
    prefix: int,
    held_out: Tensor | None = None,
    epochs: int = 10,
    patience: int = 3,
    batch: int = 4,
    kernel_size: int = 21,
    rate: float = 5e-2,
    start: float = 0.0,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> LoCoCo:
    """The policy with weights that were fitted: only the convolutions and normalizers learn, the model stays as it is.

    ids [rows, n]: each row's first `prefix` tokens are compressed to the policy's budget_tokens; the loss is the KL
    divergence between the full model's next-token distributions on the other tokens and those with the compressed
    cache. held_out [rows, n] are not learned from (None: the last quarter of ids): the weights with the least loss on
    them are kept, and after `patience` epochs without a lesser one the fit stops. At start=0 the weights of plain
    eviction are among them, and are what comes back where fusing does not carry over. Convolutions start small (the
    authors' N(0, 1) makes every softmax one-hot). report(epoch, loss on held_out) is called after every epoch, epoch 0
    being the start.
    """
    ids, held_out = _apart(ids, held_out)
    budget = _check_fit(model, ids, policy, prefix, kernel_size)
    _check_fit(model, held_out, policy, prefix, kernel_size)
    if patience < 1:
        raise ValueError(f"fit_lococo: patience={patience}; want at least 1 epoch")
    with evaluating(model):
        samples, others = ([_sample(model, rows, prefix) for rows in own.split(batch)] for own in (ids, held_out))
        layers = _fresh(samples[0].layers, policy.mem_compress, kernel_size, start, seed)
        parameters = [part for own in layers for part in own.values()]
        optimizer = torch.optim.Adam(parameters, lr=rate)
        best, kept, since = float("inf"), layers, 0
        for epoch in range(epochs + 1):
            with torch.no_grad():
                losses = [float(_loss(model, sample, layers, policy, budget)) * len(sample.more) for sample in others]
            loss = sum(losses) / len(held_out)
            if report is not None:
                report(epoch, loss)
            if loss < best:
                best, kept, since = (
                    loss,
                    [{k: part.detach().clone() for k, part in own.items()} for own in layers],
                    epoch,
                )
            if epoch == epochs or epoch - since >= patience:
                break
            for sample in samples:
                gradients = torch.autograd.grad(_loss(model, sample, layers, policy, budget), parameters)
                for part, gradient in zip(parameters, gradients, strict=True):
                    part.grad = gradient
                optimizer.step()
    return replace(
        policy, weights={f"layers.{i}.{name}": part for i, own in enumerate(kept) for name, part in own.items()}
    )


@dataclass(frozen=True)
class _Sample:
    """Rows of text: each layer's (keys, values, mass) of the prefix, the tokens that follow, and what the full model
    says of them."""

    layers: list[tuple[Tensor, Tensor, Tensor]]
    more: Tensor
    wanted: Tensor


def _apart(ids: Tensor, held_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows to choose by."""
    if held_out is not None or ids.dim() != 2:
        return ids, ids if held_out is None else held_out
    if len(ids) < 2:
        raise ValueError("fit_lococo: one row leaves none to choose by; give more rows, or held_out [rows, n]")
    aside = max(1, len(ids) // 4)
    return ids[:-aside], ids[-aside:]


def _check_fit(model: Any, ids: Tensor, policy: LoCoCo, prefix: int, kernel_size: int) -> int:
    from manyheads.hosts.families import layer_plans

    if any(own.window is not None for own in layer_plans(model)):
        raise ValueError(f"fit_lococo: {type(model).__name__} has sliding windows, behind which nothing is compressed")
    if ids.dim() != 2 or not 0 < prefix < ids.shape[1]:
        raise ValueError(f"fit_lococo: ids must be [rows, n] with n above prefix={prefix}; got {tuple(ids.shape)}")
    if not isinstance(policy.budget_tokens, int) or not policy.smallest <= policy.budget_tokens < prefix:
        raise ValueError(
            f"fit_lococo: the policy needs budget_tokens from {policy.smallest} to below prefix={prefix}; "
            f"got {policy.budget_tokens}"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"fit_lococo: kernel_size must be odd; got {kernel_size}")
    return policy.budget_tokens


@torch.no_grad()
def _sample(model: Any, rows: Tensor, prefix: int) -> _Sample:
    record = _Record()
    with record(model):
        model(rows[:, :prefix], use_cache=True, logits_to_keep=1)
    wanted = model(rows, use_cache=False).logits[:, prefix:].float().log_softmax(-1)
    return _Sample([record.found[i] for i in sorted(record.found)], rows[:, prefix:], wanted)


def _fresh(layers: list[Any], slots: int, kernel: int, start: float, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for keys, values, _ in layers:
        width = keys.shape[-1] + values.shape[-1]
        weight = torch.randn(slots, width, kernel, generator=generator) / (width * kernel) ** 0.5
        own = {"weight": weight, "bias": torch.zeros(slots), "normalizer": torch.full((1,), float(start))}
        found.append({name: part.to(keys.device).requires_grad_() for name, part in own.items()})
    return found


def _loss(model: Any, sample: _Sample, layers: list[dict[str, Tensor]], policy: LoCoCo, budget: int) -> Tensor:
    from manyheads.hosts.generation import library_cache

    cache, prefix = library_cache(model), sample.layers[0][0].shape[2]
    for i, (own, held) in enumerate(zip(layers, sample.layers, strict=True)):
        cache.update(*_compressed(own, *held, policy, budget), i)
    n = sample.more.shape[1]
    positions = torch.arange(prefix, prefix + n, device=sample.more.device)[None].expand(len(sample.more), -1)
    given = model(sample.more, position_ids=positions, use_cache=True, **with_cache({}, cache)).logits
    return kl_div(given.float().log_softmax(-1).flatten(0, 1), sample.wanted.flatten(0, 1),
                  log_target=True, reduction="batchmean")  # fmt: skip


def _compressed(
    own: Mapping[str, Tensor], keys: Tensor, values: Tensor, mass: Tensor, policy: LoCoCo, budget: int
) -> tuple[Tensor, Tensor]:
    """Keys and values [b, g, budget, d] as `merge` leaves them, with gradients for the layer's own weights."""
    m = keys.shape[2]
    slots = torch.arange(m, device=keys.device).expand(mass.shape)
    rank = (
        torch.where(slots >= m - policy.recent_size, torch.inf, mass.double()).argsort(-1, descending=True).argsort(-1)
    )
    keep = rank < budget
    base = keep & (rank >= budget - policy.mem_compress)
    order, real, at = _in_order(slots, base | ~keep, base)
    weights = _weights(own, _at(keys, order), _at(values, order), real, at)
    alone = (keep & ~base).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    whole = alone[..., : budget - policy.mem_compress]
    return tuple(  # type: ignore[return-value]
        torch.cat([_at(rows, whole), (weights @ _at(rows, order).to(weights.dtype)).to(rows.dtype)], 2)
        for rows in (keys, values)
    )
