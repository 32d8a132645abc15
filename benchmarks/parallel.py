"""One sequence over processes on this machine: bytes against the formula, memory, time, balance, and rounding.

`python benchmarks/parallel.py` takes about twelve minutes of two cores; `--short`: shorter sequences, for a busy
machine. With a GPU for each process the same is measured with NCCL (`--device cuda`).
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import save
from manyheads.functional.linear import Kernel
from manyheads.parallel import Layout, heads_attention, ring_attention, state_attention, traffic, windowed_attention
from manyheads.parallel.layout import Alone
from manyheads.parallel.plan import HELD, SENT, Imagined, Shape, costs
from manyheads.runs.memory import memory_meter, trim_memory

MEASURES = ("src/manyheads/parallel/",)

HEADS, WIDTH, WINDOW = 8, 64, 256
SHAPES: dict[str, dict[str, Any]] = {
    "ring": {},
    "heads": {},
    "state": {"memory": (WIDTH, WIDTH)},
    "halo": {"windows": (WINDOW,) * HEADS},
}
KINDS = {"ring": "zigzag", "heads": "zigzag", "state": "contiguous", "halo": "contiguous"}
CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "ring": functools.partial(ring_attention, causal=True),
    "heads": functools.partial(heads_attention, causal=True),
    "state": functools.partial(state_attention, kernel=Kernel(floor=None), causal=True),
    "halo": functools.partial(windowed_attention, windows=[WINDOW] * HEADS),
}


def shape(scheme: str, n: int, item: int = 4) -> Shape:
    return Shape(1, n, HEADS, HEADS, WIDTH, WIDTH, item, **SHAPES[scheme])


def drawn(n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, n, WIDTH, generator=made, dtype=torch.float64).to(dtype).to(device) for _ in range(4)]


# -- in each process ---------------------------------------------------------------------------------------------------


def begin(folder: Path, rank: int, size: int, device: str) -> torch.device:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=10))
    if device == "cuda":
        torch.cuda.set_device(rank)
    return torch.device(device, rank) if device == "cuda" else torch.device("cpu")


def shards(
    scheme: str, n: int, at: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Layout, list[torch.Tensor]]:
    layout = Layout(n, KINDS[scheme])
    q, k, v, gradient = (layout.shard(x, 2) for x in drawn(n, at, dtype))
    return layout, [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), gradient]


def sends(at: torch.device, scheme: str, n: int) -> dict[str, Any]:
    layout, (q, k, v, gradient) = shards(scheme, n, at)
    with traffic() as forward:
        out = CALLS[scheme](q, k, v, layout)
    with traffic() as backward:
        out.backward(gradient)
    place = layout.place
    told = SENT[scheme](shape(scheme, n), Imagined(n, KINDS[scheme], place.rank, place.size))
    return {"sent": forward.bytes + backward.bytes, "told": sum(told)}


def holds(at: torch.device, scheme: str, n: int) -> dict[str, Any]:
    """Peak above what was there before q, k and v were; of the second pass, as buffers come with the first."""
    layout, short = shards(scheme, min(n, 1024), at)
    CALLS[scheme](*short[:3], layout).backward(short[3])
    del short
    trim_memory()
    layout, (q, k, v, gradient) = shards(scheme, n, at)
    trim_memory()
    meter = memory_meter(at)
    CALLS[scheme](q, k, v, layout).backward(gradient)
    # What holds the three themselves was there when the meter was made.
    given = sum(x.nbytes for x in (q, k, v))
    told = HELD[scheme](shape(scheme, n), layout.count(), layout.place.size)[1]
    gradients = sum(x.nbytes for x in (q, k, v, gradient))
    return {"peak": meter.peak() + given, "told": told, "beside": gradients}


def takes(at: torch.device, scheme: str, n: int, rounds: int) -> dict[str, Any]:
    layout, (q, k, v, gradient) = shards(scheme, n, at)

    def once() -> float:
        dist.barrier()
        start = time.perf_counter()
        CALLS[scheme](q, k, v, layout).backward(gradient)
        if at.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter() - start

    once()
    together = [once() for _ in range(rounds)]
    alone = []
    if dist.get_rank() == 0:
        whole = [x.requires_grad_() for x in drawn(n, at)[:3]]
        back = drawn(n, at)[3]
    for _ in range(rounds):
        dist.barrier()
        if dist.get_rank() == 0:
            start = time.perf_counter()
            CALLS[scheme](*whole, Alone(n, "contiguous")).backward(back)
            if at.type == "cuda":
                torch.cuda.synchronize()
            alone.append(time.perf_counter() - start)
        dist.barrier()
    return {"together": together, "alone": alone}


def rounds_off(at: torch.device, scheme: str, n: int) -> dict[str, Any]:
    """Largest error of bfloat16 relative to the largest number, against one process in float64; beside it that of one
    process in bfloat16 by PyTorch's own kernel, and of the same inputs rounded and no more."""
    layout, (q, k, v, gradient) = shards(scheme, n, at, torch.bfloat16)
    out = CALLS[scheme](q, k, v, layout)
    out.backward(gradient)
    results = {"output": out, "q": q.grad, "k": k.grad, "v": v.grad}
    whole = {name: layout.whole(x, 2).double() for name, x in results.items()}
    exact, plain = one_process(n, at, torch.float64), one_process(n, at, torch.bfloat16)
    found = {}
    for name, right in exact.items():
        largest = right.abs().amax()
        found[name] = {
            "ring": float((whole[name] - right).abs().amax() / largest),
            "sdpa": float((plain[name].double() - right).abs().amax() / largest),
            "rounded": float((right.bfloat16().double() - right).abs().amax() / largest),
        }
    return found


def one_process(n: int, at: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    q, k, v, gradient = (x.to(dtype) for x in drawn(n, at, torch.bfloat16))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    out.backward(gradient)
    grads = {name: x.grad for name, x in (("q", q), ("k", k), ("v", v))}
    return {"output": out.detach()} | {name: x for name, x in grads.items() if x is not None}


def member(folder: Path, rank: int, size: int, device: str, what: str, given: tuple[Any, ...]) -> None:
    at = begin(folder, rank, size, device)
    measures: dict[str, Callable[..., dict[str, Any]]] = {
        "sends": sends, "holds": holds, "takes": takes, "rounds_off": rounds_off
    }  # fmt: skip
    (folder / f"{rank}.json").write_text(json.dumps(measures[what](at, *given)))
    dist.barrier()
    dist.destroy_process_group()


# -- over them ---------------------------------------------------------------------------------------------------------


def measured(size: int, device: str, what: str, *given: Any) -> list[dict[str, Any]]:
    """What each of so many fresh processes found."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = [context.Process(target=member, args=(folder, r, size, device, what, given)) for r in range(size)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            raise RuntimeError(f"{what}{given} in {size} processes ended with {[p.exitcode for p in started]}")
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--short", action="store_true", help="shorter sequences, for a busy machine")
    options = parser.parse_args()
    device, short = options.device, options.short
    n, held, long, sizes, rounds = (1024, 4096, 4096, (2, 4), 3) if short else (4096, 8192, 16384, (2, 4, 8), 7)
    rows: list[dict[str, Any]] = [
        {"what": "settings", "short": short, "heads": HEADS, "head_dim": WIDTH, "window": WINDOW}
    ]
    for scheme in CALLS:
        for size in sizes:
            found = measured(size, device, "sends", scheme, n)
            ratio = max(abs(one["sent"] / one["told"] - 1) if one["told"] else float(one["sent"]) for one in found)
            rows.append({"what": "bytes", "scheme": scheme, "processes": size, "n": n, "worst_deviation": ratio,
                         "sent": max(one["sent"] for one in found), "target": 0.01})  # fmt: skip
            print(rows[-1], flush=True)
    twice = [max(one["sent"] for one in measured(2, device, "sends", "state", length)) for length in (n, 2 * n)]
    rows.append({"what": "LASP-2 traffic at twice the length", "n": n, "ratio": twice[1] / twice[0], "target": 1.0})
    for scheme in CALLS:
        for size in sizes:
            found = measured(size, device, "holds", scheme, held)
            peak = max(one["peak"] for one in found)
            rows.append({"what": "peak against the plan", "scheme": scheme, "processes": size, "n": held, "peak": peak,
                         "told": found[0]["told"], "ratio": peak / found[0]["told"]})  # fmt: skip
            print(rows[-1], flush=True)
    (alone,), four = measured(1, device, "holds", "ring", long), measured(4, device, "holds", "ring", long)
    rows.append({"what": "peak of 4 processes against one", "scheme": "ring", "n": long, "alone": alone["peak"],
                 "ratio": max(one["peak"] for one in four) / alone["peak"], "target": 0.35})  # fmt: skip
    times = measured(2, device, "takes", "ring", n, rounds)[0]
    ratio = statistics.median(times["together"]) / (statistics.median(times["alone"]) / 2)
    rows.append({"what": "time of 2 processes against half of one's", "scheme": "ring", "n": n, "ratio": ratio,
                 "alone_s": statistics.median(times["alone"]), "target": 1.25})  # fmt: skip
    for size in (2, 4, 8):
        (ring,) = [cost for cost in costs(shape("ring", long), size) if cost.scheme == "ring"]
        rows.append({"what": "busiest process over the mean, zigzag", "processes": size, "n": long,
                     "ratio": ring.busiest, "target": 1.1})  # fmt: skip
    for name, errors in measured(2, device, "rounds_off", "ring", n)[0].items():
        rows.append({"what": "bfloat16 against float64", "of": name, "n": n, **errors})
    save("parallel", device, rows)


if __name__ == "__main__":
    # Left alone, glibc keeps some of what is freed, by chance; the server of processes starts with this.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 16))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["manyheads.parallel", "torch._dynamo"])
    main()
