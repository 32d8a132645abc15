"""What every conversion of a checkpoint costs, before and after some healing, beside the original healed alike.

    python benchmarks/convert.py                      # the packaged model, three seeds, no healing; some minutes
    python benchmarks/convert.py --heal 200000        # and one seed healed with so many tokens, a control beside it
    python benchmarks/convert.py --only rotary        # those whose title has the word, beside what is held

Seeds draw the text between hidden keys, the random heads, and the batches of healing. The text that is measured is the
same for all, held out from what calibrates and heals.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch

from common import RESULTS, save
from manyheads.convert.damage import Judge, Sizes, calibration_rows
from manyheads.convert.healing import Healing, heal
from manyheads.convert.layout import cache_numbers
from manyheads.convert.method import Method
from manyheads.convert.methods import Grouped, Latent, Pruned
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.questions import Questions, library_text

MEASURES = (
    "src/manyheads/convert",
    "src/manyheads/hosts",
)

FIGURES = ("bits_per_token", "kl_bits", "passkeys")


def conversions(loaded: Loaded) -> list[tuple[Method, int, bool]]:
    """Method, how far, and whether it is healed too."""
    groups, heads = loaded.config.num_key_value_heads, loaded.config.num_attention_heads
    layers, half = loaded.config.num_hidden_layers, cache_numbers(loaded.model) // 2
    fewer = [g for g in range(1, groups) if groups % g == 0][::-1]
    found: list[tuple[Method, int, bool]] = []
    for count in fewer:
        first = count == fewer[0]
        found += [(Grouped(align), count, first and align != "first") for align in ("procrustes", "mean", "first")]
        found += [(Grouped("random"), count, False)] * first
    exact, fitted = Latent("exact"), Latent("fitted")
    found += [(exact, exact.within(loaded.model, half), False), (fitted, fitted.within(loaded.model, half), True)]
    found += [(exact, exact.within(loaded.model, half) // 3, False)]
    size = int(loaded.config.head_dim)
    for rope, fold in ((size, 2), (size // 2, 1), (size // 2, 2), (size // 2, 4)):
        turned = Latent(rope_dim=rope, fold=fold)
        found += [(turned, turned.within(loaded.model, half), False)]
    found += [(Pruned(by), layers * heads * 3 // 4, by == "importance") for by in ("importance", "random")]
    found += [(Pruned(by), layers * heads * 3 // 4, False) for by in ("ablation", "alone")]
    found += [(Pruned(by, uniform=False), layers * heads * 3 // 4, False) for by in ("importance", "normalised")]
    return found


def measured(loaded: Loaded, method: Method, value: int, judges: list[Judge], rows: Any) -> tuple[dict[str, Any], Any]:
    began = time.process_time()
    torch.manual_seed(0)
    made = method.make(loaded.model, value, rows)
    seconds = time.process_time() - began
    return {"conversion": method.title(value), "convert_s": seconds, **scores(made, judges)}, made


def scores(model: Any, judges: list[Judge]) -> dict[str, Any]:
    found = [judge.measure(model) for judge in judges]
    each = next(model.parameters()).element_size()
    return {
        "cache": found[0]["cache_bytes"] // (found[0]["tokens"] * each),
        "parameters": found[0]["parameters"],
        "bits_per_token": found[0]["bits_per_token"],
        "kl_bits": found[0]["kl_bits"],
        "passkeys": statistics.fmean(one["passkeys"] / one["keys"] for one in found),
        "passkeys_of": [one["passkeys"] for one in found],
        "keys": found[0]["keys"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder, hub name or smollm2; else the packaged model")
    parser.add_argument("--heal", type=int, default=0, help="tokens; none without it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="a part of the titles of those to run; the others keep what is held")
    parser.add_argument("--dry", action="store_true", help="print, and leave the committed results alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(given.model)
    name = given.model or "byte_llama"
    sizes = Sizes()
    judges = [Judge(loaded, Questions(loaded, seed=seed), sizes) for seed in range(given.seeds)]
    learnt = Questions(loaded, text=library_text(), where="the library", seed=100)
    rows = calibration_rows(learnt, 8192, sizes.length)
    plan = Healing(given.heal, rate=1e-3 if loaded.model.num_parameters() < 1e7 else 1e-4)
    todo = [one for one in conversions(loaded) if given.only is None or given.only in one[0].title(one[1])]
    if not todo:
        parser.error(f"--only {given.only!r}: it is in no title")
    lines: list[dict[str, Any]] = []
    if given.only is None:
        lines.append({"conversion": "none", **scores(loaded.model, judges)})
    if given.heal and given.only is None:
        control = heal(copy.deepcopy(loaded.model), learnt, plan)
        lines.append({"conversion": "none, healed", "healed": given.heal, **scores(control, judges)})
        del control
    for method, value, healing in todo:
        line, made = measured(loaded, method, value, judges, rows)
        lines.append(line)
        print({key: line[key] for key in ("conversion", *FIGURES)}, flush=True)
        if given.heal and healing:
            healed = heal(made, learnt, plan)
            title = f"{line['conversion']}, healed"
            lines.append({"conversion": title, "healed": given.heal, **scores(healed, judges)})
            print({key: lines[-1][key] for key in ("conversion", *FIGURES)}, flush=True)
    if given.dry:
        return
    path = RESULTS / "convert.json"
    held = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    again = {line["conversion"] for line in lines}
    kept = [r for r in held if r["model"] != name or (given.only is not None and r["conversion"] not in again)]
    save("convert", "cpu", kept + [{"model": name, **line} for line in lines])


if __name__ == "__main__":
    main()
