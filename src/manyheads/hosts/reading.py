"""Who reads which attention layer, now and when backward computes a layer anew.

Gradient checkpointing runs a layer a second time, in backward, when the tap that read or changed its first run may be
gone, or another be open. What is checkpointed by transformers' own layers is therefore run again in the state of its
first run: the same readers in the same order, the same configs, and each reader's notes (`call.memo`) on the same call.
Whoever checkpoints by other means tells nobody, and is refused.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.finite import broken_tokens
from manyheads.hosts.calls import MechanismCall
from manyheads.hosts.inside import inner_call, is_shell, tells_weights
from manyheads.hosts.sites import Site
from manyheads.inner import Inner
from manyheads.mechanism import Mechanism, Result

# Gets a call; may give back an output [b, h, n, e] ([b, n, dim] of a mechanism) that takes the place of the call's.
Reader = Callable[[Any], Tensor | None]
# Where transformers keeps its checkpoint function on a module.
_FUNCTION = "_gradient_checkpointing_func"

_readers: weakref.WeakKeyDictionary[nn.Module, list[tuple[Site, Reader]]] = weakref.WeakKeyDictionary()
_hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_running: _Run | None = None


def readings(module: nn.Module) -> Iterator[tuple[Site, Reader, dict[str, Any]]]:
    """Who reads this call of the module, first come first, each with its notes on the call."""
    own = _readers.get(module, [])
    for site, reader in list(own):
        yield site, reader, {} if _running is None else _running.notes()


@contextmanager
def reading(site: Site, reader: Reader) -> Iterator[None]:
    """While open, the reader reads the site."""
    entry, own = (site, reader), _readers.setdefault(site.module, [])
    own.append(entry)
    try:
        with _listening(site.module):
            yield
    finally:
        own.remove(entry)


def fitting(changed: Tensor, wanted: torch.Size, site: Site) -> Tensor:
    if changed.shape != wanted:
        raise ValueError(f"{site.path}: a reader returned {tuple(changed.shape)}; the output is {tuple(wanted)}")
    return changed


# -- mechanisms --------------------------------------------------------------------------------------------------------


@contextmanager
def _listening(module: nn.Module) -> Iterator[None]:
    """Mechanisms are read from inside or, where they offer nothing, by hooks; once however many readers there are."""
    if not isinstance(module, Mechanism) or module in _hooked:
        yield
        return
    ear = _Ear(module)
    hooks = [
        module.register_forward_pre_hook(ear.before, with_kwargs=True),
        module.register_forward_hook(ear.after, with_kwargs=True),
    ]
    module.__dict__["listener"] = ear.inside
    _hooked.add(module)
    try:
        yield
    finally:
        _hooked.discard(module)
        module.__dict__.pop("listener", None)
        for hook in hooks:
            hook.remove()


class _Ear:
    """One mechanism's pass, as it begins, inside, and at its end."""

    def __init__(self, module: Mechanism):
        self.module = weakref.ref(module)
        self.state: Any = None
        self.broken: Tensor | None = None
        self.asked = self.heard = self.cross = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own: Any = module
        named = {**dict(zip(("x", "context"), args, strict=False)), **kwargs}
        self.state, self.cross = named.get("state"), named.get("context") is not None
        self.asked, self.heard = bool(named.get("need_weights")), False
        self.broken = _broken(own, named.get("x"), None if self.cross else named.get("mask"), self.state)
        # A pass that changes a state cannot be made a second time for its weights.
        wants = tells_weights(own) or (self.state is not None and not is_shell(own))
        return args, kwargs | {"need_weights": True} if wants else kwargs

    def inside(self, inner: Inner) -> Tensor:
        module, output = self.module(), inner.output
        assert module is not None
        check_run(module)
        self.heard = True
        own = list(readings(module))
        if callable(output):
            if len(own) == 1:
                return self._read_once(own[0], inner)
            output = output()
        for site, reader, memo in own:
            call = inner_call(site, inner, self.state, self.broken, self.cross)
            call.output, call.memo = output, memo
            changed = reader(call)
            if changed is not None:
                output = fitting(changed, output.shape, site)
        return output

    def _read_once(self, reading: tuple[Site, Reader, dict[str, Any]], inner: Inner) -> Tensor:
        """A sole reader that puts another output in its place, without a look at it, leaves the pass's own unmade."""
        site, reader, memo = reading
        call = inner_call(site, inner, None, self.broken, self.cross)
        call.output, call.memo = inner.output, memo
        changed = reader(call)
        if changed is None:
            return call.output
        return fitting(changed, torch.Size((*inner.query.shape[:3], inner.value.shape[-1])), site)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Result) -> Result:
        if not self.heard:
            check_run(module)
            for site, reader, memo in readings(module):
                call = MechanismCall(site, args, kwargs, result, memo)
                changed = reader(call)
                if changed is not None:
                    result = result._replace(output=fitting(changed, result.output.shape, site))
        self.state = self.broken = None
        return result if self.asked else result._replace(weights=None)


def _broken(module: Any, x: Any, mask: Any, state: Any) -> Tensor | None:
    """[b, n] real tokens of NaN or infinity, and all behind them in a state, of a module that does not read them as
    such: no past may read its future."""
    if not module.causal or not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point():
        return None
    found = broken_tokens(x)
    if found is not None and isinstance(mask, Tensor) and mask.ndim == 2:
        found = found & mask[:, -x.shape[1] :]
    if state is None or state.broken is None:
        return found
    before = (state.broken < state.length)[:, None].expand(*x.shape[:2])
    return before if found is None else before | found


# -- running again -----------------------------------------------------------------------------------------------------


class _Run:
    """A checkpointed function of a module: every run of it is in the state of the first."""

    def __init__(self, owner: nn.Module, function: Callable[..., Any]):
        self.function = function
        self.state = [(each, list(_readers.get(each, [])), each.__dict__.get("config")) for each in owner.modules()]
        self.kept: list[Any] = []
        self.at = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        global _running
        before, _running, self.at = _running, self, 0
        try:
            with self._restored():
                return self.function(*args, **kwargs)
        finally:
            _running = before

    @contextmanager
    def _restored(self) -> Iterator[None]:
        now = [(each, _readers.get(each, []), each.__dict__.get("config")) for each, _, _ in self.state]
        with ExitStack() as stack:
            stack.callback(_set, now)
            _set(self.state)
            for each, own, _ in self.state:
                if own:
                    stack.enter_context(_listening(each))
            yield

    def next(self, make: Callable[[], Any]) -> Any:
        """What the first run made at this place."""
        if self.at == len(self.kept):
            self.kept.append(make())
        self.at += 1
        return self.kept[self.at - 1]

    def notes(self) -> dict[str, Any]:
        found: dict[str, Any] = self.next(dict)
        return found


def _set(state: list[tuple[nn.Module, list[tuple[Site, Reader]], Any]]) -> None:
    for module, own, config in state:
        if own or module in _readers:
            _readers[module] = own
        if config is not None:
            module.__dict__["config"] = config


class _Checkpoint:
    """Takes the place of a module's checkpoint function: what that runs again is a `_Run`."""

    def __init__(self, owner: nn.Module, own: Callable[..., Any]):
        self.owner, self.own, self.open = weakref.ref(owner), own, 0

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        owner = self.owner()
        assert owner is not None
        outer = _running
        run = _Run(owner, function) if outer is None else outer.next(lambda: _Run(owner, function))
        run.function = function
        return self.own(run, *args, **kwargs)


@contextmanager
def run_again_alike(model: nn.Module) -> Iterator[None]:
    """While open, whatever the model's layers checkpoint is run again in the state of its first run."""
    own = [each for each in model.modules() if _FUNCTION in each.__dict__]
    for each in own:
        if not isinstance(each.__dict__[_FUNCTION], _Checkpoint):
            each.__dict__[_FUNCTION] = _Checkpoint(each, each.__dict__[_FUNCTION])
        each.__dict__[_FUNCTION].open += 1
    try:
        yield
    finally:
        for each in own:
            found = each.__dict__.get(_FUNCTION)
            if isinstance(found, _Checkpoint):
                found.open -= 1
                if not found.open:
                    each.__dict__[_FUNCTION] = found.own


def without_graph() -> bool:
    """Whether a layer runs for the first time inside of a reentrant checkpoint: what a reader sees has no graph, and
    only the run in backward, whose readings nobody waits for, has one."""
    return _running is not None and not torch.is_grad_enabled()


def check_kept(model: nn.Module, who: str) -> None:
    """ValueError where a pass of the model would keep no graph (reentrant checkpointing), of which `who` needs one."""
    for module in model.modules():
        own = module.__dict__.get(_FUNCTION)
        own = own.own if isinstance(own, _Checkpoint) else own
        reentrant = getattr(own, "keywords", {}).get("use_reentrant", False)
        if reentrant and module.training and getattr(module, "gradient_checkpointing", False):
            raise ValueError(
                f"{who}: {type(model).__name__} checkpoints with use_reentrant=True, which keeps no graph of the pass: "
                "enable gradient checkpointing with use_reentrant=False, or do without"
            )


def check_run(module: nn.Module) -> None:
    """ValueError where this run of the module has another one, which is not known to be alike: one by backward of what
    ran outside of the tap, or one inside of somebody's own torch.utils.checkpoint."""
    if _running is not None or torch.compiler.is_compiling():
        return
    name = type(module).__name__
    if torch._C._current_graph_task_id() != -1:
        raise ValueError(
            f"{name} is computed anew by a backward pass, inside of a tap that its forward pass was not in: call "
            "backward outside of the tap"
        )
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            raise ValueError(
                f"{name} runs inside of torch.utils.checkpoint, which would run it again without its tap: let the "
                "model checkpoint its own layers (transformers' gradient checkpointing), enabled before the tap is "
                "opened, or do without"
            )
        frame = frame.f_back  # type: ignore[assignment]
