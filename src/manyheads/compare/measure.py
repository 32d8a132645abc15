"""Time, memory, FLOPs and decode cost of one mechanism by itself: no model around it."""

from __future__ import annotations

import copy
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from manyheads.card import Pattern
from manyheads.mechanism import Mechanism
from manyheads.registry import create_attention
from manyheads.runs.memory import memory_meter, trim_memory
from manyheads.state import State
from manyheads.testing.fed import feed

Settings = Mapping[str, Any]
_GATE_LENGTH = 560  # beyond the usual windows and blocks, so that the ways past the score matrix are taken
_CHUNK = 512  # tokens a pass while a decode state is filled: no mechanism needs a large score matrix for that


class Subject:
    """One mechanism, built for a pattern, with random inputs of length n for it."""

    def __init__(self, settings: Settings, size: Settings, pattern: str, dtype: torch.dtype | None = None) -> None:
        cuda = settings["device"] != "cpu" and torch.cuda.is_available()
        if settings["device"] == "cuda" and not cuda:
            raise ValueError("device is cuda and there is no CUDA device here; want device auto or cpu")
        self.device = torch.device("cuda" if cuda else "cpu")
        self.dtype = dtype or {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings["precision"]]
        self.pattern, self.batch, self.dim = Pattern(pattern), size["batch"], size["hidden_size"]
        mechanism = settings["mechanism"]
        torch.manual_seed(0)
        arguments = {"heads": size["heads"], **mechanism["args"]}
        built = create_attention(mechanism["name"], self.dim, causal=self.pattern.causal, **arguments)
        self.edges: Tensor | None = None
        if self.pattern is Pattern.GRAPH:
            built.register_forward_pre_hook(
                lambda _, args, named: (args, {"edges": self.edges, **named}), with_kwargs=True
            )
        self.module: Mechanism = feed(built.to(self.device, self.dtype).eval(), self.pattern)

    def inputs(self, n: int) -> tuple[Tensor, Any]:
        """x of n tokens (of a grid of n cells), and a context of as many where there is one."""
        x = self._x(n)
        if self.pattern is Pattern.GRAPH:
            self.edges = torch.randint(n, (2, 8 * n), device=self.device)  # sparse graphs have some eight to a node
        if not self.pattern.cross:
            return x, None
        parts = tuple(self._noise(n, self.module.source_dim or self.dim) for _ in range(self.module.sources))
        return x, parts[0] if self.module.sources == 1 else parts

    def _cells(self, side: int) -> int:
        return sum(height * width for height, width in self.module.map_sizes(side, side + 1))

    def _x(self, n: int) -> Tensor:
        height = max(side for side in range(1, math.isqrt(n) + 1) if n % side == 0)
        if self.pattern is Pattern.MAPS:  # n cells or a few more in all; one tensor, which `feed` takes apart
            cells = next(total for side in itertools.count(1) if (total := self._cells(side)) >= n)
            return self._noise(cells, max(self.module.map_dims or (self.dim,)))
        sides: dict[Pattern, tuple[int, ...]] = {Pattern.VOLUME: (1, height, n // height)}
        sides |= dict.fromkeys((Pattern.GRID, Pattern.GRID_CROSS), (height, n // height))
        return self._noise(*sides.get(self.pattern, (n,)), self.dim)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape).to(self.device, self.dtype)

    def settled(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure_speed(settings: Settings) -> dict[str, Any]:
    """Median seconds of a forward pass, and of a forward and backward pass, over one length; and counted FLOPs."""
    size, pattern, n = settings["speed"], settings["pattern"], settings["n"]
    _pass_gate(settings, size, pattern)
    subject = Subject(settings, size, pattern)
    x, context = subject.inputs(n)

    def forward() -> Tensor:
        with torch.no_grad():
            return subject.module(x, context).output

    output, flops = counted(forward)
    learning, grad = x.clone().requires_grad_(), torch.randn_like(output)

    def both() -> None:
        subject.module.zero_grad(set_to_none=True)
        learning.grad = None
        subject.module(learning, context).output.backward(grad)

    forward_s = _timed(forward, subject, size)
    both_s = _timed(both, subject, size)
    outcome = {"forward_s": forward_s, "forward_backward_s": both_s, "forward_flops": flops, "method": "measured"}
    outcome |= {"device": subject.device.type}
    if both_s > size["limit_seconds"]:
        outcome["stop"] = f"n {n} took {both_s:.1f} s forward and backward (limit {size['limit_seconds']:g} s)"
    return outcome


def _timed(run: Callable[[], Any], subject: Subject, size: Settings) -> float:
    """The median of up to `repeats` runs after one to warm up, in about limit_seconds all together."""
    times: list[float] = []
    began = time.perf_counter()
    for _ in range(size["repeats"] + 1):
        subject.settled()
        start = time.perf_counter()
        run()
        subject.settled()
        times.append(time.perf_counter() - start)
        if time.perf_counter() - began > size["limit_seconds"]:
            break
    return median(times[1:] or times)


def counted(forward: Callable[[], Tensor]) -> tuple[Tensor, int | None]:
    """The output, and the FLOPs of all matrix products in it (None where they cannot be counted).

    Causal scaled_dot_product_attention is counted as the half that its kernels compute. Elementwise work and Fourier
    transforms are not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    causal_at = {  # how many arguments stand between v and is_causal
        aten._scaled_dot_product_flash_attention_for_cpu: 1,
        aten._scaled_dot_product_flash_attention: 1,
        aten._scaled_dot_product_cudnn_attention: 3,
        aten._scaled_dot_product_efficient_attention: 3,
    }
    mapping = {kernel: partial(_attention_flops, place) for kernel, place in causal_at.items()}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    try:
        with counter:
            output = forward()
    except Exception:  # the counter's fault, or the mechanism's: then it fails without the counter too
        return forward(), None
    return output, int(counter.get_total_flops()) or None


def _attention_flops(place: int, q: Any, k: Any, v: Any, *rest: Any, is_causal: bool = False, **_: Any) -> int:
    """2 per multiply and add over q k^T and weights v. q, k, v: shapes [b, h, n, d], [b, g, m, d], [b, g, m, d]."""
    batch, heads, n, d = q
    m = k[-2]
    causal = is_causal or (len(rest) > place and rest[place])
    pairs = sum(min(i + 1, m) for i in range(n)) if causal else n * m
    return 2 * batch * heads * pairs * (d + v[-1])


# -- gates: no figure for what computes something else ---------------------------------------------------------------


def _pass_gate(settings: Settings, size: Settings, pattern: str) -> None:
    wanted = {"mechanism": settings["mechanism"], "device": settings["device"], "precision": "float32"}
    small = {"hidden_size": size["hidden_size"], "heads": size["heads"], "batch": 1}
    problem = _gate(json.dumps([wanted, small, pattern], sort_keys=True))
    if problem:
        raise ValueError(f"not timed: {problem}")


@lru_cache(maxsize=256)
def _gate(text: str) -> str:
    """'' where the pass that is timed computes what the pass with weights does, gradients too; else how it differs."""
    settings, size, pattern = json.loads(text)
    subject = Subject(settings, size, pattern, torch.float64)
    x, context = subject.inputs(_GATE_LENGTH)
    found = []
    for need_weights in (False, True):
        x = x.detach().requires_grad_()
        output = subject.module(x, context, need_weights=need_weights).output
        (grad,) = torch.autograd.grad(output.square().sum(), x)
        found.append((output.detach(), grad))
    for word, fast, plain in zip(("outputs", "gradients"), *found, strict=True):
        gap = float((fast - plain).abs().max() / plain.abs().max().clamp(min=1e-30))
        if not gap < 1e-6:
            return f"{word} with and without need_weights differ by {gap:.2g} (relative) at n {_GATE_LENGTH}"
    return ""


@lru_cache(maxsize=256)
def _decode_gate(text: str) -> str:
    settings, size, pattern = json.loads(text)
    subject = Subject(settings, size, pattern, torch.float64)
    x, _ = subject.inputs(48)
    with torch.no_grad():
        whole = subject.module(x).output
        state = subject.module.init_state(x.shape[0])
        parts = [subject.module(part, state=state).output for part in x.split([40, *[1] * 8], 1)]
    gap = float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max().clamp(min=1e-30))
    return "" if gap < 1e-6 else f"step by step differs from the parallel pass by {gap:.2g} (relative) at n 48"


# -- decoding ----------------------------------------------------------------------------------------------------------


def measure_decode(settings: Settings) -> dict[str, Any]:
    """Median seconds for one more token after a context, and the bytes that are remembered of it."""
    size, context = settings["decode"], settings["context"]
    wanted = {"mechanism": settings["mechanism"], "device": settings["device"], "precision": "float32"}
    small = {"hidden_size": size["hidden_size"], "heads": size["heads"], "batch": 1}
    problem = _decode_gate(json.dumps([wanted, small, "causal-self"], sort_keys=True))
    if problem:
        raise ValueError(f"not timed: {problem}")
    subject = Subject(settings, size, "causal-self")
    x, _ = subject.inputs(context + size["tokens"] + 1)
    with torch.no_grad():
        state = subject.module.init_state(size["batch"])
        began = time.perf_counter()
        for part in x[:, :context].split(_CHUNK, 1):
            subject.module(part, state=state)
            if time.perf_counter() - began > size["limit_seconds"]:
                words = f"filling the state took over {size['limit_seconds']:g} s at context {context}"
                return {"status": "failed", "error": words, "stop": words}
        outcome = {"state_bytes": live_bytes(state), "allocated_bytes": state.nbytes, "device": subject.device.type}
        times = []
        for step in range(context, x.shape[1]):
            subject.settled()
            start = time.perf_counter()
            subject.module(x[:, step : step + 1], state=state)
            subject.settled()
            times.append(time.perf_counter() - start)
    return outcome | {"seconds_per_token": median(times[1:])}


def live_bytes(state: State) -> int:
    """Bytes of what a state holds of its tokens, without the room that it keeps for more."""
    held = [buffer.view() for buffer in state.grown.values() if buffer.data is not None and len(buffer)]
    held += [*state.fixed.values(), *state.context.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


# -- memory ------------------------------------------------------------------------------------------------------------


def measure_memory(settings: Settings) -> dict[str, Any]:
    """Peak memory of one pass in a fresh process; see `peak_memory`, which runs there."""
    limit = settings["memory"]["limit_seconds"]
    command = [sys.executable, "-m", "manyheads.compare.worker"]
    try:
        ran = subprocess.run(
            command, input=json.dumps(dict(settings)), capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        words = f"n {settings['n']} took over {limit:g} s in a fresh process"
        return {"status": "failed", "error": words, "stop": words}
    if ran.returncode < 0:
        words = f"the process was killed by signal {-ran.returncode}, most likely for lack of memory"
        return {"status": "failed", "error": words, "stop": f"at n {settings['n']} {words}"}
    lines = ran.stdout.strip().splitlines()
    if ran.returncode or not lines:
        last = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        return {"status": "failed", "error": f"the measuring process ended with code {ran.returncode}: {last}"}
    outcome: dict[str, Any] = json.loads(lines[-1])
    return outcome


def peak_memory(settings: Settings) -> dict[str, Any]:
    """Peak bytes of a forward, and of a forward and backward pass, above what was there before them.

    To be called in a process that has done nothing else. Libraries, parameters and inputs belong to the baseline.
    """
    size, n = settings["memory"], settings["n"]
    subject = Subject(settings, size, settings["pattern"])
    _warm_up(subject)
    x, context = subject.inputs(n)
    meter = memory_meter(subject.device)
    with torch.no_grad():
        subject.module(x, context)
    forward = meter.peak()
    x.requires_grad_()
    subject.module(x, context).output.sum().backward()
    return {"forward_peak_bytes": forward, "peak_bytes": meter.peak(), "device": subject.device.type}


def _warm_up(subject: Subject) -> None:
    """Kernels, threads and their buffers come with the first pass at any length: they are no part of the peak."""
    module = subject.module
    subject.module = copy.deepcopy(module)
    x, context = subject.inputs(16)
    subject.module(x.requires_grad_(), context).output.sum().backward()
    subject.module = module
    trim_memory()
