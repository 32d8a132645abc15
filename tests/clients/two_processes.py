"""One of two processes: the gradients of half a batch, averaged, against those of the whole."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import models
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed


def main(out: Path, kind: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    set_seed(0)
    model = models.MODELS["causal-lm"][0](models.config("causal-lm", kind)).double()
    alone, ids = copy.deepcopy(model), torch.randint(3, models.VOCAB, (4, 8))
    spread = accelerator.prepare(model)
    own = ids[2 * accelerator.process_index :][:2]
    accelerator.backward(spread(input_ids=own, labels=own).loss)
    alone(input_ids=ids, labels=ids).loss.backward()
    pairs = zip(accelerator.unwrap_model(spread).parameters(), alone.parameters(), strict=True)
    worst = max(float((p.grad - q.grad).abs().max()) for p, q in pairs)
    if accelerator.is_main_process:
        out.write_text(json.dumps({"worst": worst}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
