"""Strength by hop, clusters of heads, spectral gaps and concentration: against loops, identities and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from manyheads.explain.detectors import cluster_heads, detect, hop_strengths
from manyheads.explain.detectors.hops import agreement
from manyheads.explain.detectors.patterns import spectral_gaps
from manyheads.explain.studies import concentration, create_study, run_study
from manyheads.hosts.taps import record
from manyheads.tasks.draw import generator

SEED = generator("test-hops")


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                        num_attention_heads=2, initializer_range=0.4)).eval()  # fmt: skip


def vit() -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=4,
        intermediate_size=16,
        image_size=16,
        initializer_range=0.4,
    )
    return ViTForImageClassification(config).eval()


@torch.no_grad()
def test_hops_of_tokens_against_a_loop() -> None:
    model, ids = llama(), torch.randint(40, (2, 7), generator=SEED)
    found, patterns = hop_strengths(model, inputs=ids)
    with record(model) as calls:
        model(ids)
    assert found.shape == (2, 2, 7)
    for layer, call in enumerate(calls):
        weights = call.weights().double()
        for head in range(2):
            expected = [0.0] * 7
            for b in range(2):
                for i in range(7):
                    for j in range(7):
                        expected[abs(i - j)] += float(weights[b, head, i, j]) / 14
            torch.testing.assert_close(found[layer, head], torch.tensor(expected).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2).double(), atol=1e-6, rtol=0)
    assert patterns.shape == (2, 2, 16, 16)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="differ in length"):
        hop_strengths(model, inputs={"input_ids": ids, "attention_mask": mask})


@torch.no_grad()
def test_hops_of_patches_are_rings() -> None:
    model, pixels = vit(), torch.randn(1, 3, 16, 16, generator=SEED)
    found, _ = hop_strengths(model, inputs={"pixel_values": pixels})
    with record(model) as calls:
        model(pixels)
    weights = calls[1].weights().double()[0, 1, 1:, 1:]
    expected = torch.zeros(4, dtype=torch.float64)
    for i in range(16):
        for j in range(16):
            expected[max(abs(i // 4 - j // 4), abs(i % 4 - j % 4))] += weights[i, j] / 16
    torch.testing.assert_close(found[1, 1], expected, atol=1e-6, rtol=0)
    assert float(found.sum(-1).max()) < 1


def test_clusters_of_planted_patterns() -> None:
    kinds = torch.stack(
        [torch.eye(16), torch.ones(16, 16) / 16, torch.zeros(16, 16).index_fill(1, torch.tensor(0), 1.0)]
    )
    rows = kinds.repeat_interleave(4, 0) + 0.02 * torch.rand(12, 16, 16, generator=SEED)
    before = torch.get_rng_state()
    found = cluster_heads(rows, 3, steps=150)
    torch.testing.assert_close(torch.get_rng_state(), before)
    assert agreement(found.labels, torch.arange(3).repeat_interleave(4)) == 1
    assert found.error < 0.2
    with pytest.raises(ValueError, match="clusters=13"):
        cluster_heads(rows, 13)


def test_agreement_is_sklearns() -> None:
    from sklearn.metrics import adjusted_rand_score

    for _ in range(5):
        one, two = (torch.randint(3, (20,), generator=SEED) for _ in range(2))
        assert abs(agreement(one, two) - adjusted_rand_score(one, two)) < 1e-9
    assert agreement(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0])) == 1


def test_spectral_gaps_of_known_matrices() -> None:
    same = torch.rand(5, generator=SEED).softmax(0).expand(5, 5)
    lazy = 0.7 * torch.eye(5) + 0.3 * same
    found = spectral_gaps(torch.stack([same, torch.eye(5), lazy]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.3]).double(), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, vit])
def test_the_detector_against_all_eigenvalues(make: Any) -> None:
    model = make()
    given = {"input_ids": torch.randint(40, (1, 9), generator=SEED)} if make is llama else {
        "pixel_values": torch.randn(1, 3, 16, 16, generator=SEED)}  # fmt: skip
    found = detect(model, ["spectral-gap"], given)["spectral-gap"]
    with record(model) as calls:
        model(**given)
    expected = torch.stack([spectral_gaps(call.weights()[0]) for call in calls])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    assert float(expected.std()) > 1e-3


def test_forms_of_attention_by_hand() -> None:
    q, k = (torch.randn(4, 3, generator=SEED, dtype=torch.float64) for _ in range(2))
    for form in ("softmax", "lln", "elu", "relu"):
        torch.testing.assert_close(concentration.attention(form, q, k).sum(-1), torch.ones(4).double())
    elu = concentration.attention("elu", q, k)
    raw = [sum((float(a) + 1 if a > 0 else float(a.exp())) * (float(b) + 1 if b > 0 else float(b.exp()))
               for a, b in zip(q[1], k[j], strict=True)) for j in range(4)]  # fmt: skip
    torch.testing.assert_close(elu[1], torch.tensor(raw).double() / sum(raw))
    even = concentration.concentration(torch.full((4, 4), 0.25).double())
    assert abs(even["entropy"] - torch.tensor(4.0).log()) < 1e-6
    assert abs(even["gap"] - 1) < 1e-6


@pytest.mark.parametrize(("lln", "seen"), [(0.1, True), (0.9, False)])
def test_verdict_of_concentration(lln: float, seen: bool) -> None:
    study = create_study("concentration")
    off = {"lln": lln, "elu": 0.5, "relu": 0.6}
    cells = [{"seed": s, "mechanism": p["label"], **p, "entropy_off": off[p["form"]], "gap_off": off[p["form"]]}
             for s in range(3) for p in study.points()]  # fmt: skip
    assert study.verdict(cells).seen is seen
    assert study.verdict(cells[:1]).seen is None


@pytest.mark.parametrize(("late", "chance", "seen"), [(9.0, 0.1, True), (3.0, 0.1, False), (9.0, 0.8, False)])
def test_verdict_of_hops(late: float, chance: float, seen: bool) -> None:
    study = create_study("hop-strength")
    cells = [{"seed": s, "mechanism": p["label"], **p, "hops": late if p["half"] == "late" else 5.0, "agree": 0.7,
              "chance": chance} for s in range(3) for p in study.points()]  # fmt: skip
    assert study.verdict(cells).seen is seen
    assert study.verdict(cells[:1]).seen is None


@pytest.mark.parametrize(("name", "settings"), [("concentration", {"tokens": 16, "dim": 4, "deviations": (1.0, 2.0)}),
                                                ("hop-strength", {"length": 16, "count": 1, "steps": 5})])  # fmt: skip
def test_end_to_end(name: str, settings: dict[str, Any], tmp_path: Any) -> None:
    results = run_study(name, tmp_path, seeds=1, settings=settings)
    assert {cell["status"] for cell in results["cells"]} == {"done"}
    assert (tmp_path / "study.html").stat().st_size > 1000
