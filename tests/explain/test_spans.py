"""Mass on spans over turns, what segments are worth, and the gap of two models: against loops; verdicts both ways."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.explain.detectors.spans import (
    contextual_awareness,
    homologous_gap,
    influence_scores,
    relevance_over_turns,
    response_loss,
    span_mass,
)
from manyheads.explain.studies import create_study, run_study
from manyheads.hosts.taps import record
from manyheads.tasks.draw import generator

SEED = generator("test-spans")


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                        num_attention_heads=2, initializer_range=0.4)).eval()  # fmt: skip


@torch.no_grad()
def test_mass_on_spans_against_a_loop() -> None:
    model, ids = llama(), torch.randint(40, (11,), generator=SEED)
    found = span_mass(model, ids, [(0, 3), (2, 9)], (6, 10))
    with record(model) as calls:
        model(ids[None])
    for place, (a, b) in enumerate(((0, 3), (2, 9))):
        chance = 0.0
        for layer, call in enumerate(calls):
            for head in range(2):
                weights = call.weights()[0, head]
                mass = sum(float(weights[i, j]) for i in range(6, 10) for j in range(a, b)) / 4
                assert abs(float(found.mass[place, layer, head]) - mass) < 1e-6
        for i in range(6, 10):
            chance += len([j for j in range(a, b) if j <= i]) / (i + 1) / 4
        assert abs(float(found.chance[place]) - chance) < 1e-9
    assert abs(float(found.relevance[0]) - float(found.mass[0].mean())) < 1e-9
    whole = span_mass(model, ids, [(0, 11)], (0, 11))
    torch.testing.assert_close(whole.mass, torch.ones(1, 2, 2).double(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_turns_are_read_with_what_precedes_them() -> None:
    model, ids = llama(), torch.randint(40, (14,), generator=SEED)
    turns = relevance_over_turns(model, ids, (0, 2), [(4, 6), (10, 12)])
    assert [own.before for own in turns] == [4, 10]
    for own, (a, b) in zip(turns, ((4, 6), (10, 12)), strict=True):
        torch.testing.assert_close(own.mass, span_mass(model, ids[:b], [(0, 2)], (a, b)).mass[0])
    with pytest.raises(ValueError, match="begins before the span"):
        relevance_over_turns(model, ids, (0, 5), [(4, 6)])
    with pytest.raises(ValueError, match="no part of 14"):
        span_mass(model, ids, [(3, 20)], (4, 6))
    with pytest.raises(ValueError, match="one input"):
        span_mass(model, torch.zeros(2, 5, dtype=torch.long), [(0, 1)], (2, 3))


@torch.no_grad()
def test_awareness_by_its_parts() -> None:
    model = llama()
    segments = [torch.randint(40, (n,), generator=SEED) for n in (3, 4, 2)]
    question, response = torch.randint(40, (2,), generator=SEED), torch.randint(40, (3,), generator=SEED)
    losses = []
    for own in segments:
        row = torch.cat([own, question, response])
        logs = model(row[None]).logits[0].double().log_softmax(-1)
        losses.append(-sum(float(logs[len(row) - 4 + i, response[i]]) for i in range(3)) / 3)
    assert abs(response_loss(model, torch.cat([segments[0], question]), response) - losses[0]) < 1e-5
    found = contextual_awareness(model, segments, question, response)
    raw = [math.exp(-math.exp(own)) for own in losses]
    torch.testing.assert_close(found.importance, torch.tensor([own / sum(raw) for own in raw]).double(), rtol=1e-3,
                               atol=1e-9)  # fmt: skip
    whole = torch.cat([*segments, question, response])
    mass = span_mass(model, whole, [(0, 3), (3, 7), (7, 9)], (11, 14)).relevance
    torch.testing.assert_close(found.attention, mass / mass.sum())
    assert abs(found.score - float(torch.cosine_similarity(found.attention, found.importance, 0))) < 1e-9
    with pytest.raises(ValueError, match="1 segments"):
        contextual_awareness(model, segments[:1], question, response)
    with pytest.raises(ValueError, match="can be foretold"):
        response_loss(model, question[:0], response[:0])


@torch.no_grad()
def test_the_gap_of_two_models_and_the_final_score() -> None:
    one, two = llama(), llama(1)
    samples = [(torch.randint(40, (4,), generator=SEED), torch.randint(40, (3,), generator=SEED)) for _ in range(3)]
    gaps = [math.exp(response_loss(one, *own)) - math.exp(response_loss(two, *own)) for own in samples]
    scaled = [(own - min(gaps)) / (max(gaps) - min(gaps)) for own in gaps]
    raw = [math.exp(own) for own in scaled]
    found = homologous_gap(one, two, samples)
    torch.testing.assert_close(found, torch.tensor([own / sum(raw) for own in raw]).double())
    torch.testing.assert_close(homologous_gap(one, one, samples), torch.full((3,), 1 / 3).double())
    torch.testing.assert_close(influence_scores(found, [0.1, 0.2, 0.3], 1.0), found)
    assert float(influence_scores(found, [0.1, 0.2, 0.3]).sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match="as many of both"):
        influence_scores(found, [0.1])


@pytest.mark.parametrize(("last", "chance", "seen"), [(0.2, 0.1, True), (0.5, 0.1, False), (0.2, 0.3, False)])
def test_verdict_of_turns(last: float, chance: float, seen: bool) -> None:
    study = create_study("instruction-turns")
    cells = [{"seed": s, **p, "relevance": 0.4 if p["turn_of"] == "first" else last, "chance": chance}
             for s in range(3) for p in study.points()]  # fmt: skip
    assert study.verdict(cells).seen is seen


@pytest.mark.parametrize(("needed", "importance", "seen"), [(0.5, 0.9, True), (0.1, 0.9, False), (0.5, 0.0, False)])
def test_verdict_of_segments(needed: float, importance: float, seen: bool) -> None:
    study = create_study("segment-awareness")
    cells = [{"seed": s, **p, "needed": needed, "others": 0.2, "importance": importance, "less": 0.03}
             for s in range(3) for p in study.points()]  # fmt: skip
    assert study.verdict(cells).seen is seen


@pytest.mark.parametrize(("name", "settings"), [("instruction-turns", {"turns": 2, "turn": 8}),
                                                ("segment-awareness", {"length": 160}),
                                                ("source-attention", {"stretches": 2, "stretch": 8})])  # fmt: skip
def test_span_studies_end_to_end(name: str, settings: dict[str, Any], tmp_path: Any) -> None:
    results = run_study(name, tmp_path, seeds=1, settings=settings)
    assert [cell["error"] for cell in results["cells"]] == [None] * len(results["cells"])


def test_sensitivity_is_the_share_of_the_jacobian_that_the_source_has() -> None:
    """Against the Jacobian itself, column by column; and a source that nothing reads has none of it."""
    from manyheads.explain.studies.source_attention import source_sensitivity
    from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ManyheadsForCausalLM(ManyheadsConfig(**sizes, intermediate_size=0)).double().eval()
    ids = torch.tensor([3, 1, 4, 1, 5, 9])
    embeds = model.get_input_embeddings()(ids[None]).detach()

    def last(rows: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=rows, output_hidden_states=True, use_cache=False).hidden_states[-1][0, 4]

    jacobian = torch.autograd.functional.jacobian(last, embeds)[:, 0]
    u = torch.randn(1, 8, generator=torch.Generator().manual_seed(7))[0].double()
    moved = torch.einsum("o,oie->ie", u, jacobian).square().sum(-1)
    found = source_sensitivity(model, ids, 2, [(4, 5)], seed=7)
    torch.testing.assert_close(found[0], float(moved[:2].sum() / moved.sum()))
    model.model.stack.layers[0].self_attn.mechanism.o_proj.weight.data.zero_()
    assert source_sensitivity(model, ids, 2, [(4, 5)]) == [0.0]
    with pytest.raises(ValueError, match="source=4, spans="):
        source_sensitivity(model, ids, 4, [(3, 5)])
