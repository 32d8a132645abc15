"""Task vectors: heads' means and what is added against loops, a vector that is learned, and the study's verdict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.explain.studies import create_study, run_study, task_vector
from manyheads.hosts.taps import record
from manyheads.steer import TaskVector, head_means, learn_task_vector
from manyheads.tasks.draw import generator

SEED = generator("test-task-vectors")


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                        num_attention_heads=2, initializer_range=0.4)).eval()  # fmt: skip


@torch.no_grad()
def test_means_and_what_is_added_against_loops() -> None:
    model, ids = llama(), torch.randint(20, (3, 5), generator=SEED)
    found = head_means(model, ids)
    with record(model) as calls:
        model(ids)
    for layer, call in enumerate(calls):
        torch.testing.assert_close(found[layer], sum(call.output[b, :, -1] for b in range(3)) / 3)
    weights = torch.randn(2, 2, generator=SEED)
    vector = TaskVector(weights, found)
    # v_0 through W_O is what the first layer's residual gains at the last token, and nowhere else.
    kept: list[Any] = []
    handle = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, i, o: kept.append(o))
    model(ids)
    with vector.added(model):
        model(ids)
    handle.remove()
    own = sum(weights[0, h] * model.model.layers[0].self_attn.o_proj.weight[:, 8 * h : 8 * h + 8] @ found[0, h]
              for h in range(2))  # fmt: skip
    torch.testing.assert_close(kept[1][:, -1] - kept[0][:, -1], own.expand(3, -1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(kept[1][:, :-1], kept[0][:, :-1])
    plain = model(ids).logits
    with vector.added(model, 0.0):
        torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)


def test_a_vector_is_learned_and_the_model_left_alone() -> None:
    model = llama()
    prompts, questions = torch.randint(20, (4, 6), generator=SEED), torch.arange(6)[:, None]
    answers = torch.full((6,), 7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = learn_task_vector(model, prompts, questions, answers, steps=40)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert all(own.grad is None for own in model.parameters())

    @torch.no_grad()
    def loss() -> float:
        return float(torch.nn.functional.cross_entropy(model(questions).logits[:, -1], answers))

    plain = loss()
    with found.added(model):
        assert loss() < plain - 0.5
    with pytest.raises(ValueError, match="want"):
        learn_task_vector(model, prompts, questions, answers[:2])


def test_tasks_by_hand() -> None:
    rows = task_vector.draw_tasks(30, 3, 9, torch.tensor([2, 5]), SEED)
    assert rows.shape == (30, 8)
    seen = set()
    for row in rows.tolist():
        shifts = {(row[2 * i + 1] - row[2 * i]) % 9 for i in range(4)}
        assert len(shifts) == 1
        seen |= shifts
        assert len(set(row[::2])) == 4
    assert seen == {2, 5}


@pytest.mark.parametrize(("learned", "seen"), [(0.9, True), (0.2, False)])
def test_verdict_of_task_vectors(learned: float, seen: bool) -> None:
    study, found = create_study("task-vector"), {"none": 0.1, "sum": 0.3, "learned": learned, "examples": 1.0}
    cells = [{"seed": s, **p, "accuracy": found[p["way"]]} for s in range(3) for p in study.points()]
    assert study.verdict(cells).seen is seen
    assert study.verdict(cells[:2]).seen is None


def test_task_vectors_end_to_end(tmp_path: Any) -> None:
    settings = {"vocab": 8, "tasks": 1, "shots": 2, "dim": 8, "steps": 3, "batch": 4, "fit": 2}
    results = run_study("task-vector", tmp_path, seeds=1, settings=settings)
    assert [cell["error"] for cell in results["cells"]] == [None] * 4
