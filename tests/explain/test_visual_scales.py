"""Visual heads over models: scores and correlations against loops and scipy, the study's figures and verdict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.explain.detectors import rank_correlation, scale_correlations, visual_over_scales
from manyheads.explain.studies import create_study, run_study, visual_scale
from manyheads.explain.studies.tiny import Look
from manyheads.hosts.taps import record
from manyheads.tasks.draw import generator

SEED = generator("test-scales")


def llama(width: int) -> Any:
    torch.manual_seed(width)
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=width, intermediate_size=16, num_hidden_layers=2,
                                        num_attention_heads=2, initializer_range=0.6)).eval()  # fmt: skip


@torch.no_grad()
def test_models_from_small_to_large_against_loops() -> None:
    ids = torch.randint(20, (1, 8), generator=SEED)
    models = {"large": (llama(32), ids), "small": (llama(8), ids), "middle": (llama(16), ids)}
    found = visual_over_scales(models, image_span=(1, 5))
    assert [own.name for own in found] == ["small", "middle", "large"]
    for own in found:
        model = models[own.name][0]
        assert own.parameters == sum(p.numel() for p in model.parameters())
        assert own.chance == 0.5
        with record(model) as calls:
            model(ids)
        above = []
        for layer, call in enumerate(calls):
            for head in range(2):
                mass = sum(float(call.weights()[0, head, i, 1:5].sum()) for i in range(5, 8)) / 3
                assert abs(float(own.mass[layer, head]) - mass) < 1e-5
                above.append(mass > 0.5)
        assert own.share == sum(above) / 4
        assert own.layers.shape == (2,)
    rows = [own.figures for own in found]
    expected = spearmanr([row["parameters"] for row in rows], [row["mass"] for row in rows]).statistic
    assert abs(scale_correlations(found)["mass"] - expected) < 1e-9
    with pytest.raises(ValueError, match="no models"):
        visual_over_scales({})


def test_rank_correlation_is_scipys() -> None:
    for _ in range(5):
        x, y = (torch.randint(6, (9,), generator=SEED).tolist() for _ in range(2))
        assert abs(rank_correlation(x, y) - spearmanr(x, y).statistic) < 1e-9
    assert rank_correlation([1, 2, 3], [5, 5, 5]) == 0
    with pytest.raises(ValueError, match="two or more"):
        rank_correlation([1], [1])


def test_pictures_and_figures_by_hand() -> None:
    tokens, answers = visual_scale.draw_pictures(20, 4, 3, SEED)
    for row, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        assert row[4] == 3
        assert row[row[5] - 4] == answer
    weights = torch.zeros(1, 2, 3, 3)
    weights[0, 0, -1] = torch.tensor([0.5, 0.5, 0.0])
    weights[0, 1, -1] = torch.tensor([0.2, 0.0, 0.8])
    found = visual_scale.visual_figures([Look(weights, weights, weights)], 2)
    assert abs(found["mass"] - 0.6) < 1e-6
    assert found["share"] == 0.5
    assert abs(found["concentration"] - 0.5) < 1e-6


@pytest.mark.parametrize(("slope", "seen"), [(1.0, True), (-1.0, False)])
def test_verdict_over_sizes(slope: float, seen: bool) -> None:
    study = create_study("visual-scale")
    cells = [{"seed": s, **p, "concentration": slope * p["width"], "accuracy": p["width"] / 50}
             for s in range(3) for p in study.points()]  # fmt: skip
    assert study.verdict(cells).seen is seen
    assert study.verdict(cells[:2]).seen is None


def test_sizes_end_to_end(tmp_path: Any) -> None:
    results = run_study("visual-scale", tmp_path, seeds=1, settings={"widths": (8, 16), "steps": 2, "batch": 4})
    assert [cell["error"] for cell in results["cells"]] == [None] * 2
