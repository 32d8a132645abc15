"""What is kept is what kvpress keeps: its positions on a tiny model, stored by `benchmarks/kvpress.py --fixture`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formula_llama import PROMPT, SETTINGS, prompt, weights
from recorder import held
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads import shrink

STORED = json.loads((Path(__file__).parent / "kvpress_kept.json").read_text())


def _name(case: dict[str, Any]) -> str:
    return "-".join(str(part) for part in (case["policy"], *case["settings"].values(), case["compression_ratio"]))


@pytest.mark.parametrize("case", STORED["cases"], ids=_name)
def test_kept_positions(case: dict[str, Any]) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SETTINGS)).double().eval()
    model.load_state_dict(weights({name: tuple(own.shape) for name, own in model.named_parameters()}))
    policy = getattr(shrink, case["policy"])
    cache = policy(compression_ratio=case["compression_ratio"], when="prefill", **case["settings"]).make_cache(model)
    with torch.no_grad():
        model(inputs_embeds=prompt(), past_key_values=cache)
    kept = [[own for _, own in sorted(held(layer).items())] for layer in cache.layers]
    assert kept == case["kept"]
    assert {len(own) for layer in kept for own in layer} == {int(PROMPT * (1 - case["compression_ratio"]))}


def test_whose_positions_they_are() -> None:
    assert STORED["kvpress"] == "0.5.5"
    assert {case["policy"] for case in STORED["cases"]} == {"SnapKV", "StreamingLLM", "KeyNorm"}
