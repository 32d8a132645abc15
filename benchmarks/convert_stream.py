"""Converting a checkpoint file by file, each in a fresh process: peak memory, and time beside loading and saving it.

    python benchmarks/convert_stream.py              # a Llama of half a GB in bfloat16, in files of 100 MB

`overhead` is a process that has imported the same and converts a model of two layers and a few kilobytes. Targets: at
most three times as long as loading and saving, and a peak of the largest file and 2 GB at most; `met` says whether.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import save

MEASURES = ("src/manyheads/convert/streamed.py", "src/manyheads/convert/saving.py")
ROUNDS = 1
SIZES = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 5632}
CHILD = """
import json, resource, shutil, sys, time
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from manyheads.convert.streamed import Cutting, Pooling, stream
what, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
began = time.perf_counter()
if what == "load and save":
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(out, max_shard_size="100MB")
else:
    config = json.loads((source / "config.json").read_text())
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    scores = [[float(h) for h in range(heads)]] * layers
    stream(source, out, Pooling(2) if what == "gqa" else Cutting(layers * heads // 2, scores))
seconds = time.perf_counter() - began
shutil.rmtree(out)
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


def drawn(folder: Path, layers: int, **sizes: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **sizes}, num_hidden_layers=layers, vocab_size=1024, dtype="bfloat16")
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")
    return folder


def measured(what: str, source: Path, out: Path) -> tuple[float, float]:
    command = [sys.executable, "-W", "ignore", "-c", CHILD, what, str(source), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds, peak


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, small = drawn(Path(folder) / "source", 6), drawn(Path(folder) / "small", 2, hidden_size=64)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
        out, rows = Path(folder) / "out", []
        _, overhead = measured("gqa", small, out)
        runs: dict[str, list[tuple[float, float]]] = {"load and save": [], "gqa": [], "prune": []}
        for _ in range(ROUNDS):
            for what, found in runs.items():
                found.append(measured(what, source, out))
        whole = statistics.median(seconds for seconds, _ in runs["load and save"])
        for what, found in runs.items():
            rows.append(
                {
                    "conversion": what,
                    "model_bytes": size,
                    "largest_file_bytes": largest,
                    "peak_bytes": max(peak for _, peak in found),
                    "peak_over_overhead": (max(peak for _, peak in found) - overhead) / largest,
                    "overhead_bytes": overhead,
                    "time_ratio_to_load_and_save": statistics.median(seconds for seconds, _ in found) / whole,
                    "time_target": 3.0,
                    "peak_target_bytes": largest + 2 * 2**30,
                }
            )
    for row in rows[1:]:
        met = row["time_ratio_to_load_and_save"] <= row["time_target"] and row["peak_bytes"] <= row["peak_target_bytes"]
        row["met"] = met
    save("convert_stream", "cpu", rows)


if __name__ == "__main__":
    main()
