"""Some training after a conversion, on all weights: windows of text, half of them ending in a hidden key.

AdamW, half a cosine after a short warm-up, gradients clipped to 1. What has been done is kept in `FOLDER/healing.*`
every two minutes, so that a run that was stopped goes on from there; the same seed gives the same batches.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.hosts.questions import Questions
from manyheads.runs.files import write_atomically
from manyheads.runs.steps import Tell, silent

KEEP_EVERY = 120.0  # seconds
WARM = 0.05


@dataclass(frozen=True)
class Healing:
    """tokens in all, in rows of `length`, `batch` rows to a step. passkeys: share of the rows that end in a key."""

    tokens: int
    rate: float = 1e-3
    length: int = 512
    batch: int = 8
    passkeys: float = 0.5
    seed: int = 0

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.length * self.batch)))


def heal(model: Any, questions: Questions, plan: Healing, *, keep: Path | None = None, tell: Tell = silent) -> Any:
    """The model, trained where it stands. questions: on text that nothing is measured on. keep: the beginning of
    the paths of what a stopped run goes on from."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.0)
    first = _resume(model, optimizer, plan, keep)
    model.train()
    kept = time.perf_counter()
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * _share(step, plan.steps)
        ids = batch(questions, plan, step).to(model.device)
        loss = model(ids, labels=ids, use_cache=False).loss
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"healing diverged at step {step} (loss {value}): give a smaller --lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tell(step + 1, plan.steps, f"loss {value:.3f}")
        if keep is not None and time.perf_counter() - kept > KEEP_EVERY:
            _keep(model, optimizer, plan, keep, step + 1)
            kept = time.perf_counter()
    if keep is not None:
        for path in _files(keep):
            path.unlink(missing_ok=True)
    return model.eval()


def batch(questions: Questions, plan: Healing, step: int) -> Tensor:
    """The rows of one step, [batch, length]."""
    rng = random.Random(f"healing {plan.seed} {step}")
    rows = []
    for row in range(plan.batch):
        if rng.random() < plan.passkeys:
            trial = questions.passkey(plan.length, rng.random(), step * plan.batch + row)
            rows.append(trial.prefix + trial.tail)
        else:
            rows.append(questions.stretch(rng, plan.length))
    return torch.tensor(rows)


def _share(step: int, steps: int) -> float:
    warm = max(1, round(WARM * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _files(keep: Path) -> tuple[Path, Path]:
    return keep.with_name(keep.name + ".safetensors"), keep.with_name(keep.name + ".json")


def _keep(model: Any, optimizer: Any, plan: Healing, keep: Path, step: int) -> None:
    from safetensors.torch import save

    weights, facts = _files(keep)
    tensors = {f"model.{n}": p.detach().contiguous() for n, p in model.named_parameters()}
    for n, parameter in model.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors[f"{kind}.{n}"] = optimizer.state[parameter][kind].contiguous()
    # One file holds all of it, with the step: a kill between two files would mix two moments.
    write_atomically(weights, save(tensors, {"step": str(step)}))
    write_atomically(facts, json.dumps(asdict(plan)))


def _resume(model: Any, optimizer: Any, plan: Healing, keep: Path | None) -> int:
    if keep is None or not all(path.is_file() for path in _files(keep)):
        return 0
    from safetensors import safe_open

    weights, facts = _files(keep)
    if json.loads(facts.read_text()) != asdict(plan):
        return 0  # of another run
    with safe_open(weights, "pt") as file, torch.no_grad():
        step = int(file.metadata()["step"])
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"model.{name}"))
            held = {kind: file.get_tensor(f"{kind}.{name}") for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **held}
    return step
