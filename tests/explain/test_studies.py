"""Studies: their data and figures against loops, every one of them end to end, and runs that stop and go on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from manyheads.explain.studies import (
    Study,
    Verdict,
    create_study,
    list_studies,
    memorisation,
    rank_heads,
    run_study,
    scan_and_snap,
    sink_emergence,
)
from manyheads.explain.studies import bigram_backcopy as backcopy
from manyheads.explain.studies import linear_regression as regression
from manyheads.explain.studies.command import study as command
from manyheads.explain.studies.study import (
    always,
    average,
    both_ways,
    checkpoints,
    decided,
    paired,
    seeded,
    study_class,
)
from manyheads.explain.studies.tiny import (
    KeyBiasAttention,
    Look,
    ReluAttention,
    SigmoidAttention,
    TinyTransformer,
    shares,
)
from manyheads.tasks.draw import generator

# Small enough for a second or two each. Whether the claim shows at this size is said beside it: True, or None where
# it does not always.
SMALL: dict[str, tuple[dict[str, Any], bool | None]] = {
    "bigram-backcopy": ({"steps": 6, "vocab": 8, "length": 10, "dim": 8, "batch": 4}, None),
    "linear-regression": ({"steps": 10, "heads": (1, 2), "batch": 16}, None),
    "memorisation": ({"steps": 10, "examples": 96, "dim": 16}, None),
    "rank-heads": (
        {"steps": 60, "dim": 8, "ranks": (8, 1), "count": 4, "depths": (2,), "learning_rate": 0.1, "batch": 32},
        True,
    ),
    "scan-and-snap": ({"ratios": (1, 10), "steps": 100}, True),
    "sink-emergence": ({"steps": 4, "length": 8, "dim": 8, "batch": 2}, None),
}
NAMES = list(SMALL)
SEED = generator("test-studies")


@pytest.fixture(autouse=True)
def _no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without the drawing library, which takes a second to put together; the report of compare has it tested."""
    monkeypatch.setattr("manyheads.runs.page._libraries", lambda: "")


# -- data --------------------------------------------------------------------------------------------------------------


def test_bigrams_and_copies() -> None:
    bigrams = backcopy.draw_bigrams(12, 3, generator("bigrams"))
    table = bigrams.table
    torch.testing.assert_close(table[1:].sum(1), torch.ones(11))
    assert float(table[0].sum()) == 0
    assert float(table[:, 0].sum()) == 0
    assert int(bigrams.triggers.sum()) == 3
    assert not bigrams.triggers[0]
    assert float(bigrams.first[bigrams.triggers].sum()) == 0
    tokens = backcopy.draw_sequences(bigrams, 600, 12, generator("sequences"))
    counts, triggers = [[0] * 12 for _ in range(12)], bigrams.triggers.tolist()
    for row in tokens.tolist():
        assert row[0] == 0
        assert 0 not in row[1:]
        for i in range(2, len(row)):
            if triggers[row[i - 1]]:
                assert row[i] == row[i - 2]
            else:
                counts[row[i - 1]][row[i]] += 1
    seen = torch.tensor(counts, dtype=torch.float32)
    often = seen.sum(1) > 250
    assert int(often.sum()) >= 3
    torch.testing.assert_close((seen / seen.sum(1, keepdim=True))[often], table[often], atol=0.1, rtol=0)


def test_triggers_are_the_most_frequent_tokens() -> None:
    bigrams = backcopy.draw_bigrams(9, 2, generator("frequent"))
    often = [0.0] + [1 / 8] * 8
    for _ in range(300):
        often = [sum(often[i] * float(bigrams.table[i, j]) for i in range(9)) for j in range(9)]
    best = sorted(range(9), key=lambda token: -often[token])[:2]
    assert sorted(best) == bigrams.triggers.nonzero()[:, 0].tolist()


def test_points_on_the_sphere_and_the_nearest() -> None:
    query, points = rank_heads.draw_sphere(3000, 4, 5, generator("sphere"))
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(3000, 4))
    torch.testing.assert_close(query.mean(0), torch.zeros(5), atol=0.04, rtol=0)
    torch.testing.assert_close(torch.einsum("bd,be->de", query, query) / 3000, torch.eye(5) / 5, atol=0.03, rtol=0)
    found = rank_heads.nearest(query, points)
    for b in range(20):
        distances = [math.dist(query[b].tolist(), points[b, i].tolist()) for i in range(4)]
        torch.testing.assert_close(found[b], points[b, distances.index(min(distances))])


def test_prompts_are_linear_with_noise() -> None:
    x, y, beta = regression.draw_prompts(4000, 6, 3, 0.2, generator("prompts"))
    assert x.shape == (4000, 7, 3)
    left = [y[b, i].item() - sum(x[b, i, k].item() * beta[b, k].item() for k in range(3))
            for b in range(500) for i in range(7)]  # fmt: skip
    assert abs(sum(left) / len(left)) < 0.03
    assert abs(sum(one**2 for one in left) / len(left) - 0.2) < 0.02
    assert abs(float(beta.square().mean()) - 1 / 3) < 0.02


def test_token_chances_by_hand() -> None:
    found = scan_and_snap.token_chances(1, 2, 2)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.1, 1.0, 0, 0], [1.0, 0, 0, 0.1, 1.0]]) / 2.1)
    tokens, classes = scan_and_snap.draw_contexts(found, 3000, 20, generator("contexts"))
    for own in range(2):
        seen = torch.bincount(tokens[classes == own].flatten(), minlength=5).double()
        torch.testing.assert_close((seen / seen.sum()).float(), found[own], atol=0.02, rtol=0)


def test_examples_share_a_context() -> None:
    queries, context, labels = memorisation.draw_examples(2000, 3, 4, 5, generator("examples"))
    assert (queries.shape, context.shape) == ((2000, 4), (3, 4))
    torch.testing.assert_close(torch.bincount(labels, minlength=5) / 2000, torch.full((5,), 0.2), atol=0.04, rtol=0)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_sink_figures_against_loops() -> None:
    weights = torch.rand(2, 1, 5, 5, generator=SEED).tril()
    looks = [Look(weights * scale, torch.randn(2, 1, 5, 3, generator=SEED), torch.randn(2, 5, 4, generator=SEED))
             for scale in (1.0, 3.0)]  # fmt: skip
    looks.append(Look(weights.flip(-1).tril(), looks[0].values * 2, looks[0].residual))
    triggers = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 0, 0, 1]]).bool()
    expected = []
    for look in looks:
        dormant, active = [], []
        for b in range(2):
            for i in range(2, 5):
                row = look.weights[b, 0, i].double().tolist()
                (active if bool(triggers[b, i]) else dormant).append(row[0] / sum(row))
        norms = [[math.hypot(*look.values[b, 0, i].tolist()) for i in range(5)] for b in range(2)]
        sizes = [[math.hypot(*look.residual[b, i].tolist()) for i in range(5)] for b in range(2)]
        expected.append((sum(dormant) / len(dormant), sum(active) / len(active), _first_over_rest(norms),
                         _first_over_rest(sizes)))  # fmt: skip
    best = max(expected)
    found = backcopy.sink_figures(looks, triggers)
    torch.testing.assert_close(
        torch.tensor([found[key] for key in ("dormant_sink", "active_sink", "drain", "peak")]),
        torch.tensor([*best[:3], max(own[3] for own in expected)]),
    )


def _first_over_rest(rows: list[list[float]]) -> float:
    first = sum(row[0] for row in rows) / len(rows)
    return first / (sum(sum(row[1:]) for row in rows) / sum(len(row) - 1 for row in rows))


def test_shares_of_rows() -> None:
    found = shares(torch.tensor([[2.0, 6.0], [0.0, 0.0], [-1.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.75], [0.0, 0.0], [0.5, 0.5]]))


def test_sink_metric_against_loops() -> None:
    weights = [torch.rand(2, 3, 4, 4, generator=SEED).tril() for _ in range(2)]
    sinks = []
    for own in weights:
        for b in range(2):
            for h in range(3):
                for k in range(4):
                    mean = sum(float(own[b, h, i, k]) for i in range(k, 4)) / (4 - k)
                    assert abs(float(sink_emergence.received(own)[b, h, k]) - mean) < 1e-6
                    if k == 0:
                        sinks.append(mean > 0.5)
    assert 0 < sum(sinks) < len(sinks)
    assert abs(sink_emergence.sink_share(weights, 0.5) - sum(sinks) / len(sinks)) < 1e-6


@torch.no_grad()
def test_low_rank_heads_against_loops() -> None:
    model = rank_heads.LowRankHeads(3, 2, 2).double()
    query, points = torch.randn(3, generator=SEED).double(), torch.randn(4, 3, generator=SEED).double()
    expected = torch.zeros(3, dtype=torch.float64)
    for h in range(2):
        scores = [float((points[i] @ model.k[h]) @ (query @ model.q[h])) for i in range(4)]
        total = sum(math.exp(score) for score in scores)
        for i in range(4):
            expected += math.exp(scores[i]) / total * (model.o[h] @ (model.v[h].T @ points[i]))
    torch.testing.assert_close(model(query[None], points[None])[0], expected)


@torch.no_grad()
def test_one_full_rank_head_represents_the_nearest() -> None:
    model = rank_heads.LowRankHeads(5, 5, 1)
    with torch.no_grad():
        for own in (model.q, model.k, model.v, model.o):
            own.copy_(torch.eye(5)[None])
        model.q *= 300
    found = rank_heads.evaluate(model, *rank_heads.draw_sphere(500, 4, 5, generator("represents")))
    assert found["squared_error"] < 0.02
    assert found["hits"] > 0.99
    assert abs(rank_heads.evaluate(_zero(model), *rank_heads.draw_sphere(9, 4, 5, SEED))["squared_error"] - 1) < 1e-5


def _zero(model: Any) -> Any:
    with torch.no_grad():
        model.o.zero_()
    return model


@torch.no_grad()
def test_regression_heads_and_references_against_loops() -> None:
    x, y, _ = regression.draw_prompts(4, 6, 2, 0.1, generator("heads"))
    model = regression.RegressionHeads(2, 3)
    found, noise = model(x, y), 0.1
    for b in range(4):
        columns = [[*x[b, i].tolist(), float(y[b, i])] for i in range(6)]
        query = [*x[b, 6].tolist(), 0.0]
        total = 0.0
        for h in range(3):
            scores = [sum(c[e] * float(model.kq[h, e, f]) * query[f] for e in range(3) for f in range(3))
                      for c in columns]  # fmt: skip
            weights = [math.exp(score) for score in scores]
            total += sum(w / sum(weights) * sum(float(model.ov[h, e]) * c[e] for e in range(3))
                         for w, c in zip(weights, columns, strict=True))  # fmt: skip
        assert abs(float(found[b]) - total) < 1e-5
        middle = [sum(c[k] for c in columns) / 6 for k in range(2)]
        for debias in (True, False):
            step = sum(c[2] * (c[k] - debias * middle[k]) * query[k] for c in columns for k in range(2)) / 6
            assert abs(float(regression.gradient_step(x, y, debias)[b]) - step) < 1e-5
        gram = [[sum(c[i] * c[j] for c in columns) + (noise * 2 if i == j else 0) for j in range(2)] for i in range(2)]
        right = [sum(c[i] * c[2] for c in columns) for i in range(2)]
        minus = gram[0][0] * gram[1][1] - gram[0][1] * gram[1][0]
        solved = [(gram[1][1] * right[0] - gram[0][1] * right[1]) / minus,
                  (gram[0][0] * right[1] - gram[1][0] * right[0]) / minus]  # fmt: skip
        assert abs(float(regression.bayes(x, y, noise)[b]) - solved[0] * query[0] - solved[1] * query[1]) < 1e-5


@torch.no_grad()
def test_two_opposite_heads_are_a_debiased_step() -> None:
    x, y, _ = regression.draw_prompts(50, 20, 3, 0.1, generator("opposite"))
    model, size = regression.RegressionHeads(3, 2), 0.01
    with torch.no_grad():
        model.kq.zero_()
        model.ov.zero_()
        for head, sign in enumerate((1, -1)):
            model.kq[head, range(3), range(3)] = sign * size
            model.ov[head, 3] = sign / (2 * size)
    torch.testing.assert_close(model(x, y), regression.gradient_step(x, y, True), atol=3e-3, rtol=3e-3)
    found = regression.pattern_figures(model.kq, model.ov)
    torch.testing.assert_close(torch.tensor(list(found.values())), torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_pattern_figures_of_a_head_by_hand() -> None:
    kq = torch.tensor([[[3.0, 0, 9], [0, 1, 9], [2, 0, 9]]])
    found = regression.pattern_figures(kq, torch.tensor([[1.0, 0.0, 2.0]]))
    # The mean of the diagonal is 2, so 2 * 4 of 9 + 1 + 4 lie in w I; the last column meets the query's zero.
    assert abs(found["diagonal"] - 8 / 14) < 1e-6
    assert abs(found["last_entry"] - 4 / 5) < 1e-6
    assert found["zero_sum"] == 1


def test_scan_figures_against_loops() -> None:
    chances, z = scan_and_snap.token_chances(2, 4, 2), torch.randn(10, generator=SEED)
    commons, shares_, entropies, orders = [], [], [], []
    for own in range(2):
        c = [float(chances[own, i]) * math.exp(float(z[i])) for i in range(10)]
        c = [one / sum(c) for one in c]
        span = range(2 + 4 * own, 6 + 4 * own)
        commons.append(c[0] + c[1])
        shares_.append(sum(c[i] for i in span[2:]) / sum(c[i] for i in span))
        entropies.append(-sum(one * math.log(one) for one in c if one))
        ranks = [sorted(span, key=lambda i: float(z[i])).index(i) for i in span]
        orders.append(1 - 6 * sum((rank - place) ** 2 for place, rank in enumerate(ranks)) / (4 * 15))
    found = scan_and_snap.scan_figures(chances, z, 2)
    expected = [sum(values) / 2 for values in (commons, shares_, entropies, orders)]
    torch.testing.assert_close(
        torch.tensor([found[key] for key in ("common", "frequent", "entropy", "order")]), torch.tensor(expected)
    )
    assert abs(scan_and_snap.slowing([{"spread": s} for s in (0, 2, 4, 4, 4, 4, 4, 4, 4, 4, 5)]) - 0.1) < 1e-9


@torch.no_grad()
def test_one_layer_against_a_loop() -> None:
    model = scan_and_snap.OneLayer(6, 2)
    tokens = torch.tensor([[0, 3, 3, 5]])
    total = sum(math.exp(float(model.z[t])) for t in (0, 3, 3, 5))
    mixed = [sum(math.exp(float(model.z[t])) / total for t in (0, 3, 3, 5) if t == own) for own in range(6)]
    norm = math.hypot(*mixed)
    expected = [sum(float(model.y[n, i]) * mixed[i] / norm for i in range(6)) for n in range(2)]
    torch.testing.assert_close(model(tokens)[0].detach(), torch.tensor(expected))


@torch.no_grad()
def test_shared_context_heads_and_their_rank() -> None:
    queries, context, _ = memorisation.draw_examples(200, 4, 8, 3, generator("rank"))
    for heads in (1, 2, 5):
        model = memorisation.SharedContextHeads(8, heads, 4, 3)
        weights = model.weights(queries, context)
        assert memorisation.feature_rank(weights) == heads * 3 + 1
    t, h, i = 7, 4, 2
    scores = [float((queries[t] @ model.q[h]) @ (context[n] @ model.k[h])) / 8**0.5 for n in range(4)]
    expected = math.exp(scores[i]) / sum(math.exp(score) for score in scores)
    assert abs(float(weights[h, t, i]) - expected) < 1e-5
    mixed = [sum(float(weights[own, t, n]) * float(context[n] @ model.v[own]) for n in range(4)) for own in range(5)]
    torch.testing.assert_close(model(queries, context)[t], model.out(torch.tensor(mixed)))


def test_memorised_linear_share_and_rises() -> None:
    assert memorisation.memorised(0.1, 50, 10) == 0
    assert memorisation.memorised(1.0, 50, 10) == 50
    assert abs(memorisation.linear_share([1, 2, 4], [3, 5, 9]) - 1) < 1e-9
    assert memorisation.linear_share([1, 2, 4], [9, 5, 3]) == 0
    assert memorisation.rises([1, 2, 3], 0)
    assert not memorisation.rises([1, 3, 2.9], 0)
    assert memorisation.rises([1, 3, 2.9], 0.05)


@torch.no_grad()
def test_a_key_bias_takes_its_share() -> None:
    module = KeyBiasAttention(6, 2, causal=True)
    module.extra.copy_(torch.randn(2, 3, 1, generator=SEED))
    x = torch.randn(1, 4, 6, generator=SEED)
    found = module(x, need_weights=True)
    weights, (q, k) = found.weights, (module.q_proj(x)[0], module.k_proj(x)[0])
    for h in range(2):
        span = slice(3 * h, 3 * h + 3)
        for i in range(4):
            scores = [math.exp(float(q[i, span] @ k[j, span]) / 3**0.5) for j in range(i + 1)]
            spare = math.exp(float(q[i, span] @ module.extra[h, :, 0]) / 3**0.5)
            for j in range(4):
                assert abs(float(weights[0, h, i, j]) - (scores[j] / (sum(scores) + spare) if j <= i else 0)) < 1e-5
    torch.testing.assert_close(module(x).output, found.output)


@torch.no_grad()
def test_stacked_layers_by_hand() -> None:
    model = rank_heads.Stacked(3, 2, 2, 2)
    query, points = rank_heads.draw_sphere(5, 4, 3, generator("stacked"))
    first, second = model.layers
    torch.testing.assert_close(model(query, points), second(query + first(query, points), points))
    one = rank_heads.Stacked(3, 2, 2, 1)
    torch.testing.assert_close(one(query, points), one.layers[0](query, points))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "rule"), [(ReluAttention, lambda s: max(s, 0.0)),
                                            (SigmoidAttention, lambda s: 1 / (1 + math.exp(-s)))])  # fmt: skip
def test_attention_without_softmax(kind: Any, rule: Any) -> None:
    module = kind(6, 2, causal=True)
    x = torch.randn(1, 4, 6, generator=SEED)
    weights = module(x, need_weights=True).weights
    q, k = module.q_proj(x)[0], module.k_proj(x)[0]
    for h in range(2):
        for i in range(4):
            for j in range(4):
                score = float(q[i, 3 * h : 3 * h + 3] @ k[j, 3 * h : 3 * h + 3]) / 3**0.5
                assert abs(float(weights[0, h, i, j]) - (rule(score) if j <= i else 0.0)) < 1e-5


@pytest.mark.parametrize("kind", ["softmax", "relu", "sigmoid"])
def test_looking_changes_nothing_and_the_future_is_unseen(kind: str) -> None:
    model = TinyTransformer(7, 6, kind=kind, dim=8, heads=2, layers=2)
    tokens, looks = torch.tensor([[1, 2, 3, 4, 5, 6]]), []
    torch.testing.assert_close(model(tokens, looks), model(tokens))
    assert [tuple(own.weights.shape) for own in looks] == [(1, 2, 6, 6)] * 2
    assert tuple(looks[0].values.shape) == (1, 2, 6, 4)
    torch.testing.assert_close(model.head(model.norm(looks[1].residual)), model(tokens))
    other = tokens.clone()
    other[0, 4:] = 0
    torch.testing.assert_close(model(other)[:, :4], model(tokens)[:, :4])


# -- runs --------------------------------------------------------------------------------------------------------------


def test_every_study_is_listed_with_its_facts() -> None:
    assert set(NAMES) < set(list_studies())
    for name in list_studies():
        cls = study_class(name)
        assert cls.reference.removeprefix("arXiv:") in (cls.__doc__ or "")
        assert cls.title
        assert len(cls.claim) > 60
        assert len(cls.simplified) > 60
        labels = [point["label"] for point in create_study(name).points()]
        assert len(set(labels)) == len(labels) > 1


@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_end_to_end(name: str, tmp_path: Path) -> None:
    settings, seen = SMALL[name]
    results = run_study(name, tmp_path, seeds=1, settings=settings)
    assert [cell["error"] for cell in results["cells"]] == [None] * len(create_study(name, **settings).points())
    held = json.loads((tmp_path / "study.json").read_text())
    assert held["verdict"]["seen"] is results["verdict"]["seen"]
    assert results["verdict"]["seen"] is None, "one seed decides nothing"
    thrice = [cell | {"seed": seed} for cell in results["cells"] for seed in range(3)]
    verdict = decided(create_study(name, **settings), thrice)
    assert verdict.seen in (True, False)
    assert seen is None or verdict.seen is seen
    assert held["study"]["claim"] == study_class(name).claim
    assert {row["condition"] for row in held["summary"]} == {cell["mechanism"] for cell in results["cells"]}
    page = (tmp_path / "study.html").read_text()
    specs = json.loads(page.split('id="charts-data">')[1].split("</script>")[0])["specs"]
    assert len(specs) >= 2
    assert all(f'data-chart="{key}"' in page for key in specs)
    assert "http-equiv" in page
    study = create_study(name, **settings)
    again = study.measure(study.points()[0], 0)
    assert {key: results["cells"][0][key] for key in again} == again


class Breaks:
    """Interrupts `measure` at the given call."""

    def __init__(self, cls: type[Study], at: int, error: BaseException) -> None:
        self.cls, self.calls, self.at, self.error = cls, 0, at, error
        self.own = cls.measure

    def __call__(self, study: Study, point: Mapping[str, Any], seed: int) -> dict[str, Any]:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.own(study, point, seed)


def breaking(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> Breaks:
    cls = scan_and_snap.ScanAndSnap
    breaks = Breaks(cls, at, error)
    monkeypatch.setattr(cls, "measure", lambda self, point, seed: breaks(self, point, seed))
    return breaks


QUICK = {"steps": 10, "ratios": (1, 2)}


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    breaks = breaking(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_study("scan-and-snap", tmp_path, seeds=2, settings=QUICK)
    told = capsys.readouterr().err
    assert "stopped with 2 of 4 cells" in told
    assert "left" in told
    assert len(list((tmp_path / "cells").glob("*.json"))) == 2
    assert not (tmp_path / "study.html").exists()
    results = run_study("scan-and-snap", tmp_path, seeds=2, settings=QUICK)
    assert breaks.calls == 5
    assert [cell["seed"] for cell in results["cells"]] == [0, 0, 1, 1]
    run_study("scan-and-snap", tmp_path, seeds=2, settings=QUICK)
    assert breaks.calls == 5
    run_study("scan-and-snap", tmp_path, seeds=1, settings=QUICK | {"steps": 11})
    assert breaks.calls == 7


def test_a_point_that_fails_is_a_row_and_is_tried_again(tmp_path: Path, monkeypatch: Any) -> None:
    breaks = breaking(monkeypatch, 1, ArithmeticError("diverged <here>"))
    results = run_study("scan-and-snap", tmp_path, seeds=1, settings=QUICK)
    assert [cell["status"] for cell in results["cells"]] == ["failed", "done"]
    assert results["verdict"]["seen"] is None
    page = (tmp_path / "study.html").read_text()
    assert "diverged &lt;here&gt;" in page
    results = run_study("scan-and-snap", tmp_path, seeds=1, settings=QUICK)
    assert breaks.calls == 3
    assert [cell["status"] for cell in results["cells"]] == ["done", "done"]


def test_figures_that_are_not_finite_are_failures(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(scan_and_snap.ScanAndSnap, "measure", lambda *_: {"common": float("nan")})
    results = run_study("scan-and-snap", tmp_path, seeds=1, settings=QUICK)
    assert "diverged: common" in results["cells"][0]["error"]
    assert results["verdict"]["lines"] == ("Nothing was measured.",)
    assert json.loads((tmp_path / "study.json").read_text())["verdict"]["seen"] is None


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'rank-heads'"):
        run_study("rank-head", tmp_path)
    with pytest.raises(ValueError, match=r"no setting 'step'; did you mean 'steps'"):
        create_study("rank-heads", step=3)
    for bad in ({"steps": 0}, {"steps": 2.5}, {"ranks": ()}, {"ranks": 4}, {"steps": True}, {"ranks": ("a",)}):
        with pytest.raises(ValueError, match="want"):
            create_study("rank-heads", **bad)
    with pytest.raises(ValueError, match="0 seeds; want 1 to 100"):
        run_study("rank-heads", tmp_path, seeds=0)
    (tmp_path / "experiment.json").write_text(json.dumps({"experiment": {"study": "memorisation"}}))
    with pytest.raises(ValueError, match=r"holds the study memorisation; rank-heads wants another folder"):
        run_study("rank-heads", tmp_path)


def test_the_command(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    cls = scan_and_snap.ScanAndSnap
    monkeypatch.setattr(cls, "points", lambda self: [{"label": f"ratio {own}", "ratio": own} for own in (1, 10)])
    command("scan-and-snap", tmp_path / "a", 1)
    told = capsys.readouterr().out
    assert "claim not decided" in told
    assert "ratio 10" in told
    assert str(tmp_path / "a" / "study.html") in told
    command("scan-and-snap", tmp_path / "a", 1, as_json=True)
    held = json.loads(capsys.readouterr().out)
    assert held["verdict"]["lines"][0].endswith("so far seen.")
    assert Path(held["files"]["results"]).exists()
    command(None)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list_studies()
    command(None, listed=True)
    told = capsys.readouterr().out
    assert " ".join(study_class("rank-heads").claim.split()) in " ".join(told.split())
    assert "arXiv:2407.16153, 3 seeds" in told
    command(None, as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert [own["name"] for own in facts] == list_studies()
    assert all(own["seeds"] >= 3 for own in facts)
    with pytest.raises(ValueError, match="unknown study"):
        command("nothing", tmp_path / "b")
    with pytest.raises(ValueError, match="no setting 'model'"):
        command("rank-heads", tmp_path / "b", model="smollm2")
    with pytest.raises(ValueError, match="--list names every study"):
        command("rank-heads", listed=True)
    assert not (tmp_path / "b").exists()


def test_shared_helpers() -> None:
    cells = [{"a": 1, "x": 2.0}, {"a": 1, "x": 4.0}, {"a": 2, "x": 9.0}, {"a": 1}]
    assert average(cells, "x", a=1) == 3
    assert average(cells, "x", a=3) is None
    assert {0, 100} <= checkpoints(100, 10)
    assert max(checkpoints(100, 10)) == 100
    before = torch.get_rng_state()
    with seeded("a", 1):
        first = torch.rand(3)
    torch.testing.assert_close(torch.get_rng_state(), before)
    with seeded("a", 1):
        torch.testing.assert_close(torch.rand(3), first)
    with seeded("a", 2):
        assert not torch.equal(torch.rand(3), first)


def test_pairs_of_seeds_and_what_they_say() -> None:
    cells = [{"seed": s, "a": a, "x": s + 2.0 * a} for s in (1, 0) for a in (0, 1)] + [{"seed": 7, "a": 1, "x": 9.0}]
    pairs = paired(cells, "x", {"a": 1}, {"a": 0})
    assert pairs == [(2, 0), (3, 1)]
    assert (always(pairs), always([*pairs, (1.0, 1.0)]), always([])) == (True, False, None)
    assert (both_ways([True, True]), both_ways([True, False]), both_ways([False, None])) == (True, False, None)


def test_verdicts_of_made_up_cells() -> None:
    """A verdict turns when the figure that it rests on does."""
    study = create_study("rank-heads", dim=8, ranks=(8, 1))
    made = [{**point, "seed": 0, "squared_error": 0.1 if point["rank"] == 8 else 0.7} for point in study.points()]
    assert study.verdict(made).seen is True
    assert study.verdict([own | {"squared_error": 0.6} for own in made]).seen is False
    deeper = [own | {"squared_error": 0.05} if own["depth"] == 3 else own for own in made]
    assert study.verdict(deeper).seen is False
    assert study.verdict(made[1:]) == Verdict(None, {}, ("Not every condition was measured.",))
    copies = create_study("bigram-backcopy")
    deep = [
        {
            **point,
            "seed": seed,
            "dormant_sink": 0.8,
            "active_sink": 0.1,
            "drain": 0.3 + (point["attention"] == "relu"),
            "peak": 2.0 if point["optimiser"] == "adam" else 1.0,
        }
        for seed in range(3)
        for point in copies.points()
    ]
    assert copies.verdict(deep).seen is True
    assert copies.verdict([own | {"peak": 1.0} for own in deep]).seen is False
    assert copies.verdict([own | {"active_sink": 0.9} for own in deep]).seen is False
    assert copies.verdict(deep[:2]).seen is None
    sinks = create_study("sink-emergence")
    usual = {"first": 0.1, "applied": 0.1, "bits": 3.0, "curve": [{"step": 0, "sinks": 0.0}]}
    plain = {"attention": "softmax", "optimiser": "adam"}
    some = [
        {**point, "seed": seed, **usual, "sinks": 0.5 if plain.items() <= point.items() else 0.1}
        for seed in range(3)
        for point in sinks.points()
    ]
    assert sinks.verdict(some).seen is True
    biased = [own | {"sinks": 0.6} if own["attention"] == "key-bias" else own for own in some]
    assert sinks.verdict(biased).seen is False
    capacity = create_study("memorisation")
    whole = [{**point, "mechanism": point["label"], "memorised": 10.0 * point["heads"] + point["context"]
              + point["head_dim"]} for point in capacity.points()]  # fmt: skip
    assert capacity.verdict(whole).seen is True
    flat = [own | {"memorised": 5.0} for own in whole]
    assert capacity.verdict(flat).seen is False


@pytest.mark.slow
def test_claims_that_need_some_training() -> None:
    """Sinks, patterns and capacity show after hundreds of steps only, which together take ten seconds."""
    sinks = create_study("bigram-backcopy", steps=300, batch=16, depths=(1,))
    soft, relu = (sinks.measure(point, 0) for point in sinks.points()[:2])
    assert soft["dormant_sink"] > 0.3 > 0.1 > soft["active_sink"]
    assert soft["drain"] < 0.6 < relu["drain"]
    assert soft["copy_loss"] < 0.3
    line = create_study("linear-regression", steps=500, heads=(1, 2), batch=128, learning_rate=0.03)
    cells = [{**point, **line.measure(point, 0)} for point in line.points()]
    assert line.verdict(cells).seen is True
    capacity = create_study("memorisation", steps=150, examples=256, dim=24)
    known = [capacity.measure(point, 0)["memorised"] for point in capacity.points()[:3]]
    assert all(more > 1.2 * less for less, more in pairwise(known))
