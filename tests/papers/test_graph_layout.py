"""Graph attention over a page: against the dense mask of the released code, and a page by hand."""

import pytest
import torch

from manyheads.mechanisms.graph.graph_layout import GraphLayout, layout_graph, word_edges


def build():
    torch.manual_seed(0)
    return GraphLayout(12, 3).double()


@torch.no_grad()
def test_equation():
    module, x = build(), torch.randn(2, 6, 12).double()
    segments, edges = torch.tensor([0, 0, 1, 2, 2, -1]), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    spans = {0: [0, 1], 1: [2], 2: [3, 4]}
    mask = torch.full((6, 6), -9e15).double()
    for source, target in edges.T.tolist():
        for i in spans[target]:
            mask[i, spans[source]] = 0
    normed = module.norm(x)
    q, k, v = (p(normed).view(2, 6, 3, 4).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    mixed = ((q @ k.mT / 2 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
    found = module(x, edges=word_edges(segments, edges)).output
    torch.testing.assert_close(found[:, :5], (x + module.o_proj(mixed))[:, :5])
    torch.testing.assert_close(found[:, 5], x[:, 5] + module.o_proj.bias)


def test_words_of_no_segment_and_segments_of_no_word_have_no_edges():
    assert word_edges(torch.tensor([-1, 1, 1]), torch.tensor([[0, 1, 1], [1, 0, 1]])).T.tolist() == [
        [1, 1],
        [1, 2],
        [2, 1],
        [2, 2],
    ]
    assert word_edges(torch.tensor([-1, 0]), torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)


def test_a_page():
    # Two groups: a header (0) over two lines (2, 1), and right of it a column (3 over 4), given out of order.
    boxes = torch.tensor(
        [[0, 0, 40, 10], [0, 40, 40, 50], [0, 20, 40, 30], [60, 0, 90, 10], [60, 20, 90, 30]], dtype=torch.float
    )
    order, edges = layout_graph(boxes[[1, 2, 0, 4, 3]], torch.tensor([7, 7, 7, 5, 5]))
    assert order.tolist() == [2, 1, 0, 4, 3]
    pairs = set(map(tuple, edges.T.tolist()))
    assert len(pairs) == edges.shape[1]
    # Header with its lines, the lines below each other, the column's head with its child; heads side by side.
    wanted = {(2, 1), (2, 0), (1, 0), (4, 3), (2, 4)}
    assert pairs == wanted | {(b, a) for a, b in wanted}


def test_one_segment_has_no_edges_and_wrong_shapes_are_refused():
    order, edges = layout_graph(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    assert order.tolist() == [0]
    assert edges.shape == (2, 0)
    with pytest.raises(ValueError, match="layout_graph"):
        layout_graph(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64))
