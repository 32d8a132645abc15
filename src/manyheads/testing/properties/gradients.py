"""The fast path against the eager one, gradients and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from manyheads.card import Pattern
from manyheads.testing.case import Case, Violation, expect, expect_close
from manyheads.testing.properties.prop import (
    everything,
    is_plane,
    padded,
    prop,
)


@prop(
    "weights", "asking for weights changes nothing: the fast path equals the eager one, gradients too", sizes=(1, 5, 33)
)
def weights(case: Case, n: int) -> None:
    n = min(n, 9) if is_plane(case) else n
    module = case.shared()
    masks = [None] if module.sources > 1 else [None, "padding"]
    for kind in masks:
        x, context = case.x(n).requires_grad_(), case.context(n)
        mask = None
        if kind:
            mask = everything(x if context is None else context)
            mask.flatten(1)[:, -(n // 3) - 1 :] = n == 1
        results = []
        for need in (False, True):
            result = module(x, context, mask=mask, need_weights=need)
            weight = torch.linspace(-1, 1, result.output.numel(), dtype=x.dtype, device=x.device).view_as(result.output)
            grads = torch.autograd.grad((result.output * weight).sum(), [x, *module.parameters()], allow_unused=True)
            results.append((result, grads))
        (fast, fast_grads), (eager, eager_grads) = results
        expect_close(fast.output, eager.output, f"need_weights changes the output (mask: {kind})")
        for one, other in zip(fast_grads, eager_grads, strict=True):
            if one is not None and other is not None:
                expect_close(one, other, f"need_weights changes a gradient (mask: {kind})", tolerance=1e-7)
        if eager.weights is not None:
            _weights_shape(case, eager, x, context)


def _weights_shape(case: Case, result: Any, x: Tensor, context: Any) -> None:
    found = result.weights
    if case.pattern is Pattern.MAPS:  # between which of the maps is the mechanism's own
        return
    parts = [x.flatten(1, -2)] if context is None else ([context] if isinstance(context, Tensor) else list(context))
    queries = result.output.shape[1:-1].numel()
    wanted = (x.shape[0], case.settings["heads"], queries, sum(p.shape[1] for p in parts))
    expect(tuple(found.shape) == wanted, f"weights have shape {list(found.shape)}, want {list(wanted)}")


@prop("weights-causal", "weights on the future are zero", when=lambda c: c.pattern is Pattern.CAUSAL_SELF)
def weights_causal(case: Case, n: int) -> None:
    found = case.outputs(case.shared(), case.x(n), need_weights=True).weights
    if found is not None:
        expect(bool((found.triu(1) == 0).all()), "a weight on a later token is not zero")


@prop("gradients", "every parameter gets a gradient", sizes=(33,))
def gradients(case: Case, n: int) -> None:
    module = case.shared()
    n = 9 if is_plane(case) else n
    context = case.context(n, 4)
    result = module(case.x(n, 4), context)
    loss = (result.output * torch.randn_like(result.output)).sum() + sum(result.losses.values())
    names, parameters = [name for name, _ in module.named_parameters()], list(module.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
    for name, parameter, grad in zip(names, parameters, grads, strict=True):
        reached = grad is not None and bool((grad != 0).any())
        expect(reached, f"no gradient reaches {name} {list(parameter.shape)}")


# Rounding makes some 1e-7 of a difference at this step, and few kinks or choices lie within it.
STEP = 1e-7


@prop("gradcheck", "analytic gradients equal numeric ones in float64", sizes=(6,))
def gradcheck(case: Case, n: int) -> None:
    n = min(n, 4) if is_plane(case) else n
    module, context = case.shared(), case.context(n, 1)
    names = [name for name, _ in module.named_parameters()]
    values = [case.x(n, 1), *(value.detach().clone() for _, value in module.named_parameters())]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        result = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, context))
        return torch.cat([result.output.flatten(), *(loss.view(1) for loss in result.losses.values())])

    inputs = [value.requires_grad_() for value in values]
    if _agree(function, inputs):
        return
    # One after the other, in some twenty times the time: a kink that lay on the way is none here, and where a paper
    # lets no gradient through (what lln and nats measure), that is within this tolerance.
    try:
        torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-4, rtol=1e-3)
    except RuntimeError as error:
        raise Violation(f"gradcheck: {str(error).strip().splitlines()[0]}") from None


def _agree(function: Callable[..., Tensor], inputs: list[Tensor]) -> bool:
    """Whether the derivatives of a random sum of the output agree where all inputs move in one random direction: a
    wrong gradient of any of them shows in it, of one in 10^5 of all."""
    output, along = function(*inputs), [torch.randn_like(value) for value in inputs]
    weight = torch.randn_like(output)
    grads = torch.autograd.grad((output * weight).sum(), inputs, allow_unused=True)
    parts = [float((grad * way).sum()) for grad, way in zip(grads, along, strict=True) if grad is not None]
    with torch.no_grad():
        ahead, behind = (
            function(*(value + step * way for value, way in zip(inputs, along, strict=True))) for step in (STEP, -STEP)
        )
    numeric = float(((ahead - behind) * weight).sum()) / (2 * STEP)
    return abs(sum(parts) - numeric) <= 1e-5 + 1e-6 * sum(map(abs, parts))


@prop("losses", "auxiliary losses are finite scalars and padding does not enter them", sizes=(5, 17))
def losses(case: Case, n: int) -> None:
    module, x, context = case.shared(), case.x(n), case.context(n)
    found = case.outputs(module, x, context).losses
    for name, loss in found.items():
        expect(loss.ndim == 0 and bool(loss.isfinite()), f"loss {name} has shape {list(loss.shape)} or is not finite")
    if found and context is None and not is_plane(case):
        dirty, mask = padded(torch.cat([x, x], 1), [n, n])
        again = case.outputs(module, dirty, mask=mask).losses
        for name, loss in found.items():
            expect_close(again[name], loss, f"loss {name} changes with padding")


@prop("checkpoint", "checkpointed in training, gradients and buffers are as without it", sizes=(9,))
def checkpointed(case: Case, n: int) -> None:
    n = min(n, 5) if is_plane(case) else n
    wanted = _trained(case, n, lambda run, x: run(x))
    for reentrant in (False, True):
        found = _trained(case, n, lambda run, x, way=reentrant: checkpoint(run, x, use_reentrant=way))  # type: ignore[misc]
        for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
            for name, tensor in other.items():
                message = f"checkpointed (use_reentrant={reentrant}), after step {step}: {name} differs"
                expect_close(one[name], tensor, message, tolerance=1e-7)


def _trained(case: Case, n: int, way: Callable[[Callable[[Tensor], Any], Tensor], Any]) -> list[dict[str, Tensor]]:
    """Gradients and buffers after each of two steps, the second from what the first has moved; a step is one backward
    through two passes."""
    module, steps = case.build().train(), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        case.seeds(step)
        total, inputs = torch.zeros((), dtype=torch.float64, device=case.device), []
        for part in range(2):
            context = case.context(n, seed=200 + 2 * step + part)

            def run(x: Tensor, context: Any = context) -> tuple[Tensor, ...]:
                result = module(x, context)
                return result.output, *result.losses.values()

            inputs.append(case.x(n, seed=2 * step + part).requires_grad_())
            output, *losses = way(run, inputs[-1])
            total = total + output.square().mean() + sum(losses)
        total.backward()
        optimizer.step()
        gradients = {f"the gradient of {k}": p.grad for k, p in module.named_parameters()}
        gradients |= {f"the gradient of input {i}": x.grad for i, x in enumerate(inputs)}
        buffers = {f"the buffer {k}": b.clone() for k, b in module.named_buffers()}
        steps.append({k: g.clone() for k, g in gradients.items() if g is not None} | buffers)
    return steps
