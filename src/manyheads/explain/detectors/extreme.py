"""Active and dormant heads: the first token takes the attention, its value is drained, its residual peaks.

Claim: a head that has nothing to do for an input attends to the first token, whose value state is next to nothing, so
that the head writes nothing; which heads are dormant depends on the kind of input.
    dormant        mean over samples of s = mean_{i > 0} A_i0
    switch         max s - min s over samples: a head that is dormant for one kind of input and active for another
    value-drain    1 - |v_0| / mean_{j > 0} |v_j|: 1 is nothing left, 0 like any other, negative is larger
    residual-peak  |x_0| / mean_{j > 0} |x_j| of what the layer reads, before its norm; all heads of a layer alike
Source: arXiv 2410.13835 (GuoTianYu2000/Active-Dormant-Attention), where kinds of input are corpora (code, prose) and
norms are shown, not scored: the ratios are this file's. Synthetic samples are text, repeats and random tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.explain.detectors.patterns import tokens
from manyheads.explain.detectors.reading import Measure, Rows
from manyheads.explain.detectors.subject import Sample, Subject
from manyheads.hosts.calls import opened


class Dormant(Measure):
    def __init__(self) -> None:
        self.rows, self.sums = Rows(), torch.zeros(0)

    def call(self, call: Any, sample: Sample) -> None:
        if tokens(call) < 2:
            raise ValueError("dormant: one token has nothing before it: give at least two")
        self.sums = torch.zeros(call.heads, dtype=torch.float64)

    def block(self, call: Any, weights: Tensor, rows: slice, sample: Sample) -> None:
        own = weights[:, :, 1:, 0] if rows.start == 0 else weights[..., 0]
        self.sums += own.double().sum((0, 2)).cpu()

    def done(self, call: Any, sample: Sample) -> None:
        self.rows.add(call.layer, self.sums / (tokens(call) - 1))

    def scores(self) -> dict[str, Tensor]:
        return {"dormant": self.rows.mean(), "switch": self.rows.spread()}


class ValueDrain(Measure):
    needs_weights = False

    def __init__(self) -> None:
        self.rows = Rows()

    def call(self, call: Any, sample: Sample) -> None:
        sizes = opened(call, "value-drain").value[0].double().norm(dim=-1)
        drain = 1 - sizes[:, 0] / sizes[:, 1:].mean(-1)
        self.rows.add(call.layer, drain.repeat_interleave(call.heads // drain.shape[0]))

    def scores(self) -> dict[str, Tensor]:
        return {"value-drain": self.rows.mean()}


class ResidualPeak(Measure):
    needs_weights = False

    def __init__(self) -> None:
        self.rows = Rows()
        self._read: dict[int, float] = {}

    @contextmanager
    def watching(self, subject: Subject) -> Iterator[None]:
        with ExitStack() as stack:
            for site in subject.sites:
                block = subject.block(site)
                if block is None:
                    raise ValueError(f"residual-peak: {site.path or subject.name} is not a layer of a stack")
                hook = block.register_forward_pre_hook(self._keep(site.layer), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _keep(self, layer: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            sizes = x[0].double().norm(dim=-1)
            self._read[layer] = float(sizes[0] / sizes[1:].mean())

        return keep

    def call(self, call: Any, sample: Sample) -> None:
        self.rows.add(call.layer, torch.full((call.heads,), self._read[call.layer]))

    def scores(self) -> dict[str, Tensor]:
        return {"residual-peak": self.rows.mean()}
