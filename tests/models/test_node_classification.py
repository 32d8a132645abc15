"""The classifier of nodes: graphs of a batch do not meet, padding is no node, and layers see edges or all nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from manyheads.models import ManyheadsConfig, ManyheadsForNodeClassification

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def _model(layers: Any, **more: Any) -> ManyheadsForNodeClassification:
    torch.manual_seed(0)
    config = ManyheadsConfig(**SIZES, layers=layers, num_node_features=5, num_labels=3, **more)
    return ManyheadsForNodeClassification(config).eval().double()


def _graphs(b: int = 3, n: int = 7, edges: int = 12) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    drawn = torch.randint(n, (b, 2, edges), generator=rng)
    labels = torch.randint(3, (b, edges), generator=rng)
    return {
        "node_features": torch.randn(b, n, 5, dtype=torch.float64, generator=rng),
        "edges": drawn,
        "edge_labels": labels,
    }


@pytest.mark.parametrize("name", ["supergat", "graph-layout", "relation-aware", "softmax"])
def test_graphs_of_a_batch_give_what_each_gives_alone(name: str) -> None:
    model, inputs = _model(name), _graphs()
    with torch.no_grad():
        whole = model(**inputs, output_attentions=True)
        for row in range(3):
            alone = model(**{key: value[row : row + 1] for key, value in inputs.items()}, output_attentions=True)
            torch.testing.assert_close(whole.logits[row], alone.logits[0])
            for mine, own in zip(whole.attentions, alone.attentions, strict=True):
                torch.testing.assert_close(mine[row], own[0])


@pytest.mark.parametrize("name", ["supergat", "relation-aware", "softmax"])
def test_a_smaller_graph_in_a_batch_is_padded(name: str) -> None:
    model, inputs = _model(name), _graphs(b=2)
    inputs["edges"][1] = inputs["edges"][1] % 5
    inputs["edges"][1, :, 9:] = -1
    real = torch.ones(2, 7)
    real[1, 5:] = 0
    with torch.no_grad():
        padded = model(**inputs, attention_mask=real, output_attentions=True)
        small = {"node_features": inputs["node_features"][1:, :5], "edges": inputs["edges"][1:, :, :9]}
        alone = model(**small, edge_labels=inputs["edge_labels"][1:, :9], output_attentions=True)
    torch.testing.assert_close(padded.logits[1, :5], alone.logits[0])
    torch.testing.assert_close(padded.attentions[0][1, :, :5, :5], alone.attentions[0][0])


def test_a_layer_along_edges_sees_them_and_nothing_else() -> None:
    inputs = _graphs(b=1)
    inputs["edges"] = torch.tensor([[[0, 1, 2], [1, 2, 0]]])
    inputs.pop("edge_labels")
    moved = {**inputs, "node_features": inputs["node_features"].clone()}
    moved["node_features"][0, 0] += 1
    for layers, reached in ((["graph-layout"], [0, 1, 2]), (["graph-layout", "softmax"], list(range(7)))):
        model = _model(layers)
        with torch.no_grad():
            one, other = model(**inputs, output_attentions=True), model(**moved)
        changed = (one.logits - other.logits).abs().amax(-1)[0]
        assert changed.nonzero()[:, 0].tolist() == reached
        seen = one.attentions[0][0].amax(0) > 0
        assert [tuple(pair) for pair in seen.nonzero().tolist()] == [(0, 2), (1, 0), (2, 1)]


def test_nodes_have_no_order() -> None:
    for layers in ("supergat", "softmax"):
        model, inputs = _model(layers, positions="learned"), _graphs(b=1)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
        shuffled = {"node_features": inputs["node_features"][:, order], "edges": order.argsort()[inputs["edges"]]}
        with torch.no_grad():
            one = model(inputs["node_features"], inputs["edges"]).logits
            other = model(**shuffled).logits
        torch.testing.assert_close(one[:, order], other)


def test_labels_in_forward_are_the_mean_over_what_is_asked() -> None:
    model, inputs = _model("supergat").train(), _graphs()
    labels = torch.randint(3, (3, 7))
    labels[0, :4] = -100
    out = model(**inputs, labels=labels)
    asked = labels != -100
    wanted = torch.nn.functional.cross_entropy(out.logits[asked], labels[asked])
    torch.testing.assert_close(out.loss, wanted + model.config.router_loss_weight * out.aux_loss)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_no_graph_is_refused() -> None:
    model, inputs = _model("supergat"), _graphs()
    nodes = inputs["node_features"]
    for edges, words in (
        (inputs["edges"] + 1, "0 to 6"),
        (inputs["edges"].double(), "want integers"),
        (inputs["edges"][:2], "want integers"),
        (torch.where(torch.arange(2)[:, None] == 1, -1, inputs["edges"]), "-1 as source and target"),
    ):
        with pytest.raises(ValueError, match=words):
            model(nodes, edges)
    with pytest.raises(ValueError, match="edge_labels"):
        model(nodes, inputs["edges"], edge_labels=inputs["edge_labels"][:, 1:])
    with pytest.raises(ValueError, match="relation-aware, takes labels"):
        _model("relation-aware")(nodes, inputs["edges"])
    with pytest.raises(ValueError, match=r"layers\[0\].*causal"):
        _model("aaren")
    empty = model(nodes, inputs["edges"][:, :, :0])
    assert torch.isfinite(empty.logits).all()


def test_it_is_saved_and_opened(tmp_path: Path) -> None:
    model, inputs = _model("supergat"), _graphs()
    model.save_pretrained(tmp_path)
    again = ManyheadsForNodeClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    assert "from manyheads.models import ManyheadsForNodeClassification" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="no Auto class"):
        AutoModel.from_pretrained(tmp_path)
