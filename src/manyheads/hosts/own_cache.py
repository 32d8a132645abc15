"""Our own models inside a policy: their layers attend to keys and values that a ragged cache keeps.

A layer can where all that its mechanism changes of softmax attention stands before the scores or behind the mixed
values, so that what it remembers is keys and values and how it reads them is softmax. Each pass then gets states that
hold nothing and hand everything on (`State.keeper`); what the cache does not know of tokens, which of them are padding
and which held no numbers, is remembered here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manyheads.functional.rotary import Rotary
from manyheads.hosts.attend import Scoring
from manyheads.hosts.visibility import Visibility
from manyheads.models.cache import ManyheadsCache
from manyheads.softmax import SoftmaxAttention, changed_stages

# Stages that neither score nor mix: what is remembered is read by softmax alone.
READ_BY_SOFTMAX = {"project", "position", "output"}


def own_windows(model: Any) -> list[int | None]:
    """Per layer the window of its scores, None without one; a ValueError that names the first layer of which a policy
    could not choose what stays."""
    found: list[int | None] = []
    if own := model.decoder_stack.own:
        raise ValueError(
            f"{type(model).__name__}: remembers more than its layers do ({', '.join(own)}), so that no policy can "
            "choose what of it stays; shrink a model without `back`, and with positions of one count"
        )
    for i, block in enumerate(model.decoder_stack.layers):
        mixer: Any = block.self_attn
        why = _obstacle(mixer)
        if why:
            raise ValueError(
                f"{type(model).__name__}: layer {i} ({mixer.mechanism.card.name}) {why}, so that no policy can choose "
                "what of it stays; shrink a model whose layers all attend by softmax, or take a mechanism whose state "
                "is bounded (`manyheads list`)"
            )
        found.append(mixer.mechanism.shell.window)
    return found


def _obstacle(mixer: Any) -> str | None:
    mechanism = mixer.mechanism
    if mixer.convolution is not None:
        return "remembers the inputs of a short convolution"
    if mechanism.card.takes:
        return f"reads what it is told of tokens beside them ({', '.join(mechanism.card.takes)})"
    if not isinstance(mechanism, SoftmaxAttention):
        return "keeps a state in a form of its own"
    changed = set(changed_stages(type(mechanism)))
    if not changed <= READ_BY_SOFTMAX or type(mechanism).fused is not SoftmaxAttention.fused:
        return f"has a rule of its own for what it remembers ({', '.join(sorted(changed)) or 'fused'})"
    if mechanism.span is not None and mechanism.span != mechanism.shell.window:
        return f"forgets what lies {mechanism.span} tokens back by a rule of its own"
    return None


def own_rotations(model: Any) -> list[Tensor | None]:
    """As `families.rotations`, for our own models."""
    found: list[Tensor | None] = []
    for i, block in enumerate(model.decoder_stack.layers):
        mechanism: Any = block.self_attn.mechanism
        rotary: Rotary | None = mechanism.rotary
        if type(mechanism).position is not SoftmaxAttention.position or (rotary and rotary.interleaved):
            raise ValueError(
                f"{type(model).__name__}: how layer {i} ({mechanism.card.name}) turns its keys is not known here; use "
                "positions='text'"
            )
        found.append(None if rotary is None else rotary.turns(mechanism.head_dim, torch.float64))
    return found


class LentStates(ManyheadsCache):
    """States for the passes of a model over a ragged cache. owner: layers[i].update(keys, values) gives what attends.

    real: [b, seen], which of the tokens fed are no padding; None: all are. broken: [b], the first that held NaN or
    infinity, per layer."""

    def __init__(self, owner: Any, stack: Any) -> None:
        super().__init__(len(stack.layers))
        self.owner, self.stack = owner, stack
        self.real: Tensor | None = None
        self.broken: list[Tensor | None] = [None] * len(stack.layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> LentStates:
        made = type(self)(copy.deepcopy(self.owner, memo), self.stack)
        made.real, made.broken = copy.deepcopy((self.real, self.broken), memo)
        return made

    def lend(self, batch: int) -> LentStates:
        """Ready for a pass over so many rows, behind what the cache has seen."""
        seen = self.owner.get_seq_length()
        self.real = None if self.real is None else self.real[:, :seen]
        for i, (block, layer) in enumerate(zip(self.stack.layers, self.layers, strict=True)):
            mechanism: Any = block.self_attn.mechanism
            state = mechanism.init_state(batch)
            state.length, state.keeper = seen, _Keeper(self, i, mechanism)
            before = self.broken[i]
            state.broken = None if before is None else torch.where(before < seen, before, torch.iinfo(before.dtype).max)
            layer.self_attention.states = {"mechanism": state}
        return self

    def tell(self, real: Tensor) -> None:
        self.real = None if bool(real.all()) else real

    def after(self, tokens: int) -> Any:
        states = [layer.self_attention.states["mechanism"] for layer in self.layers]
        self.broken = [state.broken for state in states]
        self.real = states[0].keeper.padding
        return self.owner

    def on_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self.real = None if self.real is None else change(self.real)
        self.broken = [None if one is None else change(one) for one in self.broken]


class _Keeper:
    """Attends for one layer in one pass."""

    def __init__(self, states: LentStates, index: int, mechanism: Any) -> None:
        self.states, self.index, self.mechanism = states, index, mechanism
        self.padding: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, dense: Tensor | None) -> Tensor:
        """q [b, h, n, d], the new keys and values [b, g, n, d], padding [b, n] of these, dense [b, 1 or h, n, seen + n]
        -> [b, h, n, d]."""
        handle, _ = self.states.owner.layers[self.index].update(k, v)
        n, total = q.shape[2], handle.total()
        self.padding = self._joined(padding, total - n, q)
        shell = self.mechanism.shell
        rows = torch.arange(q.shape[0], device=q.device)
        seen = Visibility(None, self.padding, total - n, shell.window, dense is None, dense, rows)
        out: Tensor = handle.attend(q, Scoring(self.mechanism.scale, shell.softcap), seen)
        return out.transpose(1, 2)

    def _joined(self, new: Tensor | None, seen: int, q: Tensor) -> Tensor | None:
        """Which of all tokens are no padding, [b, seen + n], by what was last told of those before this pass."""
        before = self.states.real
        if new is None and before is None:
            return None
        sizes = (q.shape[0], seen), (q.shape[0], q.shape[2])
        parts = zip((before, new), sizes, strict=True)
        return torch.cat(
            [torch.ones(*size, dtype=torch.bool, device=q.device) if p is None else p for p, size in parts], 1
        )
