"""What others put around a mechanism: adapters, quantised weights, hooks, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Pattern
from manyheads.mechanism import Mechanism
from manyheads.testing.case import Case, expect, expect_close
from manyheads.testing.properties.prop import decodes, prop

# The longer one is past what the fast paths of the examples begin at; a grid of 9 has 90 cells.
SMALL, LONG = 5, 70


class _LowRank(nn.Module):
    """base(x) + B A x. As in PEFT, weight and bias are those of the base layer: who reads them misses the adapter."""

    learns = ("down", "up")

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        out, width = self.out_features, self.in_features = base.weight.shape
        self.down = nn.Parameter(torch.randn(2, width).to(base.weight) / width**0.5)
        self.up = nn.Parameter(0.3 * torch.randn(out, 2).to(base.weight))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + F.linear(F.linear(x, self.down), self.up)

    def merged(self) -> Tensor:
        return self.weight + self.up @ self.down


class _Int8(nn.Module):
    """The weight in whole numbers, with a scale per row: there is no floating `weight` to be read."""

    learns = ("scale",)

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = base.weight.shape
        self.scale = nn.Parameter(base.weight.detach().abs().amax(1, keepdim=True) / 7)
        self.register_buffer("weight", (base.weight.detach() / self.scale.detach()).round().to(torch.int8))
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged(), self.bias)

    def merged(self) -> Tensor:
        return self.weight * self.scale  # type: ignore[operator]


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def _wrapped(case: Case, wrapper: type[_LowRank] | type[_Int8]) -> tuple[Mechanism, Mechanism, dict[str, Tensor]]:
    """The module with a wrapper around every Linear, a plain one into which they are merged, and the wrappers'
    parameters."""
    module, merged = case.build(), case.build()
    into, learnt = dict(_linears(merged)), dict[str, Tensor]()
    for name, linear in _linears(module):
        wrap = wrapper(linear)
        module.set_submodule(name, wrap)
        with torch.no_grad():
            into[name].weight.copy_(wrap.merged())
        learnt |= {f"{name}.{own}": getattr(wrap, own) for own in wrapper.learns}
    return module, merged, learnt


def _hooked(case: Case) -> tuple[Mechanism, dict[str, Tensor]]:
    """The module with a hook on each part that holds parameters, and what each of them learns."""
    module, gains = case.build(), dict[str, Tensor]()

    def hook(gain: Tensor) -> Callable[..., Tensor]:
        return lambda part, given, output: output + gain * (3 * output).tanh()

    for name, part in module.named_modules():
        holds = any(True for _ in part.parameters(recurse=False))
        if part is not module and holds and not isinstance(part, (nn.ParameterList, nn.ParameterDict)):
            gains[name] = torch.tensor(0.3, dtype=torch.float64, device=case.device, requires_grad=True)
            part.register_forward_hook(hook(gains[name]))
    return module, gains


def _size(case: Case, n: int) -> int:
    return min(n, 9) if case.pattern is Pattern.GRID else n


def _has_linear(case: Case) -> bool:
    return bool(_linears(case.build()))


def _paths(case: Case, module: Mechanism, x: Tensor, context: Any) -> Iterator[tuple[str, Tensor]]:
    """Output in every way that a mechanism has to come to it."""
    yield "one pass", case.outputs(module, x, context).output
    yield "one pass with need_weights=True", case.outputs(module, x, context, need_weights=True).output
    if not decodes(case):
        return
    n = x.shape[1]
    for sizes in ([1] * n,) if n <= SMALL else ([n - 2, 1, 1],):
        state, parts, start = module.init_state(x.shape[0]), [], 0
        for size in sizes:
            parts.append(case.outputs(module, x[:, start : start + size], context, state=state).output)
            start += size
        yield f"decoded in parts of {sizes}", torch.cat(parts, 1)


def _acts(case: Case, n: int, kind: str, module: Mechanism, wanted: Tensor) -> None:
    x, context = case.x(n), case.context(n)
    plain = case.outputs(case.build(), x, context).output
    expect(bool((plain - wanted).abs().max() > 1e-6), f"{kind}: they change nothing")
    for path, output in _paths(case, module, x, context):
        expect_close(output, wanted, f"{kind}: {path} differs from the wrapped module's pass")


def _learns(case: Case, n: int, kind: str, module: Mechanism, learnt: dict[str, Tensor]) -> None:
    result = module(case.x(n), case.context(n))
    weight = torch.linspace(-1, 1, result.output.numel(), dtype=result.output.dtype, device=result.output.device)
    total = (result.output * weight.view_as(result.output)).sum() + sum(result.losses.values())
    grads = torch.autograd.grad(total, list(learnt.values()), allow_unused=True)
    for name, grad in zip(learnt, grads, strict=True):
        expect(grad is not None and bool((grad != 0).any()), f"{kind}: no gradient reaches {name}: it is read around")


@prop(
    "wrapped",
    "an adapter, an int8 weight or a hook on any part acts in every path",
    sizes=(SMALL, LONG),
    when=_has_linear,
)
def wrapped(case: Case, n: int) -> None:
    n = _size(case, n)
    x, context = case.x(n), case.context(n)
    for kind, wrapper in (("low-rank adapters", _LowRank), ("int8 weights", _Int8)):
        module, merged, learnt = _wrapped(case, wrapper)
        _acts(case, n, kind, module, case.outputs(merged, x, context).output)
        if n > SMALL and wrapper is _LowRank:  # few tokens need not reach every part of a mechanism that chooses
            _learns(case, n, kind, module, learnt)
    module, gains = _hooked(case)
    _acts(case, n, "hooks", module, case.outputs(module, x, context).output)
    if n > SMALL:
        _learns(case, n, "hooks", module, gains)
