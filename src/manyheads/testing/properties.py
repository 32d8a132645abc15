"""What must hold of every mechanism. A property is a function of a case and a size n that raises where it fails.

Sizes are tried in ascending order, so that the first failure is the smallest. Everything is compared in float64.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Pattern
from manyheads.mechanism import Mechanism
from manyheads.softmax import SoftmaxAttention
from manyheads.state import State
from manyheads.testing.case import Case, Violation, each, expect, expect_close

SIZES = (1, 2, 3, 5, 9, 17, 33)
SEQUENCES = (Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS)


@dataclass(frozen=True)
class Property:
    name: str
    claim: str
    check: Callable[[Case, int], None]
    sizes: tuple[int, ...]
    applies: Callable[[Case], bool]


PROPERTIES: list[Property] = []


def prop(
    name: str, claim: str, *, sizes: tuple[int, ...] = SIZES, when: Callable[[Case], bool] = lambda case: True
) -> Callable[[Callable[[Case, int], None]], Callable[[Case, int], None]]:
    def keep(check: Callable[[Case, int], None]) -> Callable[[Case, int], None]:
        PROPERTIES.append(Property(name, claim, check, sizes, when))
        return check

    return keep


def _is_sequence(case: Case) -> bool:
    return case.pattern in SEQUENCES


def _decodes(case: Case) -> bool:
    return case.pattern.causal and case.cls.card.decodes


def _grid_or(case: Case, sizes: tuple[int, ...], n: int) -> bool:
    """Grids have n (n + 1) tokens: sizes above 9 say nothing new about them."""
    return case.pattern is not Pattern.GRID or n <= 9


# -- shape, type, card -------------------------------------------------------------------------------------------------


@prop("card", "the card is complete and the docstring says what the mechanism is", sizes=(1,))
def card(case: Case, n: int) -> None:
    card = case.cls.card
    expect(bool(card.title and card.reference and card.time), "title, reference and time must be given")
    expect(bool(card.state) or not card.decodes, "a mechanism that decodes says how its state grows")
    expect(len((case.cls.__doc__ or "").strip()) > 40, "the class has no docstring with its claim and equation")
    own = [name for name in case.build().config if name not in ("dim", "heads", "causal", "rotary", "bias")]
    expect(len(own) <= 8, f"{len(own)} arguments of its own: {own}; at most 8")


@prop("shapes", "the output has the shape of x and is finite; batches of one and n = 1 work")
def shapes(case: Case, n: int) -> None:
    module = case.build()
    for batch in (1, 3):
        x, context = case.x(n, batch), case.context(n, batch)
        output = case.outputs(module, x, context).output
        wanted = (batch, case.settings["dim"]) if case.pattern is Pattern.POOL else tuple(x.shape)
        expect(tuple(output.shape) == wanted, f"x {list(x.shape)} gives {list(output.shape)}, want {list(wanted)}")
        expect(bool(output.isfinite().all()), f"x {list(x.shape)} gives values that are not finite")


@prop("dtype", "float32 and bfloat16 in, the same out, finite, on the same device", sizes=(1, 9))
def dtype(case: Case, n: int) -> None:
    for kind in (torch.float32, torch.bfloat16):
        module = case.build(kind)
        x, context = case.x(n, dtype=kind), case.context(n, dtype=kind)
        result = case.outputs(module, x, context)
        expect(result.output.dtype == kind, f"{kind} in, {result.output.dtype} out")
        expect(result.output.device == x.device, f"output on {result.output.device}, x on {x.device}")
        expect(bool(result.output.isfinite().all()), f"{kind} output is not finite")


@prop("single-precision", "float32 agrees with float64", sizes=(5, 17))
def single_precision(case: Case, n: int) -> None:
    x, context = case.x(n), case.context(n)
    double = case.outputs(case.build(), x, context).output
    single = case.outputs(case.build(torch.float32), x.float(), each(context, Tensor.float)).output
    expect_close(single.double(), double, "float32 against float64", tolerance=2e-3)


# -- who may see whom --------------------------------------------------------------------------------------------------


@prop("no-future", "output i does not change when any later token does", when=lambda c: c.pattern.causal)
def no_future(case: Case, n: int) -> None:
    module = case.build()
    x, context = case.x(n, 1), case.context(n, 1)
    clean = case.outputs(module, x, context).output
    for cut in sorted({1, n // 2, n - 1} - {0, n}):
        for trial, size in enumerate((1.0, 10.0, 100.0)):
            changed = x.clone()
            changed[:, cut:] = size * case.x(n - cut, 1, seed=7 + trial)
            dirty = case.outputs(module, changed, context).output
            message = f"tokens from {cut} on were changed, and an output before them changed (a leak from the future)"
            expect_close(dirty[:, :cut], clean[:, :cut], message)


@prop("sees-all", "without causality, or in the context, later tokens do matter", sizes=(4, 9))
def sees_all(case: Case, n: int) -> None:
    if case.pattern.causal and not case.pattern.cross:
        return _sees_past(case, n)
    module = case.build()
    x, context = case.x(n, 1), case.context(n, 1)
    clean = case.outputs(module, x, context).output
    if case.pattern.cross:
        other = case.outputs(module, x, case.context(n, 1, seed=900)).output
        return expect(bool((other - clean).abs().max() > 1e-9), "another context gives the same output")
    changed = x.clone()
    changed[:, -1] = case.x(n, 1, seed=5)[:, -1]
    other = case.outputs(module, changed).output
    early = (other - clean).flatten(1) if case.pattern is Pattern.POOL else (other - clean)[:, :-1]
    return expect(bool(early.abs().max() > 1e-9), "changing the last token changes no earlier output")


def _sees_past(case: Case, n: int) -> None:
    module, x = case.build(), case.x(n, 1)
    changed = x.clone()
    changed[:, 0] = case.x(n, 1, seed=5)[:, 0]
    gap = (case.outputs(module, changed).output - case.outputs(module, x).output)[:, 1:]
    expect(bool(gap.abs().max() > 1e-9), "changing the first token changes no later output")


@prop("batch", "rows of a batch do not influence each other, nor does non-finite input in another row")
def batch(case: Case, n: int) -> None:
    module = case.build()
    x, context = case.x(n, 3), case.context(n, 3)
    together = case.outputs(module, x, context).output
    for row in range(3):
        alone = case.outputs(module, x[row : row + 1], each(context, lambda c, r=row: c[r : r + 1])).output  # type: ignore[misc]
        expect_close(together[row : row + 1], alone, f"row {row} of 3 differs from the same row alone")
    broken = x.clone()
    broken[1, 0] = torch.nan
    dirty = case.outputs(module, broken, context).output
    expect_close(dirty[0], together[0], "NaN in row 1 changed row 0")
    first = dirty[1] if case.pattern is Pattern.POOL else dirty[1, 0]
    expect(bool(first.isnan().any()), "NaN in the first token is hidden from its output")


# -- masks -------------------------------------------------------------------------------------------------------------


def _padded(tensor: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Garbage behind each row's length, and the mask that says so."""
    mask = (
        torch.arange(tensor.shape[1], device=tensor.device)[None] < torch.tensor(lengths, device=tensor.device)[:, None]
    )
    return torch.where(mask[..., None], tensor, 1e3 * tensor.flip(1) + 50.0), mask


@prop("padding", "padded tokens take no weight, whatever stands there", sizes=(2, 3, 5, 9, 17, 33), when=_is_sequence)
def padding(case: Case, n: int) -> None:
    module = case.build()
    x, context = case.x(n), case.context(n)
    lengths = [n - n // 2, n - 1]
    given: Any
    mask: Any
    if case.pattern.cross:
        parts = (context,) if isinstance(context, Tensor) else context
        padded = [_padded(part, lengths) for part in parts]
        given, mask = tuple(p for p, _ in padded), tuple(m for _, m in padded)
        given, mask = (given[0], mask[0]) if isinstance(context, Tensor) else (given, mask)
    else:
        given, mask = _padded(x, lengths)
    for row, length in enumerate(lengths):
        if case.pattern.cross:
            output = case.outputs(module, x, given, mask=mask).output[row]
            short = each(context, lambda c, r=row, k=length: c[r : r + 1, :k])  # type: ignore[misc]
            wanted = case.outputs(module, x[row : row + 1], short).output[0]
        else:
            output = case.outputs(module, given, mask=mask).output[row, :length]
            wanted = case.outputs(module, x[row : row + 1, :length]).output[0]
        expect_close(output, wanted, f"row {row}, {length} of {n} tokens real: differs from the row without padding")


@prop("pool-padding", "padded tokens take no weight in a pool or a grid", sizes=(2, 3, 5, 9))
def pool_padding(case: Case, n: int) -> None:
    if case.pattern not in (Pattern.POOL, Pattern.GRID):
        return
    module, x = case.build(), case.x(n)
    if case.pattern is Pattern.POOL:
        dirty, mask = _padded(x, [n - n // 2, n])
        wanted = case.outputs(module, x[:1, : n - n // 2]).output
        expect_close(case.outputs(module, dirty, mask=mask).output[:1], wanted, "padding changes the pool")
        return
    mask = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device)
    mask[:, -1] = False
    first, second = (torch.where(mask[..., None], x, torch.full_like(x, fill)) for fill in (50.0, -3.0))
    one, other = (case.outputs(module, given, mask=mask).output[:, :-1] for given in (first, second))
    expect_close(one, other, "what stands in masked cells changes the others")
    shifted = case.outputs(module, x[:, :-1]).output
    expect_close(one, shifted, "a masked last row differs from a grid without it")


@prop("left-padding", "left padding with positions equals no padding", when=lambda c: c.pattern is Pattern.CAUSAL_SELF)
def left_padding(case: Case, n: int) -> None:
    module, x = case.build(), case.x(n, 1)
    for pad in (1, 3):
        dirty, mask, positions = _left_padded(x, pad)
        output = case.outputs(module, dirty, mask=mask, positions=positions).output[:, pad:]
        expect_close(output, case.outputs(module, x).output, f"{pad} padded tokens before {n} real ones change them")


def _left_padded(x: Tensor, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    dirty = torch.cat([torch.full_like(x[:, :1], 1e3).expand(-1, pad, -1), x], 1)
    mask = torch.arange(dirty.shape[1], device=x.device)[None].expand(x.shape[0], -1) >= pad
    return dirty, mask, (mask.cumsum(1) - 1).clamp(min=0)


@prop("all-true-mask", "a mask that allows everything changes nothing", sizes=(1, 5, 17))
def all_true_mask(case: Case, n: int) -> None:
    module, x, context = case.build(), case.x(n), case.context(n)
    mask = each(context, _everything) if case.pattern.cross else _everything(x)
    plain = case.outputs(module, x, context).output
    expect_close(case.outputs(module, x, context, mask=mask).output, plain, "an all-True mask changes the output")


def _everything(tensor: Tensor) -> Tensor:
    return torch.ones(tensor.shape[:-1], dtype=torch.bool, device=tensor.device)


@prop("all-padding", "a row with nothing to attend to gives no weight, no NaN, no NaN gradient", sizes=(1, 5, 17))
def all_padding(case: Case, n: int) -> None:
    module, x, context = case.build(), case.x(n).requires_grad_(), case.context(n)

    def only_second(tensor: Tensor) -> Tensor:
        mask = _everything(tensor)
        mask[0] = False
        return mask

    mask = each(context, only_second) if case.pattern.cross else only_second(x)
    result = module(x, context, mask=mask)
    total = result.output.sum() + sum(result.losses.values())
    total.backward()
    expect(bool(result.output.isfinite().all()), "the output of an all-padding row is not finite")
    expect(all(bool(loss.isfinite()) for loss in result.losses.values()), "a loss is not finite")
    grads = [x.grad] + [p.grad for p in module.parameters()]
    expect(all(bool(g.isfinite().all()) for g in grads if g is not None), "a gradient is not finite")
    weights = case.outputs(module, x.detach(), context, mask=mask, need_weights=True).weights
    if weights is not None:
        expect(bool((weights[0] == 0).all()), "an all-padding row has weights that are not zero")


@prop("dense-mask", "a dense mask is obeyed, also per head, or refused", sizes=(2, 5, 9, 17), when=_is_sequence)
def dense_mask(case: Case, n: int) -> None:
    module, x, context = case.build(), case.x(n), case.context(n)
    if module.sources > 1:
        return
    m = n if context is None else context.shape[1]
    generator = torch.Generator().manual_seed(n)
    for heads in (1, case.settings["heads"]):
        mask = (torch.rand(2, heads, n, m, generator=generator) < 0.5).to(x.device)
        mask[:, :, range(n), range(n)] = True
        try:
            result = case.outputs(module, x, context, mask=mask, need_weights=True)
        except ValueError as error:
            expect("mask" in str(error), f"a dense mask is refused without a word on masks: {error}")
            return
        fast = case.outputs(module, x, context, mask=mask).output
        expect_close(fast, result.output, f"dense mask {list(mask.shape)}: with and without need_weights differ")
        if result.weights is not None:
            forbidden = result.weights.masked_select(~mask.expand_as(result.weights))
            expect(bool((forbidden.abs() <= 1e-12).all()), "a key forbidden by the dense mask has weight")
        free = case.outputs(module, x, context).output
        expect(bool((free - fast).abs().max() > 1e-9), "a dense mask that forbids half the keys changes nothing")


# -- weights and gradients ---------------------------------------------------------------------------------------------


@prop("weights", "asking for weights changes nothing: the fast path equals the eager one, gradients too")
def weights(case: Case, n: int) -> None:
    if not _grid_or(case, SIZES, n):
        return
    module = case.build()
    masks = [None] if module.sources > 1 else [None, "padding"]
    for kind in masks:
        x, context = case.x(n).requires_grad_(), case.context(n)
        mask = None
        if kind:
            mask = _everything(x if context is None else context)
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
            _weights_shape(case, eager.weights, x, context)


def _weights_shape(case: Case, found: Tensor, x: Tensor, context: Any) -> None:
    tokens = x.flatten(1, -2).shape[1]
    parts = [x.flatten(1, -2)] if context is None else ([context] if isinstance(context, Tensor) else list(context))
    queries = 1 if case.pattern is Pattern.POOL else tokens
    wanted = (x.shape[0], case.settings["heads"], queries, sum(p.shape[1] for p in parts))
    expect(tuple(found.shape) == wanted, f"weights have shape {list(found.shape)}, want {list(wanted)}")


@prop("weights-causal", "weights on the future are zero", when=lambda c: c.pattern is Pattern.CAUSAL_SELF)
def weights_causal(case: Case, n: int) -> None:
    found = case.outputs(case.build(), case.x(n), need_weights=True).weights
    if found is not None:
        expect(bool((found.triu(1) == 0).all()), "a weight on a later token is not zero")


@prop("gradients", "every parameter gets a gradient", sizes=(33,))
def gradients(case: Case, n: int) -> None:
    module = case.build()
    n = 9 if case.pattern is Pattern.GRID else n
    context = case.context(n, 4)
    result = module(case.x(n, 4), context)
    loss = (result.output * torch.randn_like(result.output)).sum() + sum(result.losses.values())
    loss.backward()
    for name, parameter in module.named_parameters():
        reached = parameter.grad is not None and bool((parameter.grad != 0).any())
        expect(reached, f"no gradient reaches {name} {list(parameter.shape)}")


@prop("gradcheck", "analytic gradients equal numeric ones in float64", sizes=(3, 6))
def gradcheck(case: Case, n: int) -> None:
    n = min(n, 4) if case.pattern is Pattern.GRID else n
    module, context = case.build(), case.context(n, 1)
    names = [name for name, _ in module.named_parameters()]
    values = [value.detach().clone().requires_grad_() for _, value in module.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        result = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, context))
        return torch.cat([result.output.flatten(), *(loss.view(1) for loss in result.losses.values())])

    try:
        inputs = (case.x(n, 1).requires_grad_(), *values)
        torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-4, rtol=1e-3)
    except RuntimeError as error:
        raise Violation(f"gradcheck: {str(error).strip().splitlines()[0]}") from None


@prop("losses", "auxiliary losses are finite scalars and padding does not enter them", sizes=(5, 17))
def losses(case: Case, n: int) -> None:
    module, x, context = case.build(), case.x(n), case.context(n)
    found = case.outputs(module, x, context).losses
    for name, loss in found.items():
        expect(loss.ndim == 0 and bool(loss.isfinite()), f"loss {name} has shape {list(loss.shape)} or is not finite")
    if found and context is None:
        dirty, mask = _padded(torch.cat([x, x], 1), [n, n])
        again = case.outputs(module, dirty, mask=mask).losses
        for name, loss in found.items():
            expect_close(again[name], loss, f"loss {name} changes with padding")


# -- numbers -----------------------------------------------------------------------------------------------------------


@prop("deterministic", "in eval mode the same input gives the same output, and x is left as it was", sizes=(1, 17))
def deterministic(case: Case, n: int) -> None:
    module, x, context = case.build(), case.x(n), case.context(n)
    copy = x.clone()
    first = case.outputs(module, x, context).output
    expect(torch.equal(x, copy), "the input was changed in place")
    expect(torch.equal(first, case.outputs(module, x, context).output), "two calls differ")


@prop("extreme", "inputs of 1e4 give finite outputs and gradients", sizes=(1, 5, 17))
def extreme(case: Case, n: int) -> None:
    module = case.build(torch.float32)
    x, context = 1e4 * case.x(n, dtype=torch.float32), each(case.context(n, dtype=torch.float32), lambda c: 1e4 * c)
    x.requires_grad_()
    output = module(x, context).output
    expect(bool(output.isfinite().all()), "x of size 1e4 gives outputs that are not finite")
    output.sum().backward()
    expect(x.grad is not None and bool(x.grad.isfinite().all()), "x of size 1e4 gives a gradient that is not finite")


@prop("oracle", "equals the independent computation given", when=lambda c: c.oracle is not None)
def oracle(case: Case, n: int) -> None:
    assert case.oracle is not None
    module, x, context = case.build(), case.x(n), case.context(n)
    with torch.no_grad():
        wanted = case.oracle(module, x, context)
    expect_close(case.outputs(module, x, context).output, wanted, "differs from the oracle")


@prop("not-softmax", "with the parameters of softmax attention it is not plain softmax attention", sizes=(33,))
def not_softmax(case: Case, n: int) -> None:
    from manyheads.mechanisms.plain.softmax import Softmax

    if case.cls is Softmax or case.pattern not in SEQUENCES:
        return
    module = case.build()
    plain = Softmax(case.settings["dim"], case.settings["heads"], causal=case.pattern.causal).double().eval()
    theirs, ours = module.state_dict(), plain.state_dict()
    if any(name not in theirs or theirs[name].shape != value.shape for name, value in ours.items()):
        return
    plain.load_state_dict({name: theirs[name] for name in ours})
    x, context = case.x(n), case.context(n)
    gap = (case.outputs(module, x, context).output - case.outputs(plain, x, context).output).abs().max()
    expect(bool(gap > 1e-6), "it computes plain softmax attention")


@prop("compile", "torch.compile gives the same", sizes=(9,))
def compiled(case: Case, n: int) -> None:
    module, x, context = case.build(), case.x(n), case.context(n)
    torch._dynamo.reset()
    fast: Any = torch.compile(module, backend="aot_eager", dynamic=False)
    with warnings.catch_warnings():
        # The compiler's own deprecations are not the mechanism's.
        warnings.simplefilter("ignore", DeprecationWarning)
        output = case.outputs(fast, x, context).output
    expect_close(output, case.outputs(module, x, context).output, "compiled differs")


# -- config ------------------------------------------------------------------------------------------------------------


@prop("round-trip", "config (as JSON) and state_dict rebuild the same module", sizes=(5,))
def round_trip(case: Case, n: int) -> None:
    module, x, context = case.build(), case.x(n), case.context(n)
    again = case.cls(**json.loads(json.dumps(module.config))).to(case.device, torch.float64).eval()
    expect(again.config == module.config, f"config {module.config} comes back as {again.config}")
    again.load_state_dict(module.state_dict())
    expect_close(
        case.outputs(again, x, context).output, case.outputs(module, x, context).output, "rebuilt module differs"
    )


@prop("refuses", "undeclared patterns, unknown arguments and wrong inputs raise ValueError or TypeError", sizes=(4,))
def refuses(case: Case, n: int) -> None:
    module, x = case.build(), case.x(n)
    context = case.context(n)
    _must_raise(
        "an unknown argument", lambda: case.cls(**{**case.settings, "no_such_argument": 1}), (TypeError, ValueError)
    )
    # A pool is called as self attention is; what it declares is another result.
    declared = case.cls.card.patterns | ({Pattern.NONCAUSAL_SELF} if case.pattern is Pattern.POOL else set())
    for pattern in (p for p in (*SEQUENCES, Pattern.GRID) if p not in declared):
        other = Case(case.cls, pattern, case.config, case.device)
        _must_raise(f"the undeclared pattern {pattern.value}", lambda o=other: o.build()(o.x(n), o.context(n)))  # type: ignore[misc]
    _must_raise("a mask of floats", lambda: module(x, context, mask=torch.ones(2, n, device=x.device)))
    wrong = torch.ones(2, n + 7, dtype=torch.bool, device=x.device)
    _must_raise("a mask of the wrong length", lambda: module(x, context, mask=wrong))
    _must_raise("x of the wrong dim", lambda: module(x[..., :-1], context))
    _must_raise("an empty sequence", lambda: module(x[:, :0], context))
    if case.pattern.cross:
        _must_raise("a context of the wrong dim", lambda: module(x, each(context, lambda c: c[..., :-1])))


def _must_raise(what: str, call: Callable[[], Any], kinds: tuple[type[Exception], ...] = (ValueError,)) -> None:
    try:
        call()
    except kinds:
        return
    except Exception as error:
        raise Violation(f"{what} raises {type(error).__name__} instead of ValueError: {error}") from None
    raise Violation(f"{what} is accepted in silence")


# -- decoding ----------------------------------------------------------------------------------------------------------


def _decode(
    case: Case, module: Mechanism, x: Tensor, context: Any, chunks: list[int], **call: Any
) -> tuple[Tensor, State]:
    state, parts, start = module.init_state(x.shape[0]), [], 0
    for size in chunks:
        now = {name: value[:, start : start + size] for name, value in call.items()}
        parts.append(case.outputs(module, x[:, start : start + size], context, state=state, **now).output)
        start += size
    return torch.cat(parts, 1), state


@prop("decode", "token by token and in chunks equals the parallel pass", when=_decodes)
def decode(case: Case, n: int) -> None:
    module, x, context = case.build(), case.x(n), case.context(n)
    wanted = case.outputs(module, x, context).output
    for chunks in ([1] * n, [n - n // 3, *[1] * (n // 3)], [n // 2, 1, n - n // 2 - 1], [n]):
        sizes = [c for c in chunks if c > 0]
        output, state = _decode(case, module, x, context, sizes)
        if sum(sizes) == n:
            expect_close(output, wanted, f"decoding in chunks of {sizes} differs from one pass")
            expect(state.length == n, f"the state counts {state.length} tokens after {n}")


@prop("decode-padded", "decoding a left-padded batch equals the parallel pass", when=_decodes, sizes=(2, 5, 9, 17, 33))
def decode_padded(case: Case, n: int) -> None:
    if case.pattern.cross:
        return
    module, x = case.build(), case.x(n)
    mask = torch.arange(n, device=x.device)[None] >= torch.tensor([[n // 2], [0]], device=x.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = case.outputs(module, x, mask=mask, positions=positions).output
    for chunks in ([n // 2 + 1, *[1] * (n - n // 2 - 1)], [1] * n):
        output, _ = _decode(case, module, x, None, chunks, mask=mask, positions=positions)
        gap = torch.where(mask[..., None], output - wanted, 0.0)
        expect_close(gap, torch.zeros_like(gap), f"left-padded, chunks {chunks}: differs from one pass")


@prop(
    "decode-weights",
    "weights of a decoded token are a row of the parallel ones, or refused",
    when=_decodes,
    sizes=(2, 9),
)
def decode_weights(case: Case, n: int) -> None:
    module, x, context = case.build(), case.x(n), case.context(n)
    wanted = case.outputs(module, x, context, need_weights=True).weights
    state = module.init_state(2)
    case.outputs(module, x[:, :-1], context, state=state)
    try:
        result = case.outputs(module, x[:, -1:], context, state=state, need_weights=True)
    except ValueError as error:
        expect("state" in str(error), f"weights are refused without a word on the state: {error}")
        return
    expect((wanted is None) == (result.weights is None), "weights exist in one of decoding and the parallel pass only")
    if wanted is not None and result.weights is not None:
        row = wanted[:, :, -1:]
        # A window's state has dropped what the row gives no weight.
        held = result.weights.shape[-1]
        expect_close(result.weights, row[..., row.shape[-1] - held :], "the decoded row of weights differs")
        expect(bool((row[..., : row.shape[-1] - held] == 0).all()), "a dropped key has weight in the parallel pass")


@prop("reorder", "after state.reorder each row continues the row it came from", when=_decodes, sizes=(2, 5, 9, 17))
def reorder(case: Case, n: int) -> None:
    module, x, context = case.build(), case.x(n, 3), case.context(n, 3)
    for index in ([2, 0, 1], [1, 1, 0], [2], [0, 1, 2, 0, 2]):
        rows = torch.tensor(index, device=x.device)
        state, half = module.init_state(3), n - n // 2
        case.outputs(module, x[:, :half], context, state=state)
        state.reorder(rows)
        moved, context_moved = x[rows], each(context, lambda c, r=rows: c[r])  # type: ignore[misc]
        if half == n:
            continue
        output = case.outputs(module, moved[:, half:], context_moved, state=state).output
        wanted = case.outputs(module, moved, context_moved).output[:, half:]
        expect_close(output, wanted, f"after reorder({index}) the continuation differs: the state is stale")


@prop("truncate", "a truncated state continues as if the rest had not been seen, or says that it cannot", when=_decodes)
def truncate(case: Case, n: int) -> None:
    if n < 2:
        return
    module, x, context = case.build(), case.x(n), case.context(n)
    state, keep = module.init_state(2), n // 2
    case.outputs(module, x, context, state=state)
    try:
        state.truncate(keep)
    except ValueError:
        return
    expect(state.length == keep, f"truncate({keep}) leaves a state of {state.length}")
    other = torch.cat([x[:, :keep], case.x(n - keep, seed=77)], 1)
    output = case.outputs(module, other[:, keep:], context, state=state).output
    wanted = case.outputs(module, other, context).output[:, keep:]
    expect_close(output, wanted, f"after truncate({keep}) of {n} the continuation differs")


@prop(
    "state-bytes", "state.nbytes is what its tensors take; a constant state stays constant", when=_decodes, sizes=(9,)
)
def state_bytes(case: Case, n: int) -> None:
    module, context = case.build(), case.context(n)
    sizes = []
    for length in (n, 8 * n):
        # One token at a time, as in use: a long first chunk may hold more for a moment.
        _, state = _decode(case, module, case.x(length), context, [1] * length)
        found = _tensor_bytes(state)
        expect(state.nbytes == found, f"state.nbytes is {state.nbytes}, its tensors take {found}")
        sizes.append(found)
    if not re.search(r"\bn\b", case.cls.card.state):
        grown = f"the card says a constant state, but it takes {sizes} bytes after {n} and {8 * n} tokens"
        expect(sizes[0] == sizes[1], grown)
        _, state = _decode(case, module, case.x(9 * n), context, [8 * n, *[1] * n])
        most = 2 * sizes[0]
        expect(
            state.nbytes <= most, f"after a pass of {8 * n} tokens the state keeps {state.nbytes} bytes, over {most}"
        )


def _tensor_bytes(root: object) -> int:
    """Bytes of every storage that can be reached from an object."""
    storages: dict[int, int] = {}
    stack, seen = [root], set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif hasattr(item, "__dict__"):
            stack.extend(vars(item).values())
    return sum(storages.values())


@prop("state-refuses", "a state of another mechanism, batch size or module is refused", when=_decodes, sizes=(3,))
def state_refuses(case: Case, n: int) -> None:
    module, x, context = case.build(), case.x(n), case.context(n)
    _must_raise("a state for another batch size", lambda: module(x, context, state=module.init_state(5)))
    _must_raise("a state of another mechanism", lambda: module(x, context, state=State("another", 2)))


# The shell is named here so that a mechanism built on it is held to its own stages as well.
@prop("stages", "a mechanism on the softmax shell overrides one to three of its stages", sizes=(1,))
def stages(case: Case, n: int) -> None:
    from manyheads.softmax import changed_stages

    if issubclass(case.cls, SoftmaxAttention):
        changed = changed_stages(case.cls)
        expect(len(changed) <= 3, f"it overrides {changed}: four or more stages want an `attend` of their own")
