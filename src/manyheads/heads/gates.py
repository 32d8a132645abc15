"""DuoAttention's gates: which KV heads need all tokens, learned on hidden keys with the model's weights frozen.

Claim: a gate alpha per KV head, optimised so that the output stays and most gates close, tells retrieval heads apart.
    head output = alpha full + (1 - alpha) streaming,   streaming: the first sink_size and the last recent_size keys
    loss = |H - H'|^2 / |H|^2 + reg mean |alpha|,   H, H' last hidden states of the model without and with gates
over the positions that predict an answer. alpha starts at 1 and is clamped to 0 to 1 before every step.
Source: arXiv 2410.10819, mit-han-lab/duo-attention. As in the paper the full branch is the gated pass's own attention
(the code takes the ungated pass's output, without gradient). The code divides |H - H'|^2 by the width; dividing by
|H|^2 lets one reg (0.05, theirs) fit models of any scale. Sequences come from a fixed pool, so that H is computed once.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.heads.profile import read_tensors
from manyheads.hosts.attend import masked_attention, pack
from manyheads.hosts.calls import opened
from manyheads.hosts.device import device_of, frozen
from manyheads.hosts.fingerprint import Fingerprint, fingerprint
from manyheads.hosts.probes import Inputs
from manyheads.runs.files import write_durably
from manyheads.runs.given import parse_json
from manyheads.runs.steps import Tell, silent

BETAS, EPSILON = (0.9, 0.999), 1e-8
# Steps between checkpoints.
_SAVE_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """length: tokens of the longest sequence; half of the steps take shorter ones. rows: sequences per step; pool:
    sequences of each length, of which every step takes some."""

    length: int
    sink_size: int
    recent_size: int
    steps: int = 120
    rows: int = 2
    pool: int = 16
    lr: float = 0.05
    reg: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "recent_size", "steps", "rows", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"gates: {name} must be at least 1; got {getattr(self, name)}")
        if self.sink_size < 0 or self.sink_size + self.recent_size >= self.length:
            raise ValueError(
                f"gates: sink_size {self.sink_size} and recent_size {self.recent_size} must leave something of "
                f"{self.length} tokens for retrieval heads alone to see"
            )

    def tokens(self, step: int) -> int:
        """Of a step's sequences: the longest in every second step."""
        return (self.length, self.length // 2, self.length, self.length * 3 // 4)[step % 4]

    def rate(self, step: int) -> float:
        """DuoAttention's schedule: a fifth up, a fifth down, never below a tenth."""
        fifth = max(1, self.steps // 5)
        return self.lr * min(1.0, max((step + 1) / fifth, 0.1), max((self.steps - step) / fifth, 0.1))


def learn_gates(
    inputs: Inputs, settings: GateSettings, *, checkpoint: Path | None = None, tell: Tell = silent
) -> Tensor:
    """[layers, KV heads] in 0 to 1. checkpoint: a file that a stopped run goes on from; gone when the run is done."""
    run = GateRun(inputs, settings, checkpoint)
    with frozen(inputs.loaded.model):
        try:
            while run.step < settings.steps:
                loss = run.advance()
                tell(run.step, settings.steps, f"loss {loss:.3g}, {float(run.gates.detach().mean()):.0%} open")
                if run.step % _SAVE_EVERY == 0:
                    run.save()
        except KeyboardInterrupt:
            run.save()
            raise
    if checkpoint is not None:
        with suppress(FileNotFoundError):
            checkpoint.unlink()
    return run.gates.detach().clamp(0, 1).cpu()


class GateRun:
    """The gates, Adam's two moments, and the step; saved whole or not at all."""

    def __init__(self, inputs: Inputs, settings: GateSettings, checkpoint: Path | None):
        self.inputs, self.settings, self.checkpoint = inputs, settings, checkpoint
        self.model = inputs.loaded.model
        self.print = fingerprint(self.model, inputs.loaded.name)
        self.gates = torch.ones(self.print.layers, self.print.kv_heads, device=device_of(self.model))
        self.first, self.second = torch.zeros_like(self.gates), torch.zeros_like(self.gates)
        self.step = 0
        self._wanted: dict[tuple[int, int], Tensor] = {}
        self.resume()

    def advance(self) -> float:
        """One step; the loss before it."""
        examples = self.examples(self.step)
        gates = self.gates.detach().clamp(0, 1).requires_grad_()
        loss = self.loss(gates, examples)
        (slope,) = torch.autograd.grad(loss, gates)
        self.step += 1
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * slope
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * slope.square()
        mean, spread = self.first / (1 - BETAS[0] ** self.step), self.second / (1 - BETAS[1] ** self.step)
        moved = self.settings.rate(self.step - 1) * mean / (spread.sqrt() + EPSILON)
        self.gates = (gates.detach() - moved).clamp(0, 1)
        return float(loss.detach())

    def examples(self, step: int) -> list[tuple[int, int]]:
        """(length, number) of a step's sequences, all of one length: the longest in every second step."""
        length = self.settings.tokens(step)
        draw = random.Random(f"gates {self.settings.seed} {step}")
        numbers = draw.sample(range(self.settings.pool), min(self.settings.rows, self.settings.pool))
        return [(length, number) for number in numbers]

    def loss(self, gates: Tensor, examples: list[tuple[int, int]]) -> Tensor:
        from manyheads.hosts.taps import tap

        needles = [self.inputs.needles(n, number, keys=self.inputs.room(n)) for n, number in examples]
        ids = torch.stack([needle.ids for needle in needles]).to(gates.device)
        labels = torch.stack([needle.labels for needle in needles]).to(gates.device)
        wanted = self.hidden(examples, ids, labels)

        def gated(call: Any) -> Tensor:
            return mixed(opened(call, "gates"), gates[call.layer], self.settings.sink_size, self.settings.recent_size)

        with tap(self.model, gated, kind="self"):
            given = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[labels].float()
        return (given - wanted).square().sum() / wanted.square().sum() + self.settings.reg * gates.abs().mean()

    @torch.no_grad()
    def hidden(self, examples: list[tuple[int, int]], ids: Tensor, labels: Tensor) -> Tensor:
        """The ungated model's last hidden states at the labels [labels, dim]; computed once per sequence."""
        for row, example in enumerate(examples):
            if example not in self._wanted:
                out = self.model.base_model(input_ids=ids[row : row + 1], use_cache=False).last_hidden_state
                self._wanted[example] = out[labels[row : row + 1]].float()
        return torch.cat([self._wanted[example] for example in examples])

    # -- the checkpoint --------------------------------------------------------------------------------------------

    def save(self) -> None:
        from safetensors.torch import save

        if self.checkpoint is None:
            return
        tensors = {"gates": self.gates, "first": self.first, "second": self.second}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        metadata = {"step": str(self.step), "settings": json.dumps(asdict(self.settings)), "model": self._model()}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self.checkpoint, save(tensors, metadata=metadata))

    def resume(self) -> None:
        """Goes on from the checkpoint of the same run; another run's is replaced, another model's or a damaged one
        refused."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        try:
            metadata, tensors = read_tensors(self.checkpoint)
            step, settings = int(metadata["step"]), parse_json(metadata["settings"], "its settings")
            model = Fingerprint(**parse_json(metadata["model"], "its model"))
            shapes = {tuple(tensors[name].shape) for name in ("gates", "first", "second")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.checkpoint} cannot be read ({error}): delete it to learn the gates anew"
            ) from error
        if model.differences(self.print):
            raise ValueError(f"{self.checkpoint} holds gates of another model ({model.name}): choose another folder")
        if settings != asdict(self.settings) or shapes != {tuple(self.gates.shape)}:
            return
        device = self.gates.device
        self.step = step
        self.gates, self.first, self.second = (tensors[name].to(device) for name in ("gates", "first", "second"))

    def _model(self) -> str:
        return json.dumps(asdict(self.print))


def mixed(call: Any, gates: Tensor, sink_size: int, recent_size: int) -> Tensor:
    """The call's output [b, h, n, e] with each KV head's streaming attention mixed in by its gate [g]."""
    each = gates.repeat_interleave(call.heads // gates.shape[0])[None, :, None, None].to(call.output.dtype)
    return each * call.output + (1 - each) * streaming(call, sink_size, recent_size)


def streaming(call: Any, sink_size: int, recent_size: int) -> Tensor:
    """Attention to the first sink_size and the last recent_size keys, own included, [b, h, n, e]; bands of queries, so
    that no matrix [n, n] is made or kept for the gradient."""
    queries, n = pack(call.query, call.key.shape[1]), call.query.shape[2]
    band = max(64, recent_size)
    parts = []
    for start in range(0, n, band):
        rows = slice(start, min(n, start + band))
        low = max(0, start - recent_size + 1)
        columns = torch.cat([torch.arange(min(sink_size, low)), torch.arange(low, rows.stop)]).to(queries.device)
        seen = _seen(call, rows, columns, sink_size, recent_size)
        keys, values = call.key.index_select(2, columns), call.value.index_select(2, columns)
        parts.append(masked_attention(queries[:, :, :, rows], keys, values, call.scoring, _cut(seen)))
    return torch.cat(parts, 3).flatten(1, 2)


def _cut(seen: Tensor) -> Callable[[slice], Tensor]:
    return lambda rows: seen[:, :, rows]


def _seen(call: Any, rows: slice, columns: Tensor, sink_size: int, recent_size: int) -> Tensor:
    """What the layer itself lets queries of these rows see of the columns, and the streaming rule."""
    i, j = torch.arange(rows.start, rows.stop, device=columns.device)[:, None], columns[None]
    kept = ((j < sink_size) | (j > i - recent_size)) & (j <= i)
    own = call.allowed(rows)
    if own is None:
        return kept[None, None]
    if own.shape[1] != 1:
        raise ValueError(f"layer {call.layer} has a mask for every head, which gates do not support")
    own = own.index_select(3, columns)
    return own & kept if own.dtype == torch.bool else own.masked_fill(~kept, torch.finfo(own.dtype).min)
