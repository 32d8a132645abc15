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
from manyheads.shrink import Policy

STORED = json.loads((Path(__file__).parent / "kvpress_kept.json").read_text())


# What they keep is not the ratio's share of every head: whole chunks, or layers.
UNEVEN = ("ChunkKV", "SimLayerKV")


def _name(case: dict[str, Any]) -> str:
    parts = (own[0] if isinstance(own, list) else own for own in case["settings"].values())
    return "-".join(str(part) for part in (case["policy"], *parts, case["compression_ratio"])).replace(" ", "")


def _built(case: dict[str, Any]) -> Policy:
    given = {"compression_ratio": case["compression_ratio"], "when": "prefill", **case["settings"]}
    if "base" in given:
        name, own = given["base"]
        given["base"] = getattr(shrink, name)(**own)
    if case["policy"] == "SimLayerKV":
        del given["compression_ratio"]
    policy: Policy = getattr(shrink, case["policy"])(**given)
    return policy


@pytest.mark.parametrize("case", STORED["cases"], ids=_name)
def test_kept_positions(case: dict[str, Any]) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SETTINGS)).double().eval()
    model.load_state_dict(weights({name: tuple(own.shape) for name, own in model.named_parameters()}))
    cache = _built(case).make_cache(model)
    with torch.no_grad():
        model(inputs_embeds=prompt(), past_key_values=cache)
    kept = [[own for _, own in sorted(held(layer).items())] for layer in cache.layers]
    assert kept == case["kept"]
    lengths = {len(own) for layer in kept for own in layer}
    assert min(lengths) < PROMPT
    assert case["policy"] in UNEVEN or lengths == {int(PROMPT * (1 - case["compression_ratio"]))}


def test_whose_positions_they_are() -> None:
    assert STORED["kvpress"] == "0.5.5"
    assert {case["policy"] for case in STORED["cases"]} == {
        *("SnapKV", "StreamingLLM", "KeyNorm", "KeyDiff", "LagKV", "ChunkKV", "Finch", "CriticalKV", "QFilters"),
        *("Leverage", "CUR", "Compactor", "NonCausal", "SimLayerKV"),
    }
