"""Patterns beside sequences: small mechanisms that keep them, and ones with a planted bug each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manyheads.card import Card
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.testing import check_mechanism, examine_mechanism


def card(pattern: str, **more: Any) -> Card:
    return Card(
        name="small-one",
        title="A small one",
        reference="none",
        family="grid",  # type: ignore[arg-type]
        patterns={pattern},
        time="e" if pattern == "graph" else "n",
        state="",
        decodes=False,
        **more,
    )


class Gate(Mechanism):
    """The first map, gated by the mean of the real cells of the second, which has other features."""

    card = card("maps")

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.map_dims = (dim, 2 * dim)
        self.gate = nn.Linear(2 * dim, dim)

    def result_size(self, *size: Any) -> Any:
        return size[0]

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        fine, coarse = x
        count = coarse[..., 0].numel() / len(coarse) if call.padding is None else call.padding[1].sum((1, 2))[:, None]
        mean = coarse.sum((1, 2)) / torch.as_tensor(count, dtype=coarse.dtype).clamp(min=1)
        return Result(fine * self.gate(mean).sigmoid()[:, None, None] + fine.mean((1, 2), keepdim=True))


class Both(Gate):
    """Gives both maps back, the second with the mean of the first gated one added to it."""

    card = card("maps")

    def result_size(self, *size: Any) -> Any:
        return size

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        fine = super().attend(x, context, call).output
        return Result((fine, x[1] + fine.mean((1, 2), keepdim=True).repeat(1, 1, 1, 2)))


class CountsPadding(Gate):
    """Means over padded cells too, which are zeros: no value comes through, but other padding gives another mean."""

    card = card("maps")

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        return Result(x[0] + self.gate(x[1].mean((1, 2), keepdim=True)) + x[0].flip(0))


class Neighbours(Mechanism):
    """Each node adds the sum of its neighbours, weighted by a feature of the edge."""

    card = card("graph", takes={"strength": "[e] floats"})

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.value = nn.Linear(dim, dim)

    def example_inputs(self, n: int, edges: Tensor | None = None) -> dict[str, Tensor]:
        assert edges is not None
        return {"strength": 1.0 + (edges[0] + 2 * edges[1]) % 3}

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        source, target = call.inputs["edges"]
        sent = self.value(x)[:, source] * call.inputs["strength"].to(x.dtype)[:, None]
        if call.padding is not None:
            sent = sent.masked_fill(~call.padding[:, source, None], 0.0)
        return Result(x + torch.zeros_like(x).index_add(1, target, sent.to(x.dtype)))


class FirstNodes(Neighbours):
    """Knows nodes by their number."""

    card = card("graph")

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        source, target = call.inputs["edges"]
        sent = self.value(x)[:, source] * (source + 1)[:, None]
        return Result(x + torch.zeros_like(x).index_add(1, target, sent.to(x.dtype)))

    def example_inputs(self, n: int, edges: Tensor | None = None) -> dict[str, Tensor]:
        return {}


class Halved(Mechanism):
    """The sum of each two by two cells, and the sum of all: height and width are halved, rounded up."""

    card = card("grid", resizes="1 / 2")

    def __init__(self, dim: int, heads: int, *, causal: bool = False, wrong: int = 0) -> None:
        super().__init__(dim, heads, causal=causal)
        self.value, self.wrong = nn.Linear(dim, dim), wrong

    def result_size(self, *size: Any) -> Any:
        return tuple((side + 1) // 2 + self.wrong for side in size)

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        if call.padding is not None:
            x = x.masked_fill(~call.padding[..., None], 0.0)
        folded = nn.functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        folded = folded.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).sum((2, 4))
        return Result(self.value(folded) + folded.mean((1, 2), keepdim=True) * 0 + self._whole(x, call))

    def _whole(self, x: Tensor, call: Call) -> Tensor:
        return x.sum((1, 2), keepdim=True)


class Beside(Mechanism):
    """Every cell adds the mean of the context's real tokens."""

    card = card("grid-cross")

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.value = nn.Linear(dim, dim)

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        real = torch.ones_like(context[..., :1]) if call.padding is None else call.padding[..., None].to(x.dtype)
        mean = (context * real).sum(1) / real.sum(1).clamp(min=1)
        return Result(x + self.value(mean)[:, None, None])


class CountsRim(Mechanism):
    """The mean around each cell, for which padded cells count as cells. Its example is too small to show that."""

    card = card("grid", example={"window": 1})

    def __init__(self, dim: int, heads: int, *, causal: bool = False, window: int = 3) -> None:
        super().__init__(dim, heads, causal=causal)
        self.value, self.window = nn.Linear(dim, dim), window

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        shown = x if call.padding is None else x.masked_fill(~call.padding[..., None], 0.0)
        around = nn.functional.avg_pool2d(
            shown.movedim(-1, 1), self.window, 1, self.window // 2, count_include_pad=False
        )
        return Result(self.value(around.movedim(1, -1)) + shown.sum((1, 2), keepdim=True))


class Traced(Gate):
    """While a graph is traced the second map is not read."""

    card = card("maps")

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        coarse = 0 * x[1] if torch.compiler.is_compiling() else x[1]
        return super().attend((x[0], coarse), context, call)


class Cut(Gate):
    """The first map, as far as the second reaches."""

    card = card("maps")

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        height, width = (2 * side for side in x[1].shape[1:3])
        output = super().attend(x, context, call).output
        return Result(output[:, :height, :width])


class Crowd(Neighbours):
    """Every node, joined or not, adds the mean of all nodes."""

    card = card("graph")

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        source, target = call.inputs["edges"]
        real = torch.ones_like(x[..., :1]) if call.padding is None else call.padding[..., None].to(x.dtype)
        mean = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        sent = self.value(x)[:, source] * real[:, source]
        return Result(x + mean + torch.zeros_like(x).index_add(1, target, sent))

    def example_inputs(self, n: int, edges: Tensor | None = None) -> dict[str, Tensor]:
        return {}


class Fading(Crowd):
    """An edge counts less the later it stands in the list."""

    card = card("graph")

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        source, target = call.inputs["edges"]
        share = 1 / (1 + torch.arange(len(source), device=x.device)).to(x.dtype)
        sent = self.value(x)[:, source] * share[:, None]
        return Result(x + torch.zeros_like(x).index_add(1, target, sent))


class Deep(Mechanism):
    """Every cell adds a map of the sum over the whole volume, padded cells left out."""

    card = card("volume")

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.value = nn.Linear(dim, dim)

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        shown = x if call.padding is None else x.masked_fill(~call.padding[..., None], 0.0)
        return Result(x + self.value(shown.sum((1, 2, 3), keepdim=True)))


@pytest.mark.parametrize("cls", [Gate, Both, Neighbours, Halved, Beside, Deep])
def test_what_keeps_the_contract_passes(cls: type[Mechanism]) -> None:
    check_mechanism(cls)


@pytest.mark.parametrize(
    ("cls", "config", "property_name"),
    [
        (CountsPadding, {}, "batch"),
        (FirstNodes, {}, "permuted-nodes"),
        (Halved, {"wrong": 1}, "shapes"),
        (CountsRim, {}, "small-maps"),
        (Cut, {}, "misfit-maps"),
        (Traced, {}, "compile"),
        (Crowd, {}, "lonely-nodes"),
        (Fading, {}, "edges-twice"),
    ],
)
def test_a_planted_bug_is_found(cls: type[Mechanism], config: dict[str, Any], property_name: str) -> None:
    failed = [f.property for f in examine_mechanism(cls, config=config, largest=9) if not f.holds]
    assert property_name in failed


def test_what_a_call_gives_by_name_is_checked() -> None:
    module, x, edges = Neighbours(16, 4), torch.randn(1, 3, 16), torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match=r"strength.*missing"):
        module(x, edges=edges)
    with pytest.raises(ValueError, match=r"edges.*missing"):
        module(x, strength=torch.ones(2))
    with pytest.raises(ValueError, match=r"unknown.*boxes"):
        module(x, edges=edges, strength=torch.ones(2), boxes=x)


def test_maps_that_do_not_fit_are_refused() -> None:
    module, fine, coarse = Gate(4, 1), torch.randn(2, 4, 4, 4), torch.randn(2, 2, 2, 8)
    module((fine, coarse))
    for wrong in [(fine,), (fine, coarse, coarse), (coarse, fine), (fine, coarse[:1]), (fine, None), fine, ()]:
        with pytest.raises(ValueError, match="small-one"):
            module(wrong)
    with pytest.raises(ValueError, match="tuple of 2"):
        module((fine, coarse), mask=torch.ones(2, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="a state"):
        module((fine, coarse), state={})


class Asked(Halved):
    """A grid that reads a vector given by name."""

    card = card("grid", takes={"wish": "[b, dim]"})

    def result_size(self, *size: Any) -> Any:
        return size

    def example_inputs(self, n: int, edges: Tensor | None = None) -> dict[str, Tensor]:
        return {"wish": torch.linspace(-1, 1, self.dim, dtype=torch.float64)[None]}

    def attend(self, x: Any, context: Any, call: Call) -> Result:
        if call.padding is not None:
            x = x.masked_fill(~call.padding[..., None], 0.0)
        return Result(x + self.value(x.sum((1, 2), keepdim=True) * call.inputs["wish"][:, None, None].to(x.dtype)))


def test_a_grid_is_fed_what_it_takes_by_name() -> None:
    check_mechanism(Asked)
