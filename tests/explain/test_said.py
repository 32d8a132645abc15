"""Faithfulness moves by what a model says: a probability among classes, of a label alone, or a regression's number."""

from __future__ import annotations

import pytest
import torch
from tiny_families import prompt
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForSequenceClassification
from zoo import WIDE

from manyheads.explain.attributions import compare_attributions, deletion_curve
from manyheads.explain.explanation import _answer, worth
from manyheads.hosts.loading import Loaded


def classifier(labels: int, problem: str | None) -> nn.Module:
    torch.manual_seed(2)
    settings = {**WIDE, "vocab_size": 61, "num_labels": labels, "problem_type": problem, "initializer_range": 0.3}
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **settings)).eval()


CASES = [
    (3, None, lambda logits: logits.softmax(-1)),
    (3, "multi_label_classification", torch.sigmoid),
    (1, None, torch.sigmoid),
    (1, "regression", lambda logits: logits),
    (2, "regression", lambda logits: logits),
]


@pytest.mark.parametrize(("labels", "problem", "said"), CASES)
def test_a_curve_is_of_what_the_model_says(labels: int, problem: str | None, said: object) -> None:
    model, ids = classifier(labels, problem), prompt(2, 7)
    assert callable(said)
    with torch.no_grad():
        wanted: Tensor = said(model(ids).logits)[:, 0]
    curve = deletion_curve(model, ids, torch.rand(2, 7), 0, steps=3)
    assert_close(torch.tensor([row[0] for row in curve.values]), wanted, atol=1e-6, rtol=1e-5)
    row = compare_attributions(model, ids, 0, ["relevance"], steps=3).rows[0]
    assert row.deletion != row.insertion  # of a lone label the share among all was always one


@pytest.mark.parametrize(("labels", "problem", "said"), CASES)
def test_an_answer_is_what_the_model_says(labels: int, problem: str | None, said: object) -> None:
    model, ids = classifier(labels, problem), prompt(1, 7)
    assert callable(said)
    with torch.no_grad():
        output = model(ids)
    wanted, names = said(output.logits)[0], []
    for answer in _answer(Loaded(model, None, "tiny"), output):
        key = "value" if problem == "regression" else "probability"
        assert answer[key] == pytest.approx(float(wanted[answer["id"]]), abs=1e-6)
        assert worth(answer).endswith("%") == (problem != "regression")
        names.append(answer["name"])
    assert len(names) == labels
