"""ACMIL's label losses against loops over branches and instances, and a pool that learns bags by them."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from manyheads import create_attention
from manyheads.training import BranchLabels, HardInstanceMining


def build(classes=3, **config):
    torch.manual_seed(0)
    return BranchLabels(create_attention("acmil", 8, 3, hidden=5, top=4, **config), classes).double()


def test_losses_by_loops():
    module, x, labels = build().eval(), torch.randn(2, 6, 8).double(), torch.tensor([2, 0])
    real = torch.tensor([[True] * 6, [True, False, True, True, False, True]])
    result = module(x, labels, mask=real, need_weights=True)
    branches, bags = [], []
    for row in range(2):
        h = [torch.relu(module.pool.reduce.weight @ instance) for instance in x[row]]
        for k in range(3):
            pooled = sum(result.weights[row, k, 0, i] * h[i] for i in range(6) if real[row, i])
            branches.append(cross_entropy(module.branches[k](pooled), labels[row]))
        pooled = sum(result.weights[row, :, 0, i].mean() * h[i] for i in range(6) if real[row, i])
        bags.append(cross_entropy(module.bag(pooled), labels[row]))
        torch.testing.assert_close(result.output[row], module.bag(pooled))
    torch.testing.assert_close(result.losses["branches"], sum(branches) / 6)
    torch.testing.assert_close(result.losses["bag"], sum(bags) / 2)
    assert set(result.losses) == {"diversity", "branches", "bag"}
    assert set(module(x).losses) == {"diversity"}


def test_branches_read_the_instances_that_their_pass_kept():
    """In training each pass masks anew: the logits of a branch are of the weights that came back with it."""
    module, x, labels = build(drop=0.5).train(), torch.randn(2, 9, 8).double(), torch.tensor([1, 1])
    result = module(x, labels, need_weights=True)
    assert (result.weights == 0).any()
    logits = module.branch_logits(x, result.weights)
    wanted = torch.stack([cross_entropy(logits[:, k], labels) for k in range(3)]).mean()
    torch.testing.assert_close(result.losses["branches"], wanted)


def test_padding_whatever_it_holds_and_empty_bags_count_for_nothing():
    module, x, labels = build().eval(), torch.randn(3, 6, 8).double(), torch.tensor([1, 0, 2])
    real = torch.tensor([[False, False, True, True, True, True], [True] * 6, [False] * 6])
    result = module(x.masked_fill(~real[..., None], torch.nan), labels, mask=real)
    alone = [module(x[:1, 2:], labels[:1]), module(x[1:2], labels[1:2])]
    for name in ("branches", "bag"):
        torch.testing.assert_close(result.losses[name], sum(each.losses[name] for each in alone) / 2)
    sum(result.losses.values()).backward()
    assert all(own.grad.isfinite().all() for own in module.parameters())
    empty = module(x, labels, mask=torch.zeros(3, 6, dtype=torch.bool))
    assert empty.losses["bag"] == 0


def test_every_branch_learns_to_tell_the_bags():
    """One instance in twelve tells the kind of a bag. Without a label loss a branch's classifier is noise."""
    accuracy = {}
    for own in (True, False):
        module = build(classes=2).float().train()
        optimiser, generator = torch.optim.Adam(module.parameters(), 1e-2), torch.Generator().manual_seed(3)

        def bags(generator=generator):
            labels = torch.randint(2, (16,), generator=generator)
            x = 0.3 * torch.randn(16, 12, 8, generator=generator)
            x[:, 5, 0] += 3.0
            x[:, 5, 1] += 6.0 * labels - 3.0
            return x, labels

        for _ in range(60):
            x, labels = bags()
            losses = module(x, labels).losses
            loss = losses["bag"] + losses["diversity"] + (losses["branches"] if own else 0.0)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        x, labels = bags()
        with torch.no_grad():
            result = module.eval()(x, need_weights=True)
            each = module.branch_logits(x, result.weights).argmax(-1) == labels[:, None]
        assert (result.output.argmax(-1) == labels).double().mean() > 0.9
        accuracy[own] = each.double().mean(0).min()
    assert accuracy[True] > 0.9
    assert accuracy[False] < 0.8


def test_refusals_and_bfloat16():
    with pytest.raises(ValueError, match="efficient-probing"):
        BranchLabels(create_attention("efficient-probing", 8, 2), 2)
    with pytest.raises(ValueError, match="classes=1"):
        build(classes=1)
    module, x = build(), torch.randn(2, 6, 8).double()
    with pytest.raises(ValueError, match="one each"):
        module(x, torch.tensor([1, 0, 1]))
    half = build().to(torch.bfloat16)
    losses = half(x.to(torch.bfloat16), torch.tensor([0, 1])).losses
    assert all(value.isfinite() for value in losses.values())
    assert losses["branches"].dtype == losses["bag"].dtype == torch.float32
    miner = HardInstanceMining(build().pool.float())
    assert isinstance(BranchLabels(miner.student, 2), BranchLabels)
