"""What others put around a mechanism: adapters, quantised weights, hooks, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.mechanism import Mechanism
from manyheads.testing.case import Case, each, expect, expect_close
from manyheads.testing.properties.prop import decodes, is_plane, prop

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
    return min(n, 9) if is_plane(case) else n


def _has_linear(case: Case) -> bool:
    return bool(_linears(case.shared()))


def _paths(case: Case, module: Mechanism, x: Tensor, context: Any) -> Iterator[tuple[str, Tensor]]:
    """Output in every way that a mechanism has to come to it."""
    yield "one pass", case.outputs(module, x, context).output
    yield "one pass with need_weights=True", case.outputs(module, x, context, need_weights=True).output
    if not decodes(case):
        return
    n = x.shape[1]
    sizes = [1, 1, n - 2] if n <= SMALL else [n - 2, 1, 1]
    state, parts, start = module.init_state(x.shape[0]), [], 0
    for size in sizes:
        parts.append(case.outputs(module, x[:, start : start + size], context, state=state).output)
        start += size
    yield f"decoded in parts of {sizes}", torch.cat(parts, 1)


def _acts(case: Case, n: int, kind: str, module: Mechanism, wanted: Tensor) -> None:
    x, context = case.x(n), case.context(n)
    expect(bool((case.usual(n) - wanted).abs().max() > 1e-6), f"{kind}: they change nothing")
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


# How far from float32 half precision may come: some eight roundings.
HALVES = ((torch.bfloat16, 0.1), (torch.float16, 0.02))


def _far(found: Tensor, wanted: Tensor) -> float:
    """The median distance of rows, in units of their usual size: a choice that turns over moves a few rows only."""
    gap, size = (t.detach().float().flatten(0, -2).norm(dim=-1).median() for t in (found - wanted, wanted))
    return float(gap / size.clamp(min=1e-6))


def _last_padded(case: Case, x: Tensor, context: Any) -> Any:
    """A mask that hides the last token of row 0, or None where no mask is taken."""

    def mask_of(tensor: Tensor) -> Tensor:
        mask = torch.ones(tensor.shape[:-1], dtype=torch.bool, device=tensor.device)
        mask.view(len(mask), -1)[0, -1] = False
        return mask

    return each(x if context is None else context, mask_of)


def _learns_in(kind: torch.dtype, what: str, module: Mechanism, x: Tensor, context: Any, mask: Any) -> Tensor:
    """The output of a pass under autocast, behind which gradients were taken."""
    x = x.detach().requires_grad_()
    values = {"x": x, **dict(module.named_parameters())}
    with torch.autocast(x.device.type, kind):
        result = module(x, context, mask=mask)
        loss = result.output.float().square().mean() + sum(result.losses.values())
    grads = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
    expect(bool(result.output.isfinite().all()), f"{what}: values that are not finite")
    for name, grad in zip(values, grads, strict=True):
        finite = grad is None or bool(grad.isfinite().all())
        expect(finite, f"{what}: the gradient of {name} is not finite")
    return result.output.detach()


@prop("autocast", "under autocast to bfloat16 and float16 it runs, learns and stays near float32", sizes=(SMALL, LONG))
def autocast(case: Case, n: int) -> None:
    n = _size(case, n)
    module = case.shared(torch.float32)
    single = case.x(n, dtype=torch.float32), case.context(n, dtype=torch.float32)
    wanted = case.outputs(module, *single).output
    for kind, near in HALVES:
        # A model gives what its norm made of either: float32 for the most part, half precision from a Linear.
        for given in (torch.float32, kind) if n <= SMALL else (torch.float32,):
            x, context = (each(t, lambda part, to=given: part.to(to)) for t in single)  # type: ignore[misc]
            what = f"{given} under autocast to {kind}"
            if n <= SMALL:
                _learns_in(kind, f"{what}, padded", module, x, context, _last_padded(case, x, context))
            output = _learns_in(kind, what, module, x, context, None)
            with torch.autocast(x.device.type, kind):
                paths = [("a pass with a graph", output), *_paths(case, module, x, context)]
            for path, found in paths:
                expect(found.dtype == output.dtype, f"{what}: {path} gives {found.dtype}, not {output.dtype}")
                far = _far(found, wanted)
                expect(far < near, f"{what}: {path} is {far:.2g} away from float32")
