"""Converting a checkpoint without healing, each in a fresh process: peak memory, and time beside loading and saving it.

    python benchmarks/convert_stream.py              # a Llama of half a GB in bfloat16, in files of 100 MB
    python benchmarks/convert_stream.py --dry        # prints, and leaves the committed results alone

File by file (`--stream`), and the mean of key/value heads of a whole model in memory, which is no streaming.

`overhead` is a process that has imported the same and converts a model of two layers and a few kilobytes. Targets: at
most three times as long as loading and saving, and a peak of the largest file and 2 GB at most; `met` says whether.
"""

from __future__ import annotations

import argparse
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
ROUNDS = 3
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
elif what == "gqa in memory":
    from manyheads.convert.grouped import grouped
    made = grouped(AutoModelForCausalLM.from_pretrained(source), 2, align="mean")
    made.save_pretrained(out, max_shard_size="100MB")
else:
    config = json.loads((source / "config.json").read_text())
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    scores = [[float(h) for h in range(heads)]] * layers
    stream(source, out, Pooling(2) if what.startswith("gqa") else Cutting(layers * heads // 2, scores))
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="print, and leave the committed results alone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, small = drawn(Path(folder) / "source", 6), drawn(Path(folder) / "small", 2, hidden_size=64)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
        out, rows = Path(folder) / "out", []
        _, overhead = measured("gqa by files", small, out)
        runs: dict[str, list[tuple[float, float]]] = {
            what: [] for what in ("load and save", "gqa by files", "prune by files", "gqa in memory")
        }
        for _ in range(ROUNDS):
            for what, found in runs.items():
                found.append(measured(what, source, out))
        whole = statistics.median(seconds for seconds, _ in runs["load and save"])
        for what, found in runs.items():
            rows.append(
                {
                    "model": "llama, drawn",
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
        in_time = row["time_ratio_to_load_and_save"] <= row["time_target"]
        # Memory is a claim of what goes by files.
        row["met"] = in_time and (row["peak_bytes"] <= row["peak_target_bytes"] or "memory" in row["conversion"])
    if given.dry:
        print(*rows, sep="\n")
        return
    save("convert_stream", "cpu", rows)


if __name__ == "__main__":
    main()
