"""Recall with a batch 16 times as large at the same tokens: what LAMB and AdamW reach, each at its best learning rate.

The same model, data, warm-up and decay; every rate of each optimizer is run, and all are in the result, so that neither
is compared at a rate that suits the other.
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F

from common import save
from manyheads.models.auto import ManyheadsForCausalLM
from manyheads.models.configuration import ManyheadsConfig
from manyheads.tasks.recall import Recall
from manyheads.training import Lamb, lamb_groups

MEASURES = ("src/manyheads/training/lamb.py",)

TASK = Recall(n=32, vocabulary=128, pairs=4)
BATCH, TIMES, STEPS = 4, 16, 2400
RATES = {"adamw": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), "lamb": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128)}


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": TASK.vocabulary, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 0}
    return ManyheadsForCausalLM(
        ManyheadsConfig(**sizes, layers=["softmax"], num_hidden_layers=1, short_conv=3, positions="none")
    )


def optimizer_of(name: str, model: Any, rate: float) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    return Lamb(lamb_groups(model, weight_decay=0.01), lr=rate)


def reached(name: str, rate: float, batch: int, steps: int, seed: int) -> float:
    """Share of the questions answered after training."""
    model = model_of(seed)
    optimizer = optimizer_of(name, model, rate)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    batches = TASK.train_batches(batch, seed)
    for _ in range(steps):
        drawn = next(batches)
        logits = model(**drawn.inputs, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), drawn.targets.flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    right, count = 0.0, 0
    with torch.no_grad():
        for drawn in TASK.eval_batches(128):
            one, of = TASK.score(model(**drawn.inputs, use_cache=False).logits, drawn.targets)
            right, count = right + one, count + of
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the small batch; a sixteenth of the large one")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, times, rates in (
        ("adamw", 1, (1e-3, 2e-3, 4e-3)), ("adamw", TIMES, RATES["adamw"]), ("lamb", TIMES, RATES["lamb"])
    ):  # fmt: skip
        for rate in rates:
            told = (name, rate, BATCH * times, options.steps // times)
            found = [reached(*told, seed) for seed in range(options.seeds)]
            rows.append({"optimizer": name, "batch": BATCH * times, "steps": told[3], "rate": rate, "seeds": found,
                         "accuracy": statistics.mean(found)})  # fmt: skip
            print(rows[-1], flush=True)
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["optimizer"], row["batch"]), []).append(row)
    best = {key: max(of, key=lambda row: row["accuracy"]) for key, of in groups.items()}
    for key, row in best.items():
        rows.append({"best of": f"{key[0]}, batch {key[1]}", "rate": row["rate"], "accuracy": row["accuracy"]})
    save("large_batch", "cpu", rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
