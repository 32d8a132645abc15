"""What the recipes of models that draw share: `dit.py`, `unet.py`.

Pictures and captions are drawn anew for every batch (`manyheads.tasks.two_digits`, from four of five of scikit-learn's
digits); one caption in ten is empty, for classifier-free guidance. The loss is the velocity's mean squared error at
times from a logit-normal distribution. Matrices of attention and MLPs are trained by Muon, the rest by AdamW; what is
kept is the moving average of the weights. The learning rate follows the clock, so two runs agree closely but not bit
for bit. A killed run goes on from its last checkpoint, with the optimizers' moments begun anew.

`--minutes` are of the clock. Figures of the packaged models: `benchmarks/dit.py`, and the cards beside their weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from manyheads.tasks.two_digits import batch, shown


@dataclass(frozen=True)
class Training:
    """How a model is trained: with its sizes, everything that decides the run besides the machine's speed."""

    seed: int = 0
    batch: int = 64
    muon_lr: float = 4e-3
    adam_lr: float = 3e-3
    empty: float = 0.1
    average: float = 0.995


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with adjust_lr_fn="match_rms_adamw" and no weight decay, in float32 and with matrices of one
    shape at a time: there Newton and Schulz' iteration is in bfloat16, a third of a whole step where a processor has no
    such product."""

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                moved = orthogonal(torch.stack([self._moment(matrix) for matrix in matrices]))
                for matrix, change in zip(matrices, moved, strict=True):
                    matrix.sub_(change, alpha=group["lr"] * 0.2 * max(shape) ** 0.5)

    def _moment(self, matrix: torch.nn.Parameter) -> torch.Tensor:
        assert matrix.grad is not None
        kept = self.state[matrix].setdefault("moment", torch.zeros_like(matrix))
        return matrix.grad.lerp(kept.lerp_(matrix.grad, 0.05), 0.95)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly U V^T of each U S V^T, [count, rows, columns], by five of Newton and Schulz' steps."""
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


class Run:
    """make: the model of a recipe. inner: whether a matrix of this name is Muon's."""

    def __init__(self, recipe: Any, make: Callable[[Any], Any], inner: Callable[[str], bool], out: Path):
        self.recipe, self.out, self.step, self.seconds = recipe, out, 0, 0.0
        torch.manual_seed(recipe.seed)
        self.model, self.average = make(recipe), make(recipe).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        matrices, rest = [], []
        for name, parameter in self.model.named_parameters():
            (matrices if parameter.ndim == 2 and inner(name) else rest).append(parameter)
        self.optimizers = [
            Muon(matrices, lr=recipe.muon_lr),
            torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    @property
    def _state(self) -> Path:
        return self.out / "training.safetensors"

    def save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        about = {"step": self.step, "seconds": self.seconds, "recipe": asdict(self.recipe)}
        part = self._state.with_suffix(".part")
        save_file(tensors, part, {"about": json.dumps(about)})
        part.replace(self._state)
        self.export()

    def resume(self) -> bool:
        if not self._state.exists():
            return False
        from safetensors import safe_open

        with safe_open(self._state, "pt") as opened:
            about = json.loads(opened.metadata()["about"])
        if about["recipe"] != asdict(self.recipe):
            raise ValueError(f"{self._state} belongs to another recipe ({about['recipe']}): choose another --out")
        tensors = load_file(self._state)
        for name, model in (("model", self.model), ("average", self.average)):
            model.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(name)})
        self.step, self.seconds = about["step"], about["seconds"]
        return True

    def export(self) -> None:
        """The folder that from_pretrained reads: the averaged weights as float16."""
        model = type(self.average)(self.average.config)
        model.load_state_dict(self.average.state_dict())
        model.half().save_pretrained(self.out / "model")

    def loss(self) -> torch.Tensor:
        rng = np.random.default_rng((self.recipe.seed, self.step))
        pictures, captions = batch(rng, self.recipe.batch)
        told = ["" if rng.random() < self.recipe.empty else caption for caption in captions]
        ids, mask = self.model.encode(told)
        time_of = torch.from_numpy(1 / (1 + np.exp(-rng.normal(size=len(told))))).float()
        noise = torch.from_numpy(rng.normal(size=pictures.shape)).float()
        t = time_of[:, None, None, None]
        return self.model((1 - t) * pictures + t * noise, time_of, ids, mask, labels=noise - pictures).loss

    def train(self, seconds: float) -> None:
        begun, said, saved, mean = time.perf_counter() - self.seconds, self.seconds, self.seconds, 0.0
        while self.seconds < seconds:
            share = self.seconds / seconds
            rate = min(1.0, (self.step + 1) / 50, (1 - share) / 0.5 + 0.01)
            for optimizer, lr in zip(self.optimizers, (self.recipe.muon_lr, self.recipe.adam_lr), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = lr * rate
            loss = self.loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
            own = min(self.recipe.average, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for kept, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    kept.lerp_(new, 1 - own)
            mean += (loss.item() - mean) * max(0.02, 1 / self.step)
            self.seconds = time.perf_counter() - begun
            if self.seconds - said >= 20:
                said = self.seconds
                left = seconds - said
                print(f"{said:6.0f} s, {left:.0f} left; step {self.step}, loss {mean:.4f}", flush=True)
            if self.seconds - saved >= 60:
                saved = self.seconds
                self.save()
        self.save()


def train(recipe: type[Any], make: Callable[[Any], Any], inner: Callable[[str], bool], what: str) -> None:
    """A command line of the recipe's fields, and the run."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--out", type=Path, required=True)
    for name, value in asdict(recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    minutes, out = given.pop("minutes"), given.pop("out")
    out.mkdir(parents=True, exist_ok=True)
    run = Run(recipe(**given), make, inner, out)
    state = "resumed" if run.resume() else "new"
    print(f"{state}: {sum(p.numel() for p in run.model.parameters()):,} parameters", flush=True)
    run.train(60 * minutes)
    captions = [f"a {i % 10} {relation} a {(i + 3) % 10}" for i, relation in enumerate(["left of", "above"] * 10)]
    seen = shown(run.average.eval().sample(captions), captions)
    print(f"right: {sum(own['right'] for own in seen) / len(seen):.0%} of {len(seen)}", flush=True)
