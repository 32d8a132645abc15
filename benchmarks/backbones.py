"""Backbones made cheaper, with the quality and the time of each: distilled and windowed, of shifts, and pruned.

    python benchmarks/backbones.py                   # all three, three seeds
    python benchmarks/backbones.py --only orders     # or shifts, or pruned: the others keep what is held
    python benchmarks/backbones.py --tiny --dry      # that it runs

orders: Efficient Transformer Knowledge Distillation (arXiv:2311.13657). The packaged model's layers halved and its
attention made a window's, by distillation in both orders, beside either alone, each of which is trained as long.
shifts: ShiftAddViT (arXiv:2306.06446), stages 2 and 3 in the packaged model: what a weight takes, healed alike.
pruned: DIMAP (arXiv:2404.13648). A Swin of two stages, trained on scikit-learn's digits for this, without the weights
that matter least, against the smallest over all blocks. Times are of a prompt (a batch of images), as shares of the
original's, by turns; shifts are not faster where weights are multiplied.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from common import RESULTS, save
from manyheads.convert.damage import Judge, Sizes, answers
from manyheads.convert.dimap import dimap, weight_scores
from manyheads.convert.distilled import student
from manyheads.convert.healing import Healing, heal
from manyheads.convert.hosted import hosted
from manyheads.convert.primitives import primitive_mixture, settled_mixture
from manyheads.convert.shifted import BITS, settled, shifted
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.questions import Questions, library_text

MEASURES = ("src/manyheads/convert", "src/manyheads/mechanisms/selection/mswa.py")

WINDOW = {"name": "mswa", "window": 64}
LENGTHS = (512, 2048)
TURNS = 5
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """tokens: of each training, of which an order has two. steps: of the Swin's training on digits."""

    sizes: Sizes
    tokens: int
    lengths: tuple[int, ...]
    steps: int
    seeds: int


USUAL = Setting(Sizes(), 40_960, LENGTHS, 400, 3)
TINY = Setting(Sizes(1, 128, 1, 128), 512, (64, 128), 2, 1)


class Language:
    """Text of one seed, what is measured on it, and training."""

    def __init__(self, loaded: Loaded, setting: Setting, seed: int) -> None:
        self.loaded, self.setting, self.seed = loaded, setting, seed
        questions = Questions(loaded, seed=seed)
        self.judge = Judge(loaded, questions, setting.sizes)
        windows = questions.windows(setting.sizes.length, setting.sizes.windows * setting.seeds)
        self.judge.windows = [torch.tensor(row) for row in windows[seed :: setting.seeds]]
        self.learnt = Questions(loaded, text=library_text(), where="the library", seed=100 + seed)

    def trained(self, model: Any, *, teacher: Any = None, times: int = 1) -> Any:
        """A copy, distilled (without a teacher: from the original) for so many times the tokens of one training."""
        sizes = self.setting.sizes
        plan = Healing(times * self.setting.tokens, 1e-3, sizes.length, 4, seed=self.seed, form="distil")
        by = self.loaded.model if teacher is None else teacher
        return heal(copy.deepcopy(model), self.learnt, plan, teacher=by)

    def figures(self, model: Any) -> Row:
        judge = self.judge
        text = judge.distance(model)
        keys = sum(answers(model, trial) for trial in judge.trials) / len(judge.trials)
        ids = torch.randint(0, 256, (1, max(self.setting.lengths)), generator=torch.Generator().manual_seed(0))
        times = {
            str(n): turns(lambda each, n=n: each(ids[:, :n], use_cache=False, logits_to_keep=1), model,
                          self.loaded.model)
            for n in self.setting.lengths
        }  # fmt: skip
        return {
            "bits_per_token": text["bits_per_token"], "kl_bits": text["kl_bits"], "passkeys": keys,
            "parameters": sum(p.numel() for p in model.parameters()), "time_of": times,
        }  # fmt: skip


@torch.no_grad()
def turns(call: Callable[[Any], Any], model: Any, original: Any) -> float:
    """Processor time as a share of the original's, by turns."""
    taken: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(TURNS):
        for side, each in enumerate((model, original)):
            began = time.process_time()
            call(each)
            taken[side].append(time.process_time() - began)
    return median(taken[0]) / median(taken[1])


def orders(loaded: Loaded, setting: Setting, seed: int) -> Iterator[tuple[str, Row]]:
    run, source = Language(loaded, setting, seed), loaded.model
    count = source.config.num_hidden_layers
    half, every = count // 2, range(count)
    window = f"a window of {WINDOW['window']}"

    def windowed(model: Any) -> Any:
        return hosted(model, WINDOW, range(model.config.num_hidden_layers))

    yield "the original", run.figures(source)
    yield window, run.figures(run.trained(hosted(source, WINDOW, every), times=2))
    yield f"{half} layers", run.figures(run.trained(student(source, half), times=2))
    efficient = run.trained(windowed(source))
    found = run.trained(student(efficient, half), teacher=efficient)
    yield f"{window}, then {half} layers", run.figures(found)
    found = run.trained(windowed(run.trained(student(source, half))))
    yield f"{half} layers, then {window}", run.figures(found)


def shifts(loaded: Loaded, setting: Setting, seed: int) -> Iterator[tuple[str, Row]]:
    run, source = Language(loaded, setting, seed), loaded.model
    small = sum(part.weight.numel() for part in source.model.modules() if type(part) is torch.nn.Linear)
    whole = sum(p.numel() for p in source.parameters())
    # Bits of a weight: 32 of what is multiplied, five of what is shifted.
    of_shifts = (32 * (whole - small) + BITS * small) / (32 * whole)
    yield "the original", {**run.figures(source), "weight_bytes": 1.0}
    yield "the original, healed", {**run.figures(run.trained(source)), "weight_bytes": 1.0}
    made = shifted(source)
    yield f"shifts of {BITS} bits", {**run.figures(settled(made)), "weight_bytes": of_shifts}
    yield f"shifts of {BITS} bits, healed", {**run.figures(settled(run.trained(made))), "weight_bytes": of_shifts}
    mixed = primitive_mixture(source, BITS)
    # Both experts are there: a mixture saves arithmetic and no bytes.
    for name, model in (("shifts and products", mixed), ("shifts and products, healed", run.trained(mixed))):
        yield name, run.figures(settled_mixture(model))


def swin(setting: Setting, seed: int) -> Any:
    """A classifier of two stages, trained on digits."""
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(seed)
    sizes = {"image_size": 16, "patch_size": 2, "num_channels": 1, "embed_dim": 24, "depths": [2, 2]}
    config = SwinConfig(**sizes, num_heads=[2, 4], window_size=4, num_labels=10, drop_path_rate=0.0)
    model = SwinForImageClassification(config)
    images, labels = digit_images(config, held_out=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(setting.steps):
        rows = torch.randint(0, len(images), (64,))
        loss = model(images[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def digit_images(config: Any, *, held_out: bool) -> tuple[Tensor, Tensor]:
    """[b, 1, size, size] from -1 to 1, to train on or all those that are held out, and which digit each is."""
    from manyheads.tasks.digits import scaled, split

    images, labels = split()[held_out]
    small = scaled(images)["pixel_values"]
    size = (config.image_size, config.image_size)
    return torch.nn.functional.interpolate(small, size, mode="bilinear", align_corners=False), labels


def smallest_gone(model: Any, share: float) -> Any:
    """Without the weights of least magnitude over all blocks: the same weights compete as in DIMAP."""
    made, names = copy.deepcopy(model), list(weight_scores(model))
    weights = [made.get_parameter(name) for name in names]
    flat = torch.cat([weight.detach().abs().flatten() for weight in weights])
    lost = torch.zeros(len(flat), dtype=torch.bool)
    lost[flat.argsort(stable=True)[: round(share * len(flat))]] = True
    with torch.no_grad():
        for weight, gone in zip(weights, lost.split([w.numel() for w in weights]), strict=True):
            weight.masked_fill_(gone.view_as(weight), 0.0)
    return made


@torch.no_grad()
def told(model: Any, images: Tensor, labels: Tensor) -> float:
    return float((model(images).logits.argmax(-1) == labels).double().mean())


def pruned(loaded: Loaded, setting: Setting, seed: int) -> Iterator[tuple[str, Row]]:
    source = swin(setting, seed)
    images, labels = digit_images(source.config, held_out=True)
    ways: Mapping[str, Callable[[Any, float], Any]] = {"dimap": dimap, "magnitude": smallest_gone}

    def row(model: Any, share: float) -> Row:
        time_of = {"images": turns(lambda each: each(images[:64]), model, source)}
        found = {"right": told(model, images, labels), "share": share, "time_of": time_of}
        return {**found, "parameters": sum(p.numel() for p in model.parameters())}

    yield "the original", row(source, 0.0)
    for share in (0.5, 0.7, 0.8):
        for name, way in ways.items():
            yield f"{share:.0%} of the weights by {name}", row(way(source, share), share)
    yield "a third of the heads by dimap", row(dimap(source, 1 / 3, structure="heads"), 1 / 3)


PARTS: Mapping[str, Callable[[Loaded, Setting, int], Iterator[tuple[str, Row]]]] = {
    "orders": orders, "shifts": shifts, "pruned": pruned,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), help="one part")
    parser.add_argument("--tiny", action="store_true", help="to see that it runs, with --dry")
    parser.add_argument("--dry", action="store_true", help="print, and leave the committed results alone")
    given = parser.parse_args()
    if given.tiny and not given.dry:
        parser.error("--tiny is to see that it runs: give --dry with it")
    torch.set_num_threads(1)
    setting, loaded, rows = TINY if given.tiny else USUAL, load_model(), held(given.only)
    for part in PARTS if given.only is None else (given.only,):
        for seed in range(setting.seeds):
            for way, found in PARTS[part](loaded, setting, seed):
                rows.append({"part": part, "way": way, "seed": seed, **found})
                print(rows[-1], flush=True)
        if not given.dry:
            save("backbones", "cpu", rows, tell=False)


def held(only: str | None) -> list[Row]:
    """Rows of the other parts."""
    path = RESULTS / "backbones.json"
    if only is None or not path.is_file():
        return []
    return [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["part"] != only]


if __name__ == "__main__":
    main()
