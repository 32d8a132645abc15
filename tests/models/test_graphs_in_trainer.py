"""transformers' Trainer over graphs of several sizes: its labels are those of nodes, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

from manyheads.models import ManyheadsConfig, ManyheadsForNodeClassification

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LABELLED = {"name": "relation-aware", "labels": 4}


def _model(layers: Any) -> ManyheadsForNodeClassification:
    torch.manual_seed(0)
    return ManyheadsForNodeClassification(ManyheadsConfig(**SIZES, layers=layers, num_node_features=5, num_labels=3))


def _graph(number: int) -> dict[str, Tensor]:
    rng, n, k = torch.Generator().manual_seed(number), 3 + number, 2 * number % 7
    return {
        "node_features": torch.randn(n, 5, generator=rng),
        "edges": torch.randint(n, (2, k), generator=rng),
        "edge_labels": torch.randint(4, (k,), generator=rng),
        "labels": torch.randint(3, (n,), generator=rng),
    }


def _together(graphs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    n, k = max(len(g["labels"]) for g in graphs), max(g["edges"].shape[1] for g in graphs)
    padded = []
    for graph in graphs:
        missing, fewer = n - len(graph["labels"]), k - graph["edges"].shape[1]
        made = {"node_features": F.pad(graph["node_features"], (0, 0, 0, missing))}
        made |= {"edges": F.pad(graph["edges"], (0, fewer), value=-1)}
        made |= {"attention_mask": F.pad(torch.ones(len(graph["labels"])), (0, missing))}
        made |= {"labels": F.pad(graph["labels"], (0, missing), value=-100)}
        padded.append(made | {"edge_labels": F.pad(graph["edge_labels"], (0, fewer))})
    return {name: torch.stack([one[name] for one in padded]) for name in padded[0]}


@pytest.mark.parametrize("labelled", [False, True])
def test_it_is_evaluated_by_the_labels_of_nodes(labelled: bool, tmp_path: Path) -> None:
    """Trainer takes every argument that is named after labels for one that it must have, and that it measures by."""
    model, seen = _model(LABELLED if labelled else "graph-layout"), []

    def collate(graphs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = _together(graphs)
        return batch if labelled else {name: value for name, value in batch.items() if name != "edge_labels"}

    def measure(made: Any) -> dict[str, float]:
        seen.append(made.label_ids.shape)
        return {"right": float((made.predictions.argmax(-1) == made.label_ids).mean())}

    options = {"report_to": [], "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True, "max_steps": 1}
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, **options)
    data: Any = [_graph(number) for number in range(4)]
    trainer = Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, data_collator=collate, compute_metrics=measure
    )
    trainer.train()
    figures = trainer.evaluate()
    assert {"eval_loss", "eval_right"} <= figures.keys()
    assert seen == [(4, 6)]
    with torch.no_grad():
        losses = [model.eval()(**collate(data[at : at + 2])).loss for at in (0, 2)]
    assert figures["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask \[2, 4\].*\[2, 5\]"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask \[1, 5\].*\[2, 5\]"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"attention_mask \[2, 1, 5, 5\].*\[2, 5\]"),
        ({"node_features": torch.randn(2, 5, 6)}, r"node_features \[2, 5, 6\].*5"),
        ({"edge_labels": None}, "edge_labels.*remove_unused_columns"),
        ({"edge_label": torch.zeros(2, 2)}, "edge_label"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], words: str) -> None:
    given = _together([_graph(1), _graph(2)])
    given.pop("labels")
    with pytest.raises((ValueError, TypeError), match=words):
        _model(LABELLED)(**{**given, **change})
