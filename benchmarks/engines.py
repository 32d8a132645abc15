"""Converted checkpoints in a serving engine that knows nothing of us: CTranslate2, with its own converter, on the CPU.

    pip install ctranslate2==4.8.5 && python benchmarks/engines.py

The packaged model, as a Mistral (`as_mistral`: the same weights, since this engine takes the heads of a Llama to have
hidden_size / heads features), is converted by the command line; each folder goes through CTranslate2's converter of
transformers' checkpoints, and both are asked for the same: log-probabilities of a prompt's tokens, and 48 tokens of
greedy text after it. Every difference is in the result; beyond rounding, the exit status is 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import save
from manyheads.convert import as_mistral
from manyheads.hosts.loading import load_model

MEASURES = ("src/manyheads/convert",)
SMALL = ("--windows", "1", "--keys", "1", "--length", "128", "--calibrate", "512")
CONVERSIONS = {
    "gqa 4 to 2, mean": ("--to", "gqa", "--kv-heads", "2", "--align", "mean"),
    "gqa 4 to 1, procrustes": ("--to", "gqa", "--kv-heads", "1"),
    "24 of 32 heads": ("--to", "prune", "--heads", "24"),
    "16 of 32 heads": ("--to", "prune", "--heads", "16"),
}
PROMPTS = ("def read(path):\n    ", "import os\n\n\nclass ", "for key, value in ", '    """Return ')
NEW, LARGEST = 48, 1e-3


def converted(options: tuple[str, ...], folder: Path) -> Path:
    command = [sys.executable, "-W", "ignore", "-m", "manyheads", "convert", *options, *SMALL, "--out", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def engine(folder: Path) -> Any:
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter

    where = folder.with_name(f"{folder.name}-ct2")
    TransformersConverter(str(folder)).convert(str(where))
    # A tokenizer of bytes has no tokens that begin and end a text, and the engine wants one for each.
    held, first = (
        json.loads((where / "config.json").read_text()),
        json.loads((where / "vocabulary.json").read_text())[0],
    )
    (where / "config.json").write_text(json.dumps({k: first if v is None else v for k, v in held.items()}))
    return Generator(str(where), device="cpu", compute_type="float32", intra_threads=1)


def compared(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, words = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    served, gaps, same = engine(folder), [], 0
    for prompt in PROMPTS:
        ids = words.encode(prompt, add_special_tokens=False)
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            text = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        tokens = words.convert_ids_to_tokens(ids)
        theirs = torch.tensor(np.array(served.forward_batch([tokens], return_log_probs=True)))[0]
        gaps.append(float((ours - theirs).abs().max()))
        told = served.generate_batch(
            [tokens], max_length=NEW, sampling_topk=1, include_prompt_in_result=False, end_token=[],
        )  # fmt: skip
        same += told[0].sequences_ids[0] == text[0, len(ids) :].tolist()
    return {
        "class": type(model).__name__,
        "largest_difference_of_log_probability": max(gaps),
        "greedy_texts_equal": same,
        "greedy_texts": len(PROMPTS),
    }


def main() -> int:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original"
        loaded = load_model()
        as_mistral(loaded.model).save_pretrained(original)
        assert loaded.where is not None
        for file in Path(loaded.where).glob("tokenizer*"):
            (original / file.name).write_bytes(file.read_bytes())
        for name, options in {"none": None, **CONVERSIONS}.items():
            place = Path(folder) / name.replace(" ", "-")
            place = original if options is None else converted((str(original), *options), place)
            rows.append({"engine": f"CTranslate2 {version('ctranslate2')}", "conversion": name, **compared(place)})
    save("engines", "cpu", rows)
    equal = [
        row["largest_difference_of_log_probability"] < LARGEST and row["greedy_texts_equal"] == len(PROMPTS)
        for row in rows
    ]
    return 0 if all(equal) else 1


if __name__ == "__main__":
    raise SystemExit(main())
