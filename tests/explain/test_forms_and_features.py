"""Random features against loops, and systems in one form against mechanisms of this package; verdicts both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from manyheads import create_attention
from manyheads.explain.studies import common_form, create_study, random_features, run_study
from manyheads.tasks.draw import generator

SEED = generator("test-forms")


def test_attention_features_against_a_loop() -> None:
    query, keys = random_features.draw_sets(3, 4, 2, SEED)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(3, 4).double())
    weights = random_features.draw_weights(5, 2, True, SEED)
    found = random_features.attention_features(query, keys, weights)
    for b in range(3):
        for h in range(5):
            total = torch.zeros(2).double()
            for i in range(4):
                total += max(float(query[b] @ weights[h] @ keys[b, i]), 0.0) * keys[b, i] / 4
            torch.testing.assert_close(found[b, 2 * h : 2 * h + 2], total)
    shuffled = keys[:, [2, 0, 3, 1]]
    torch.testing.assert_close(random_features.attention_features(query, shuffled, weights), found)
    torch.testing.assert_close(random_features.target(query, shuffled), random_features.target(query, keys))
    flat = torch.randn(6, 10, generator=SEED).double()
    one, other = (random_features.flat_features(query, own, flat) for own in (keys, shuffled))
    assert float((one - other).abs().max()) > 0.01
    middle = random_features.draw_weights(4000, 2, True, SEED).mean(0)
    torch.testing.assert_close(middle, torch.eye(2).double(), atol=0.05, rtol=0)


def test_ridge_is_sklearns() -> None:
    from sklearn.linear_model import Ridge

    x, held = (torch.randn(n, 5, generator=SEED).double() for n in (20, 12))
    true = torch.randn(5, generator=SEED).double()
    y, right = x @ true + torch.randn(20, generator=SEED), held @ true + 1
    found = random_features.ridge_error(x, y, held, right, [0.3])
    size = float((x - x.mean(0)).square().sum(1).mean())
    wrong = torch.from_numpy(Ridge(0.3 * size).fit(x.numpy(), y.numpy()).predict(held.numpy())) - right
    assert abs(found - float((wrong.square() / right.var())[6:].mean())) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("form", [name for name in common_form.FORMS if name != "softmax"])
def test_recurrence_and_matrix_are_one(form: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixer = common_form.Mixer(form, 6, 4).double()
    u = torch.randn(2, 7, 6, generator=SEED).double()
    own = mixer.system(u)
    torch.testing.assert_close(own.kernel() @ own.value, own.recurrent())
    torch.testing.assert_close(mixer(u), mixer.out(mixer.weights(u) @ mixer.v(u)))
    assert float(mixer.weights(u).triu(1).abs().max()) == 0


@torch.no_grad()
def test_softmax_is_this_packages_and_linear_a_loop() -> None:
    x = torch.randn(1, 6, 8, generator=SEED)
    module: Any = create_attention("softmax", 8, 1, causal=True)
    weights = module(x, need_weights=True).weights[0, 0]
    torch.testing.assert_close(common_form.softmax_weights(module.q_proj(x), module.k_proj(x))[0], weights)
    mixer = common_form.Mixer("linear", 8, 4)
    q, k = (torch.nn.functional.elu(own(x))[0] + 1 for own in (mixer.q, mixer.k))
    found = mixer.weights(x)[0]
    for i in range(6):
        raw = [float(q[i] @ k[j]) for j in range(i + 1)]
        torch.testing.assert_close(found[i, : i + 1], torch.tensor([own / sum(raw) for own in raw]))


def test_recall_by_hand() -> None:
    tokens, right = common_form.draw_recall(20, 3, 5, SEED)
    for row, answers in zip(tokens.tolist(), right.tolist(), strict=True):
        told = {row[2 * i]: row[2 * i + 1] for i in range(3)}
        assert len(told) == 3
        assert [told[key] for key in row[6:]] == answers


@pytest.mark.parametrize(("biased", "seen"), [(0.1, True), (0.6, False)])
def test_verdict_of_features(biased: float, seen: bool) -> None:
    study, errors = create_study("random-features"), {"biased": biased, "centred": 0.5, "flat": 0.9}
    cells = [{"seed": s, **p, "unexplained": errors[p["features"]]} for s in range(3) for p in study.points()]
    assert study.verdict(cells).seen is seen
    assert study.verdict(cells[:2]).seen is None


@pytest.mark.parametrize(("form", "value", "seen"), [("exp", 0.6, True), ("exp", 0.1, False), ("rnn", 0.99, False)])
def test_verdict_of_forms(form: str, value: float, seen: bool) -> None:
    study = create_study("common-form")
    recall = {"softmax": 0.9, "linear": 0.4, "exp": 0.6, "softplus": 0.6, "s6": 0.5, "rnn": 0.3} | {form: value}
    cells = [{"seed": s, **p, "recall": recall[p["form"]]} for s in range(3) for p in study.points()]
    assert study.verdict(cells).seen is seen
    assert study.verdict(cells[:3]).seen is None


@pytest.mark.parametrize(("name", "settings"), [
    ("random-features", {"dim": 3, "count": 2, "heads": 3, "samples": (10, 20)}),
    ("common-form", {"steps": 2, "batch": 2, "dim": 8, "states": 4, "pairs": 2}),
])  # fmt: skip
def test_small_runs(name: str, settings: dict[str, Any], tmp_path: Any) -> None:
    results = run_study(name, tmp_path, seeds=1, settings=settings)
    assert {cell["status"] for cell in results["cells"]} == {"done"}
    assert all(cell.get("apart", 0.0) < 1e-4 for cell in results["cells"])
