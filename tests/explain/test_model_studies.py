"""Studies of trained models: their measures against loops and identities, verdicts on made-up cells both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from manyheads.explain.studies import create_study, massive_cost, retrieval_heads, run_study
from manyheads.explain.studies.models import hidden_keys, needle_recall
from manyheads.hosts.loading import load_model
from manyheads.tasks.draw import generator

SEED = generator("test-model-studies")


def made(name: str, key: str, figures: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Cells of three seeds with figures by the value of the column `key`."""
    points = create_study(name).points()
    return [{"seed": s, "mechanism": p["label"], **p, **figures[p[key]]} for s in range(3) for p in points]


def test_recall_of_hidden_keys_token_by_token() -> None:
    loaded = load_model()
    needles = hidden_keys(loaded, 160, 2, 0, "test")
    assert [len(own.ids) for own in needles] == [160, 160]
    assert needles[0].told[0][0] < needles[1].told[0][0]
    hits = []
    for own in needles:
        start, stop = own.asked[0]
        with torch.no_grad():
            hits += [int(loaded.model(own.ids[None, :i]).logits[0, -1].argmax()) == own.ids[i]
                     for i in range(start, stop)]  # fmt: skip
    assert needle_recall(loaded, needles) == sum(hits) / len(hits)
    other = hidden_keys(loaded, 160, 2, 0, "another purpose")
    assert not torch.equal(other[0].ids, needles[0].ids)


# -- retrieval heads masked --------------------------------------------------------------------------------------------


def test_the_best_heads_and_others() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.0, 0.2]])
    best, others = retrieval_heads.top_and_others(scores, 2, 0)
    assert best == [(0, 1), (1, 0)]
    assert len({*best, *others}) == 4
    drawn = [tuple(retrieval_heads.top_and_others(scores, 2, seed)[1]) for seed in range(20)]
    assert len(set(drawn)) > 3
    with pytest.raises(ValueError, match="too few others"):
        retrieval_heads.top_and_others(scores, 4, 0)


@pytest.mark.parametrize(("masked", "random", "seen"), [(0.2, 0.9, True), (0.9, 0.2, False), (1.0, 0.9, False)])
def test_verdict_of_masked_heads(masked: float, random: float, seen: bool) -> None:
    figures = {name: {"recall": value} for name, value in
               (("none", 1.0), ("retrieval", masked), ("random", random))}  # fmt: skip
    study = create_study("retrieval-heads")
    assert study.verdict(made(study.name, "masked", figures)).seen is seen
    assert study.verdict(made(study.name, "masked", figures)[:2]).seen is None


def test_masked_heads_end_to_end(tmp_path: Any) -> None:
    results = run_study("retrieval-heads", tmp_path, seeds=1, settings={"length": 128, "count": 2})
    assert [cell["status"] for cell in results["cells"]] == ["done"] * 3
    assert results["cells"][0]["recall"] == 1
    assert (tmp_path / "study.html").exists()


# -- massive values ----------------------------------------------------------------------------------------------------


def test_channels_taken_out_against_a_loop() -> None:
    x, chosen = torch.randn(2, 2, 3, 4, generator=SEED), torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]]).bool()
    found = massive_cost.without(x, chosen)
    for b in range(2):
        for h in range(2):
            for i in range(3):
                kept = [float(x[b, h, i, d]) for d in range(4) if not chosen[h, d]]
                for d in range(4):
                    want = sum(kept) / len(kept) if chosen[h, d] else float(x[b, h, i, d])
                    assert abs(float(found[b, h, i, d]) - want) < 1e-6


def test_rounding_against_a_loop_and_channels_apart() -> None:
    x = torch.randn(1, 1, 5, 6, generator=SEED, dtype=torch.float64)
    x[..., 2] = 40
    apart = torch.tensor([[0, 0, 1, 0, 0, 0]]).bool()
    for own in (None, apart):
        found = massive_cost.rounded(x, 3, own)
        for i in range(5):
            row = [float(v) for v in x[0, 0, i]]
            step = max(abs(v) for d, v in enumerate(row) if own is None or d != 2) / 3
            for d, value in enumerate(row):
                want = value if own is not None and d == 2 else round(value / step) * step
                assert abs(float(found[0, 0, i, d]) - want) < 1e-9
    assert float((massive_cost.rounded(x, 3) - x).norm()) > float((massive_cost.rounded(x, 3, apart) - x).norm())
    torch.testing.assert_close(massive_cost.rounded(x, 24), x, atol=1e-4, rtol=0)


def test_greatest_and_other_channels() -> None:
    norms = torch.tensor([[1.0, 5, 2, 4], [9.0, 1, 2, 3]])
    best, other = massive_cost.greatest(norms, 2), massive_cost.others(norms, 2, 0)
    assert best.tolist() == [[False, True, False, True], [True, False, False, True]]
    assert other.tolist() == [[True, False, True, False], [False, True, True, False]]


@torch.no_grad()
def test_unchanged_queries_and_keys_change_nothing() -> None:
    loaded = load_model()
    ids = torch.randint(33, 127, (2, 24), generator=SEED)
    expected = loaded.model(ids).logits
    with massive_cost.queries_and_keys(loaded.model, lambda name, layer, x: x):
        torch.testing.assert_close(loaded.model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    with massive_cost.queries_and_keys(loaded.model, lambda name, layer, x: 0 * x if name == "key" else x):
        assert float((loaded.model(ids).logits - expected).abs().max()) > 0.1


@pytest.mark.parametrize(("taken", "apart", "seen"), [(0.1, 1.5, True), (0.9, 1.5, False), (0.1, 2.5, False)])
def test_verdict_of_massive_values(taken: float, apart: float, seen: bool) -> None:
    figures = {"none": (1, 1), "massive": (taken, 3), "others": (0.8, 1.1), "rounded": (1, 2), "apart": (1, apart)}
    cells = made("massive-cost", "change", {k: {"recall": r, "nats": n} for k, (r, n) in figures.items()})
    study = create_study("massive-cost")
    assert study.verdict(cells).seen is seen
    assert study.verdict(cells[:3]).seen is None


def test_massive_values_end_to_end(tmp_path: Any) -> None:
    results = run_study("massive-cost", tmp_path, seeds=1, settings={"length": 96, "count": 1})
    by_change = {cell["change"]: cell for cell in results["cells"]}
    assert by_change["massive"]["nats"] > by_change["others"]["nats"]
