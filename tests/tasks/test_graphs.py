"""Drawn graphs: what they say of themselves, and that a graph mechanism learns what its nodes alone do not tell."""

import pytest
import torch
from torch import nn

from manyheads.compare.train import build_model, evaluate, placed, unpassed
from manyheads.mechanisms.graph.supergat import SuperGAT
from manyheads.tasks import create_task, task_class
from manyheads.tasks.draw import generator
from manyheads.tasks.graphs import communities, far_away

SIZE = {"hidden_size": 16, "heads": 2, "layers": 1, "intermediate_size": 0, "short_conv": 0, "positions": "learned"}


def test_communities_are_where_edges_come_from():
    graphs = communities(50, generator("test"), noise=0.4, seen=0.1)
    kind = graphs.targets
    source, target = (kind.gather(1, end) for end in graphs.edges.unbind(1))
    asked = (source >= 0) & (target >= 0)
    # Six in ten from the own community, and a fourth of the rest.
    assert abs(float((source == target)[asked].float().mean()) - 0.7) < 0.03
    shown = graphs.features.argmax(-1)
    assert bool((shown[kind >= 0] == 4).all())
    assert abs(float((kind < 0).float().mean()) - 0.1) < 0.02


def test_the_answer_is_as_far_as_can_be_on_a_ring():
    graphs = far_away(3, generator("test"), length=4, rings=2, kinds=3)
    for features, edges, targets in zip(*graphs[:3], strict=True):
        reach = torch.zeros(16, 16)
        reach[edges[1], edges[0]] = 1
        assert reach.sum(0).tolist() == reach.sum(1).tolist() == [2.0] * 16
        marked = features[:, :3].sum(1) > 0
        for node in (targets >= 0).nonzero().flatten():
            assert features[node, 3] == 1
            seen, steps = torch.eye(16)[node], 0
            while not bool((seen > 0)[marked].any()):
                seen, steps = seen @ reach + seen, steps + 1
            assert steps == 4
            assert int(features[(seen > 0) & marked][0, :3].argmax()) == targets[node]


def test_graphs_as_one():
    graphs = communities(3, generator("test"), n=5, degree=2)
    features, edges, targets = graphs.joined()
    assert features.shape == (1, 15, 5)
    assert targets.shape == (1, 15)
    assert torch.equal(edges[:, 10:20] - 5, graphs.edges[1])


class Classifier(nn.Module):
    def __init__(self, features, kinds, layers):
        super().__init__()
        self.read, self.say = nn.Linear(features, 16), nn.Linear(16, kinds)
        self.layers = nn.ModuleList([SuperGAT(16, 2) for _ in range(layers)])
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(layers)])

    def forward(self, x, edges):
        h = self.read(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = h + layer(norm(h), edges=edges).output
        return self.say(h)


def test_edges_tell_communities_that_nodes_do_not():
    torch.manual_seed(0)
    rng, found = generator("test"), []
    for layers in (0, 2):
        model = Classifier(5, 4, layers).eval()  # without the loss of edges
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(30):
            x, edges, targets = communities(4, rng, noise=0.2, seen=0.4).joined()
            loss = nn.functional.cross_entropy(model(x, edges)[0], targets[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x, edges, targets = communities(20, rng, noise=0.2, seen=0.4).joined()
        asked = targets[0] >= 0
        found.append(float((model(x, edges)[0].argmax(-1) == targets[0])[asked].float().mean()))
    assert found[0] < 0.35
    assert found[1] > 0.55


def test_refusals():
    for wrong in ({"n": 0}, {"kinds": True}, {"noise": 1.5}, {"seen": 0.0}):
        with pytest.raises(ValueError, match="communities: "):
            communities(2, generator("test"), **wrong)
    with pytest.raises(ValueError, match="far_away: length=0"):
        far_away(2, generator("test"), length=0)


def test_edges_one_way_round_are_of_one_kind():
    graphs = far_away(2, generator("test"), length=3, rings=2)
    for edges, labels in zip(graphs.edges, graphs.labels, strict=True):
        ahead, back = (edges[:, labels == kind] for kind in (0, 1))
        assert {tuple(pair) for pair in ahead.T.tolist()} == {tuple(pair[::-1]) for pair in back.T.tolist()}
        step = dict(ahead.T.tolist())
        assert len(step) == 12  # one edge ahead from each node


@pytest.mark.parametrize("name", ["communities", "far-away"])
@pytest.mark.parametrize("mechanism", ["supergat", "relation-aware", "graph-layout", "softmax"])
def test_compare_has_a_place_for_it(name, mechanism):
    task = create_task(name, eval_examples=3)
    model = build_model(task, {"name": mechanism}, SIZE)
    batch = next(task.train_batches(2, 0))
    assert model.stack.layers[0].self_attn.mechanism.card.name == mechanism
    task.loss(task.answered(model(**batch.inputs)), batch.targets).backward()
    assert bool((model.embed_nodes.weight.grad != 0).any())
    score = evaluate(task, model, torch.device("cpu"))
    assert 0 <= score.value <= 1
    assert score.answers == sum(int((batch.targets >= 0).sum()) for batch in task.eval_batches(2))


def test_what_no_task_gives_is_named():
    assert "sampled" in unpassed("largegt")
    assert unpassed("relation-aware") == ""
    assert "labels" in unpassed("relation-aware", task_class("recall"))
    with pytest.raises(ValueError, match="far-away has it not: sampled"):
        placed(create_task("far-away"), {"name": "largegt"})


@pytest.mark.parametrize("wrong", [{"n": 1}, {"kinds": 1}, {"noise": 2.0}, {"seen": 0.0}])
def test_communities_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="communities: .*" + next(iter(wrong))):
        create_task("communities", **wrong)
