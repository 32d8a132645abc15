"""A batch of whole sequences, of which each process takes its part; and what the parts' results sum up to.

Shapes: b rows, n tokens of the whole sequence, s of this process's part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from manyheads.parallel.layout import Kind, Layout
from manyheads.parallel.wire import Place, add_up, all_gather, place

# Of each token, and cut like it.
CUT = ("input_ids", "inputs_embeds", "token_type_ids", "token_kinds")
KINDS: tuple[Kind, ...] = ("contiguous", "zigzag")
# Gradients are summed in pieces of so many numbers: a copy of all at once would double their memory.
BUCKET = 1 << 22


def shard(
    batch: Mapping[str, Any], group: dist.ProcessGroup | None = None, kind: Kind = "zigzag", *, even: bool = False
) -> dict[str, Any]:
    """What this process feeds a model inside of `sequence_parallel`, of a batch that every process has whole.

    batch: input_ids [b, n] or inputs_embeds [b, n, e]; attention_mask [b, n]; position_ids, which without a mask begin
    another document where they do not count up by one (as in transformers; seq_idx and cu_seq_lens_* say the same);
    labels [b, n] as input_ids, or shift_labels, shifted already; token_type_ids and token_kinds [b, n].
    Comes back: the same for s tokens; labels as shift_labels, shifted before they were cut, so that the last token of a
    part predicts the first of another's; num_items_in_batch, the labels of the whole batch, so that the loss of a part
    is its share: their sum over processes is the loss of one process, as is that of the gradients; seq_idx, the
    document of each token; and shard_of, by which the model knows whose part it is. kind: as the context says, which
    has this method with it filled in. even: the sequence is padded at its end so that all parts are equally long.
    """
    at = place(group)
    unknown = sorted(batch.keys() - {*CUT, *_OTHERS})
    if unknown:
        raise ValueError(
            f"shard: {unknown[0]} was given; want of {sorted({*CUT, *_OTHERS})}: cut it yourself, or leave it out"
        )
    b, n, device = _tokens(batch)
    if n < at.size:
        raise ValueError(f"shard: {n} tokens were given to {at.size} processes; want one for each at least: use fewer")
    documents, positions = _documents(batch, b, n, device)
    parts = at.size * (2 if kind == "zigzag" else 1)
    missing = -n % parts if even else 0
    layout = Layout(n + missing, kind, group)
    mask = batch.get("attention_mask")
    if mask is None and missing:
        mask = torch.ones(b, n, dtype=torch.long, device=device)
    labels = _shifted(batch)
    found: dict[str, Any] = {key: batch.get(key) for key in CUT}
    found |= {"attention_mask": mask, "position_ids": positions, "seq_idx": documents, "shift_labels": labels}
    cut = {key: _cut(value, layout, missing, key) for key, value in found.items() if value is not None}
    if labels is not None:
        count = (labels != -100).sum().clamp(min=1)
        given = batch.get("num_items_in_batch")
        cut |= {"labels": cut["shift_labels"], "num_items_in_batch": count if given is None else given}
    return cut | {"shard_of": torch.tensor([n + missing, KINDS.index(kind)])}


_PACKED = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_OTHERS = ("attention_mask", "position_ids", "labels", "shift_labels", "num_items_in_batch", *_PACKED)


def _tokens(batch: Mapping[str, Any]) -> tuple[int, int, torch.device]:
    given = [batch[key] for key in ("input_ids", "inputs_embeds") if batch.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"shard: {sorted(batch)} was given; want exactly one of input_ids and inputs_embeds")
    b, n = given[0].shape[:2]
    for key in (*CUT, "attention_mask", "labels", "shift_labels"):
        value = batch.get(key)
        if value is not None and tuple(value.shape[:2]) != (b, n):
            raise ValueError(
                f"shard: {key} of shape {tuple(value.shape)} was given; want {(b, n)}, one entry for each token"
            )
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"shard: attention_mask of shape {tuple(mask.shape)} was given; want {(b, n)}, 1 = a real token"
        )
    return b, n, given[0].device


def _documents(batch: Mapping[str, Any], b: int, n: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """[b, n] the document of each token, counted over all rows, where a row holds several; and positions."""
    from manyheads.models.packed import Packing, find_documents

    positions = batch.get("position_ids")
    packing = Packing(**{key: batch.get(key) for key in _PACKED})
    like = torch.empty(b, n, 0, device=device)
    found = find_documents(positions, batch.get("attention_mask"), like, packing)
    if positions is not None:
        positions = positions.expand(b, -1)
    if found is None:
        return None, positions
    begins = torch.zeros(b * n, dtype=torch.long, device=device)
    begins[found.starts] = 1
    documents = begins.cumsum(0) - 1
    if positions is None:
        positions = (torch.arange(b * n, device=device) - found.starts[documents]).view(b, n)
    return documents.view(b, n), positions


def _shifted(batch: Mapping[str, Any]) -> Tensor | None:
    labels: Tensor | None = batch.get("labels")
    shifted: Tensor | None = batch.get("shift_labels")
    return F.pad(labels[:, 1:], (0, 1), value=-100) if shifted is None and labels is not None else shifted


def _cut(x: Tensor, layout: Layout, missing: int, key: str) -> Tensor:
    if missing:
        # A document of its own, so that padding is nobody's past.
        value = {"shift_labels": -100, "seq_idx": int(x.max()) + 1 if key == "seq_idx" else 0}.get(key, 0)
        x = torch.cat((x, x.new_full((x.shape[0], missing, *x.shape[2:]), value)), 1)
    return layout.shard(x)


@torch.no_grad()
def reduce_gradients(parameters: Iterable[Tensor] | torch.nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """The gradients that one process would have, in every process: the sum over all, in float32 at least.

    parameters: of a model, in the same order in every process, as after `backward` of the losses of shards. One that
    has a gradient in some processes only counts as zero in the others. Once a step, after all of its backward passes.
    Not for DistributedDataParallel and fully_shard, which have taken the mean: multiply the loss by the number of
    processes instead. ValueError for parameters that lie in parts over processes.
    """
    at = place(group)
    given = list(parameters.parameters() if isinstance(parameters, torch.nn.Module) else parameters)
    # Some come twice in a list of who shares weights.
    trained = [p for p in dict.fromkeys(given) if p.requires_grad]
    if any(hasattr(p, "placements") for p in trained):
        raise ValueError(
            "reduce_gradients: parameters of fully_shard were given, which has taken the mean of their gradients over "
            "the processes; multiply the loss by the number of processes instead"
        )
    if not trained or at.size == 1:
        return
    device = trained[0].device
    here = torch.tensor([p.grad is not None for p in trained], device=device, dtype=torch.int8)
    somewhere = all_gather(here, at).amax(0).tolist()
    bucket: list[Tensor] = []
    for parameter, there in zip(trained, somewhere, strict=True):
        if not there:
            continue
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if bucket and (sum(g.numel() for g in bucket) >= BUCKET or bucket[0].dtype != parameter.grad.dtype):
            _sum(bucket, at)
            bucket = []
        bucket.append(parameter.grad)
    if bucket:
        _sum(bucket, at)


def _sum(gradients: list[Tensor], at: Place) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    total = add_up(flat.to(torch.promote_types(flat.dtype, torch.float32)), at)
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
