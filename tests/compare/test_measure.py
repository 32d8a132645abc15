"""Measurement: FLOPs and bytes against arithmetic by hand, gates that shut, and limits that hold."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import forked
import pytest
import torch
from torch import Tensor

import manyheads.registry as registry
from manyheads.card import Card
from manyheads.compare import measure
from manyheads.compare.cells import measured_pattern
from manyheads.compare.measure import Subject, counted, measure_decode, measure_memory, measure_speed
from manyheads.compare.worker import run_cell
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import list_attentions, mechanism_class
from manyheads.runs.outcome import _available_bytes, memory_bounded
from manyheads.softmax import SoftmaxAttention

SIZE = {"hidden_size": 16, "heads": 4, "batch": 2}


@pytest.fixture(autouse=True)
def _short_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_GATE_LENGTH", 40)
    measure._gate.cache_clear()
    measure._decode_gate.cache_clear()


def settings(kind: str, name: str = "softmax", /, *, args: Any = None, **changes: Any) -> dict[str, Any]:
    limits = {"speed": {"repeats": 2, "limit_seconds": 5.0}, "decode": {"tokens": 3, "limit_seconds": 5.0}}
    own = SIZE | limits.get(kind, {"limit_seconds": 60.0}) | changes.pop("size", {})
    whole = {"mechanism": {"name": name, "args": args or {}}, "device": "cpu", "precision": "float32", kind: own}
    return whole | changes


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_flops_of_causal_attention_by_hand(kv_heads: int) -> None:
    n, dim, heads, batch = 24, 16, 4, 2
    found = measure_speed(settings("speed", args={"kv_heads": kv_heads}, n=n, pattern="causal-self"))
    projections = 2 * batch * n * dim * (dim + dim + 2 * dim * kv_heads // heads)
    pairs = sum(1 for i in range(n) for j in range(n) if j <= i)
    assert found["forward_flops"] == projections + 2 * 2 * batch * heads * pairs * (dim // heads)


def test_flops_of_full_attention_by_hand() -> None:
    found = measure_speed(settings("speed", n=24, pattern="noncausal-self"))
    assert found["forward_flops"] == 2 * 2 * 24 * 16 * (4 * 16 + 2 * 24)


def test_flops_without_kernels_that_hide_them() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    output, flops = counted(lambda: a @ b)
    torch.testing.assert_close(output, a @ b)
    assert flops == 2 * 3 * 5 * 7
    assert counted(lambda: a + 1)[1] is None


def test_times_are_of_the_right_size() -> None:
    short, long = (
        measure_speed(settings("speed", n=n, pattern="causal-self", size={"repeats": 5})) for n in (32, 2048)
    )
    assert 0 < short["forward_s"] < short["forward_backward_s"]
    assert long["forward_s"] > 3 * short["forward_s"]
    assert long["method"] == "measured"
    assert "stop" not in long


def test_a_slow_pass_stops_the_longer_ones() -> None:
    found = measure_speed(settings("speed", n=64, pattern="causal-self", size={"limit_seconds": 1e-7}))
    assert found["forward_s"] > 0
    assert found["stop"].startswith("n 64 took")


@pytest.mark.parametrize("name", list_attentions())
def test_every_mechanism_is_measured_by_a_pattern_that_it_declares(name: str) -> None:
    pattern, args = measured_pattern(name), dict(mechanism_class(name).card.example)
    size = SIZE | {"hidden_size": args.pop("dim", 16), "heads": args.pop("heads", 4)}
    subject = Subject(settings("speed", name, args=args), size, pattern)
    x, context = subject.inputs(32)
    # Maps that fit together need not have so many cells in all.
    assert math.prod(x.shape) == 2 * 32 * size["hidden_size"] or (pattern == "maps" and 32 <= x.shape[1] <= 64)
    assert subject.module(x, context).output.isfinite().all()
    assert (pattern == "causal-self") == ("causal-self" in mechanism_class(name).card.patterns)


def test_decode_state_by_hand() -> None:
    found = {c: measure_decode(settings("decode", context=c)) for c in (20, 600)}
    for context, outcome in found.items():
        assert outcome["state_bytes"] == 2 * 2 * context * 16 * 4  # keys and values, batch 2, float32
        assert outcome["allocated_bytes"] >= outcome["state_bytes"]
        assert outcome["seconds_per_token"] > 0
    half = measure_decode(settings("decode", args={"kv_heads": 2}, context=20))
    assert half["state_bytes"] == found[20]["state_bytes"] // 2


def test_decode_state_that_does_not_grow() -> None:
    assert len({measure_decode(settings("decode", "hedgehog", context=c))["state_bytes"] for c in (20, 600)}) == 1
    window = [measure_decode(settings("decode", "mswa", args={"window": 8}, context=c)) for c in (20, 600)]
    assert window[0]["state_bytes"] == window[1]["state_bytes"] == 2 * 2 * 15 * 16 * 4


def test_decode_gives_up_in_time() -> None:
    found = measure_decode(settings("decode", context=1200, size={"limit_seconds": 0.0}))
    assert found["status"] == "failed"
    assert found["stop"] == found["error"] == "filling the state took over 0 s at context 1200"


def planted(monkeypatch: pytest.MonkeyPatch, cls: type[Mechanism]) -> None:
    monkeypatch.setitem(registry._registered, cls.card.name, cls)


def card(name: str) -> Card:
    return Card(name=name, title=name, reference="-", family="plain", patterns={"causal-self"}, time="n", state="n")  # type: ignore[arg-type]


def test_no_time_for_a_fast_path_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(SoftmaxAttention):
        card = card("wrong-fast-path")

        def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Any) -> Tensor | None:
            mixed = super().fused(q, k, v, where)
            return None if mixed is None else mixed * 1.001

    planted(monkeypatch, Wrong)
    outcome = run_cell("speed", settings("speed", "wrong-fast-path", n=16, pattern="causal-self"))
    assert outcome["status"] == "failed"
    assert "outputs with and without need_weights differ by 0.001" in outcome["error"]
    assert "forward_s" not in outcome


def test_no_time_for_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    class Detached(SoftmaxAttention):
        card = card("wrong-gradient")

        def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Any) -> Tensor | None:
            return super().fused(q.detach(), k, v, where)

    planted(monkeypatch, Detached)
    with pytest.raises(ValueError, match="not timed: gradients"):
        measure_speed(settings("speed", "wrong-gradient", n=16, pattern="causal-self"))


def test_no_decode_time_where_steps_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgets(SoftmaxAttention):
        card = card("forgets")

        def attend(self, x: Tensor, context: Any, call: Call) -> Result:
            if call.state is not None and len(call.state.grown) and x.shape[1] == 1:
                call.state.grown["values"].view().zero_()
            return super().attend(x, context, call)

    planted(monkeypatch, Forgets)
    with pytest.raises(ValueError, match="not timed: step by step differs"):
        measure_decode(settings("decode", "forgets", context=16))


def test_peak_memory_of_a_fresh_process() -> None:
    size = {"hidden_size": 64, "heads": 4, "batch": 1}
    short, long = (measure_memory(settings("memory", n=n, pattern="causal-self", size=size)) for n in (2048, 8192))
    one = 8192 * 64 * 4  # bytes of one [n, dim] tensor; a forward pass holds some five of them at once
    assert 3 * one <= long["forward_peak_bytes"] <= 20 * one
    assert long["forward_peak_bytes"] <= long["peak_bytes"] <= 60 * one
    assert 2 <= long["peak_bytes"] / short["peak_bytes"] <= 8


def test_the_meter_reads_what_is_allocated() -> None:
    code = """
from manyheads.runs.memory import _ProcessMeter
spike = bytearray(300 * 2**20)  # before: must not count
del spike
meter = _ProcessMeter()
held = bytearray(50 * 2**20)
first = meter.peak()
del held
print(first / 2**20, meter.peak() / 2**20)
"""
    ran = forked.run("-c", code)
    assert ran.returncode == 0, ran.stderr
    for reading in map(float, ran.stdout.split()):
        assert 49 <= reading <= 60


def test_what_goes_wrong_in_the_fresh_process_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = measure_memory(settings("memory", n=16, pattern="causal-self", args={"heads_of": 3}))
    assert wrong["status"] == "failed"
    assert "heads_of" in wrong["error"]
    slow = measure_memory(settings("memory", n=16, pattern="causal-self", size={"limit_seconds": 0.05}))
    assert slow["status"] == "failed"
    assert "took over 0.05 s" in slow["stop"]
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "ended with code 1" in measure_memory(settings("memory", n=16, pattern="causal-self"))["error"]


def test_a_killed_process_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    outcome = run_cell("memory", settings("memory", n=16, pattern="causal-self"))
    assert outcome["status"] == "failed"
    assert "killed by signal 9" in outcome["error"]
    assert outcome["stop"]


def test_too_large_an_allocation_is_an_error_and_not_the_end() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    nearly_all = int(0.97 * (_available_bytes() or 0))  # Linux grants it, and kills whoever fills it
    with pytest.raises(RuntimeError, match="can't allocate memory"), memory_bounded():
        torch.empty(nearly_all, dtype=torch.uint8)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_running_out_of_memory_stops_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(SoftmaxAttention):
        card = card("greedy")

        def attend(self, x: Tensor, context: Any, call: Call) -> Result:
            if x.dtype == torch.float32:
                torch.empty(1 << 44, dtype=torch.uint8)
            return super().attend(x, context, call)

    planted(monkeypatch, Greedy)
    outcome = run_cell("speed", settings("speed", "greedy", n=16, pattern="causal-self"))
    assert outcome["status"] == "failed"
    assert "memory" in outcome["stop"]
    assert json.dumps(outcome)
