"""ACMIL against loops over branches and instances; its masking by counting."""

import pytest
import torch
import torch.nn.functional as F

from manyheads.mechanisms.pooling.acmil import Acmil


def build(heads=3, **config):
    torch.manual_seed(0)
    return Acmil(8, heads, **{"hidden": 5, "top": 4, "drop": 0.5, **config}).double()


def branch_weights(module, x, real):
    """[heads][n] by loops, and h."""
    h = [torch.relu(module.reduce.weight @ row) for row in x]
    table = torch.zeros(module.heads, len(x)).double()
    for k in range(module.heads):
        score = {}
        for i in range(len(x)):
            if real[i]:
                left = torch.tanh(module.tanh_proj.weight @ h[i] + module.tanh_proj.bias)
                gate = 1 / (1 + torch.exp(-(module.gate_proj.weight @ h[i] + module.gate_proj.bias)))
                score[i] = (module.branches.weight[k] * left * gate).sum()
        total = sum(s.exp() for s in score.values())
        for i, s in score.items():
            table[k, i] = s.exp() / total
    return table, torch.stack(h)


@torch.no_grad()
def test_equation_and_diversity():
    module, x = build().eval(), torch.randn(2, 6, 8).double()
    real = torch.tensor([[True] * 6, [True, False, True, True, False, True]])
    result = module(x, mask=real, need_weights=True)
    cosines = []
    for row in range(2):
        table, h = branch_weights(module, x[row], real[row])
        torch.testing.assert_close(result.weights[row, :, 0], table)
        torch.testing.assert_close(result.output[row], sum(table.mean(0)[i] * h[i] for i in range(6)))
        for i in range(3):
            cosines += [F.cosine_similarity(table[i], table[j], dim=0) for j in range(i)]
    torch.testing.assert_close(result.losses["diversity"], sum(cosines) / len(cosines))


@torch.no_grad()
def test_one_branch_is_gated_attention_and_has_no_diversity_loss():
    module, x = build(heads=1, drop=0.0).train(), torch.randn(2, 6, 8).double()
    table, h = branch_weights(module, x[0], [True] * 6)
    result = module(x)
    torch.testing.assert_close(result.output[0], table[0] @ h)
    assert result.losses["diversity"] == 0


@torch.no_grad()
def test_training_drops_half_of_the_top_four_and_renormalises():
    module, x = build().train(), torch.randn(2, 9, 8).double()
    full = module.eval()(x, need_weights=True).weights[:, :, 0]
    module.train()
    seen = set()
    for _ in range(20):
        found = module(x, need_weights=True).weights[:, :, 0]
        for row in range(2):
            for k in range(3):
                gone = set((found[row, k] == 0).nonzero()[:, 0].tolist())
                assert len(gone) == 2
                assert gone <= set(full[row, k].topk(4).indices.tolist())
                kept = [i for i in range(9) if i not in gone]
                wanted = full[row, k, kept] / full[row, k, kept].sum()
                torch.testing.assert_close(found[row, k, kept], wanted)
                seen.add((row, k, *sorted(gone)))
    assert len(seen) > 6  # drawn anew


@torch.no_grad()
def test_masking_never_empties_a_bag():
    module, x = build(drop=0.9, top=50).train(), torch.randn(2, 3, 8).double()
    real = torch.tensor([[True, False, False], [False, False, False]])
    result = module(x, mask=real, need_weights=True)
    torch.testing.assert_close(result.weights[0, :, 0, 0], torch.ones(3).double())
    assert result.losses["diversity"].isfinite()
    torch.testing.assert_close(result.losses["diversity"], torch.ones(()).double())  # the empty bag does not count


def test_branch_features_and_refusals():
    module, x = build().eval(), torch.randn(2, 6, 8).double()
    result = module(x, need_weights=True)
    torch.testing.assert_close((result.weights[:, :, 0] @ module.instances(x)).mean(1), result.output)
    with pytest.raises(ValueError, match="drop"):
        build(drop=1.0)
    with pytest.raises(ValueError, match="dense"):
        module(x, mask=torch.ones(2, 1, 6, 6, dtype=torch.bool))
