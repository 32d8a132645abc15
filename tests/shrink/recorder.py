"""What a ragged cache does, written down pass by pass, and a dense run that is shown the same entries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import eager_mask

from manyheads.shrink.layer import RaggedLayer

Held = dict[tuple[int, int], list[int]]


@dataclass
class Step:
    """One pass through one layer: queries [b, h, n, d], new keys [b, g, n, d], slots held by (row, KV head)."""

    queries: Tensor
    keys: Tensor
    scale: float
    during: Held
    after: Held


def held(layer: RaggedLayer) -> Held:
    found = {}
    for group in layer.store.groups:
        slots = group.slots().expand(group.rows["keys"].shape[0], len(group.heads), -1)
        for row in range(slots.shape[0]):
            for place, head in enumerate(group.heads):
                found[row, head] = sorted(slot for slot in slots[row, place].tolist() if slot >= 0)
    return found


@contextmanager
def recording() -> Iterator[dict[int, list[Step]]]:
    steps: dict[int, list[Step]] = {}
    update, attend = RaggedLayer.update, RaggedLayer.attend

    def watched_update(self: RaggedLayer, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = update(self, keys, values, *args, **kwargs)
        empty = torch.empty(0)
        steps.setdefault(self.index, []).append(Step(empty, keys.double().clone(), 0.0, held(self), {}))
        return out

    def watched_attend(self: RaggedLayer, query: Tensor, scoring: Any, seen: Any) -> Tensor:
        out = attend(self, query, scoring, seen)
        step = steps[self.index][-1]
        step.queries, step.scale, step.after = query.double().clone(), scoring.scale, held(self)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RaggedLayer, "update", watched_update)
        patch.setattr(RaggedLayer, "attend", watched_attend)
        yield steps


def feed(model: PreTrainedModel, cache: Any, tokens: Tensor, padding: Tensor, ends: list[int]) -> Tensor:
    """Logits at the real tokens, fed in passes that end where `ends` says."""
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    logits, start = [], 0
    for end in ends:
        with torch.no_grad():
            out = model(
                tokens[:, start:end],
                attention_mask=padding[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
        logits.append(out.logits[padding[:, start:end].bool()])
        start = end
    return torch.cat(logits)


def feed_dense(model: PreTrainedModel, steps: dict[int, list[Step]], *rest: Any) -> Tensor:
    """The same with a dense cache and plain matrices, every KV head shown the entries that the steps say."""
    show_only(model, steps)
    return feed(model, DynamicCache(config=model.config), *rest)


def show_only(model: PreTrainedModel, steps: dict[int, list[Step]]) -> None:
    """Attention to a dense cache by plain matrices, of the entries that the steps say."""
    turn = dict.fromkeys(steps, 0)

    def dense(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
    ) -> tuple[Tensor, None]:
        step = steps[module.layer_idx][turn[module.layer_idx]]
        turn[module.layer_idx] += 1
        # A dense sliding layer holds the latest tokens only.
        total = max(max(slots) for slots in step.during.values()) + 1
        shown = torch.zeros(query.shape[0], key.shape[1], total, dtype=torch.bool)
        for (row, head), slots in step.during.items():
            shown[row, head, slots] = True
        repeat = query.shape[1] // key.shape[1]
        shown = shown[:, :, total - key.shape[2] :].repeat_interleave(repeat, 1)
        scores = query @ key.repeat_interleave(repeat, 1).transpose(2, 3) * kwargs["scaling"]
        if kwargs.get("softcap") is not None:
            scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
        scores = (scores + mask).masked_fill(~shown[:, :, None], torch.finfo(scores.dtype).min)
        if kwargs.get("s_aux") is not None:
            sinks = kwargs["s_aux"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return (weights @ value.repeat_interleave(repeat, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("dense_oracle", dense)
    AttentionMaskInterface.register("dense_oracle", eager_mask)
    model.set_attn_implementation("dense_oracle")
