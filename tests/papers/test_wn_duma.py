"""WN-DUMA's stacked co-attention against loops."""

import torch

from manyheads.mechanisms.cross.wn_duma import WnDuma


def build():
    torch.manual_seed(0)
    module = WnDuma(12, 3).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def by_loops(module, x, context):
    rows = []
    for row in x:
        mixed = torch.zeros(12, dtype=x.dtype)
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            q = module.q_proj.weight[part] @ row
            scores = [(q @ (module.k_proj.weight[part] @ c) / 2).exp() for c in context]
            for c, score in zip(context, scores, strict=True):
                mixed[part] += score / sum(scores) * (module.v_proj.weight[part] @ c)
        total = row + module.o_proj.weight @ mixed
        centred = total - total.mean()
        rows.append(centred / (centred.square().mean() + 1e-6).sqrt() * module.norm.weight + module.norm.bias)
    return torch.stack(rows)


@torch.no_grad()
def test_a_stacked_layer():
    module, passage, answer = build(), torch.randn(2, 6, 12).double(), torch.randn(2, 4, 12).double()
    real = torch.tensor([[True] * 4, [True, True, False, False]])  # of the answer
    new_answer = module(answer, passage).output
    new_passage = module(passage, new_answer, mask=real).output
    wanted = by_loops(module, answer[1, :2], passage[1])
    torch.testing.assert_close(new_answer[1, :2], wanted)
    torch.testing.assert_close(new_passage[1], by_loops(module, passage[1], wanted))
    parallel = module(passage, answer, mask=real).output  # what DUMA would do
    assert (parallel - new_passage).abs().max() > 1e-2


@torch.no_grad()
def test_nothing_to_read_leaves_the_normed_text():
    module, answer = build(), torch.randn(1, 4, 12).double()
    found = module(answer, torch.randn(1, 3, 12).double(), mask=torch.zeros(1, 3, dtype=torch.bool)).output
    torch.testing.assert_close(found, module.norm(answer))
