"""Shapes, types, config, what is refused, and that the mechanism is what it says."""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Pattern
from manyheads.mechanism import Mechanism
from manyheads.registry import create_attention
from manyheads.softmax import SoftmaxAttention
from manyheads.testing.case import Case, each, expect, expect_close
from manyheads.testing.fed import feed
from manyheads.testing.properties.prop import SEQUENCES, is_sequence, must_raise, prop, result_shape


@prop("card", "the card is complete and the docstring says what the mechanism is", sizes=(1,))
def card(case: Case, n: int) -> None:
    card = case.cls.card
    expect(bool(card.title and card.reference and card.time), "title, reference and time must be given")
    expect(bool(card.state) or not card.decodes, "a mechanism that decodes says how its state grows")
    expect(len((case.cls.__doc__ or "").strip()) > 40, "the class has no docstring with its claim and equation")
    own = [name for name in case.shared().config if name not in ("dim", "heads", "causal", "rotary", "bias")]
    expect(len(own) <= 8, f"{len(own)} arguments of its own: {own}; at most 8")


@prop("shapes", "the output has the shape of x and is finite; batches of one and n = 1 work")
def shapes(case: Case, n: int) -> None:
    module = case.shared()
    for batch in (1, 3):
        x, context = case.x(n, batch), case.context(n, batch)
        output = case.outputs(module, x, context).output
        wanted = result_shape(case, module, x)
        expect(tuple(output.shape) == wanted, f"x {list(x.shape)} gives {list(output.shape)}, want {list(wanted)}")
        expect(bool(output.isfinite().all()), f"x {list(x.shape)} gives values that are not finite")


@prop("dtype", "float32, bfloat16 and float16 in, the same out, finite, on the same device", sizes=(1, 9))
def dtype(case: Case, n: int) -> None:
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        module = case.shared(kind)
        x, context = case.x(n, dtype=kind), case.context(n, dtype=kind)
        result = case.outputs(module, x, context)
        expect(result.output.dtype == kind, f"{kind} in, {result.output.dtype} out")
        expect(result.output.device == x.device, f"output on {result.output.device}, x on {x.device}")
        expect(bool(result.output.isfinite().all()), f"{kind} output is not finite")


@prop("single-precision", "float32 agrees with float64", sizes=(5, 17))
def single_precision(case: Case, n: int) -> None:
    x, context = case.x(n), case.context(n)
    single = case.outputs(case.shared(torch.float32), x.float(), each(context, Tensor.float)).output
    expect_close(single.double(), case.usual(n), "float32 against float64", tolerance=2e-3)


@prop("deterministic", "in eval mode the same input gives the same output, and x is left as it was", sizes=(1, 17))
def deterministic(case: Case, n: int) -> None:
    module, x, context = case.shared(), case.x(n), case.context(n)
    copy = x.clone()
    first = case.outputs(module, x, context).output
    expect(torch.equal(x, copy), "the input was changed in place")
    expect(torch.equal(first, case.outputs(module, x, context).output), "two calls differ")


@prop("extreme", "inputs of 1e4 give finite outputs and gradients", sizes=(1, 5, 17))
def extreme(case: Case, n: int) -> None:
    module = case.shared(torch.float32)
    x, context = 1e4 * case.x(n, dtype=torch.float32), each(case.context(n, dtype=torch.float32), lambda c: 1e4 * c)
    x.requires_grad_()
    output = module(x, context).output
    expect(bool(output.isfinite().all()), "x of size 1e4 gives outputs that are not finite")
    (grad,) = torch.autograd.grad(output.sum(), x)
    expect(bool(grad.isfinite().all()), "x of size 1e4 gives a gradient that is not finite")


@prop("oracle", "equals the independent computation given", when=lambda c: c.oracle is not None)
def oracle(case: Case, n: int) -> None:
    assert case.oracle is not None
    module, x, context = case.build(), case.x(n), case.context(n)
    with torch.no_grad():
        wanted = case.oracle(module, x, context)
    expect_close(case.outputs(module, x, context).output, wanted, "differs from the oracle")


def _plain(case: Case) -> Mechanism:
    """Softmax attention of the same size."""
    size = case.settings
    plain = create_attention("softmax", size["dim"], size["heads"], causal=case.pattern.causal)
    return plain.to(case.device, torch.float64).eval()


def _could_be_softmax(case: Case) -> bool:
    """Has all the parameters that softmax attention has, reads what it reads, and has another name."""
    if case.cls.card.name == "softmax" or not is_sequence(case):
        return False
    module = case.shared()
    if module.source_dim not in (None, module.dim):
        return False
    theirs = module.state_dict()
    return all(name in theirs and theirs[name].shape == own.shape for name, own in _plain(case).state_dict().items())


@prop("not-softmax", "with its parameters it is not plain softmax attention", sizes=(33,), when=_could_be_softmax)
def not_softmax(case: Case, n: int) -> None:
    module, plain = case.shared(), _plain(case)
    plain.load_state_dict({name: module.state_dict()[name] for name in plain.state_dict()})
    x, context = case.x(n), case.context(n)
    gap = (case.usual(n) - case.outputs(plain, x, context).output).abs().max()
    expect(bool(gap > 1e-6), "it computes plain softmax attention")


def _first_pattern(case: Case) -> bool:
    return case.pattern.value == min(case.cls.card.patterns)


def _as_called(case: Case, n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module's own forward is called with when it is fed x and context alone."""
    calls: list[Any] = []
    module = case.build()
    module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    case.outputs(module, case.x(n), case.context(n))
    return calls[0]


# Under one pattern, since tracing takes a third of the time of all properties together.
@prop("compile", "torch.compile gives the same", sizes=(5,), when=_first_pattern)
def compiled(case: Case, n: int) -> None:
    # Without the hooks that feed it: they are not the mechanism's, and would be traced with it.
    module, (args, kwargs) = case.unfed(), _as_called(case, n)
    torch._dynamo.reset()
    # Tracing is where a mechanism's own code matters; what a backend makes of the graph is torch's, and takes longer.
    fast: Any = torch.compile(module, backend="eager", dynamic=False)
    with warnings.catch_warnings(), torch.no_grad():
        # The compiler's own deprecations are not the mechanism's.
        warnings.simplefilter("ignore", DeprecationWarning)
        found, wanted = (run(*args, **kwargs).output for run in (fast, module))
    pairs = [(found, wanted)] if isinstance(wanted, Tensor) else zip(found, wanted, strict=True)
    for one, other in pairs:
        expect_close(one, other, "compiled differs")


@prop("round-trip", "config (as JSON) and state_dict rebuild the same module", sizes=(5,))
def round_trip(case: Case, n: int) -> None:
    module, x, context = case.shared(), case.x(n), case.context(n)
    again = feed(case.cls(**json.loads(json.dumps(module.config))), case.pattern).to(case.device, torch.float64).eval()
    expect(again.config == module.config, f"config {module.config} comes back as {again.config}")
    again.load_state_dict(module.state_dict())
    expect_close(case.outputs(again, x, context).output, case.usual(n), "rebuilt module differs")


@prop("refuses", "undeclared patterns, unknown arguments and wrong inputs raise ValueError or TypeError", sizes=(4,))
def refuses(case: Case, n: int) -> None:
    module, x = case.shared(), case.x(n)
    context = case.context(n)
    must_raise(
        "an unknown argument", lambda: case.cls(**{**case.settings, "no_such_argument": 1}), (TypeError, ValueError)
    )
    declared = case.cls.card.patterns
    if Pattern.POOL in declared:  # a pool is called as self attention is, whatever else the card declares
        declared = declared | {Pattern.NONCAUSAL_SELF}
    for pattern in (p for p in (*SEQUENCES, Pattern.GRID) if p not in declared):
        other = Case(case.cls, pattern, case.config, case.device)
        must_raise(f"the undeclared pattern {pattern.value}", lambda o=other: o.build()(o.x(n), o.context(n)))  # type: ignore[misc]
    must_raise("a mask of floats", lambda: module(x, context, mask=torch.ones(2, n, device=x.device)))
    wrong = torch.ones(2, n + 7, dtype=torch.bool, device=x.device)
    must_raise("a mask of the wrong length", lambda: module(x, context, mask=wrong))
    must_raise("x of the wrong dim", lambda: module(x[..., :-1], context))
    must_raise("an empty sequence", lambda: module(x[:, :0], context))
    if case.pattern.cross:
        must_raise("a context of the wrong dim", lambda: module(x, each(context, lambda c: c[..., :-1])))


@prop("stages", "a mechanism on the softmax shell overrides one to three of its stages", sizes=(1,))
def stages(case: Case, n: int) -> None:
    from manyheads.softmax import changed_stages

    if issubclass(case.cls, SoftmaxAttention):
        changed = changed_stages(case.cls)
        expect(len(changed) <= 3, f"it overrides {changed}: four or more stages want an `attend` of their own")
