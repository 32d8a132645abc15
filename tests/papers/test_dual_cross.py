"""Global-local and pair-wise attention against loops; rollout against products of matrices."""

import pytest
import torch

from manyheads.mechanisms.cross.dual_cross import GlobalLocal, PairWise, attention_rollout, paired


def build(cls, **config):
    torch.manual_seed(0)
    return cls(12, 3, **config).double()


def row(heads, query, keys):
    parts = []
    for h in range(3):
        cut = slice(4 * h, 4 * h + 4)
        weights = torch.stack([heads.q_proj(query)[cut] @ heads.k_proj(k)[cut] / 2 for k in keys]).softmax(0)
        parts.append(sum(w * heads.v_proj(k)[cut] for w, k in zip(weights, keys, strict=True)))
    return heads.o_proj(torch.cat(parts))


@torch.no_grad()
def test_global_local():
    module, x = build(GlobalLocal, ratio=0.4), torch.randn(2, 8, 12).double()
    rollout = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6, 7], [0, 8, 2, 3, 9, 1, 0, 4]])
    real = torch.tensor([[True] * 8, [True] * 6 + [False] * 2])
    output = module(x, rollout=rollout, mask=real).output
    for b, asks, count in ((0, [0, 6, 7], 8), (1, [0, 1, 4], 6)):
        for i in range(8):
            wanted = row(module.attention, x[b, i], x[b, :count]) if i in asks else torch.zeros(12).double()
            torch.testing.assert_close(output[b, i], wanted)


@torch.no_grad()
def test_all_asking_is_plain_attention_and_one_token_asks_itself():
    x = torch.randn(2, 5, 12).double()
    module, plain = build(GlobalLocal, ratio=1.0), build(PairWise)
    plain.load_state_dict(module.state_dict())
    result, wanted = module(x, rollout=torch.rand(2, 5), need_weights=True), plain(x, need_weights=True)
    torch.testing.assert_close(result.output, wanted.output)
    torch.testing.assert_close(result.weights, wanted.weights)
    one = module(x[:, :1], rollout=torch.rand(2, 1)).output
    torch.testing.assert_close(one, plain(x[:, :1]).output)


@torch.no_grad()
def test_pair_wise():
    module, x, other = build(PairWise), torch.randn(2, 4, 12).double(), torch.randn(2, 3, 12).double()
    real, own = torch.tensor([[True] * 3, [True, True, False]]), torch.tensor([[True] * 4, [True] * 3 + [False]])
    output = module(x, other, mask=real, own=own).output
    keys = torch.cat([x[1, :3], other[1, :2]])
    for i in range(3):
        torch.testing.assert_close(output[1, i], row(module.attention, x[1, i], keys))
        torch.testing.assert_close(module(x[:, :3]).output[1, i], row(module.attention, x[1, i], x[1, :3]))
    weights = module(x, other, need_weights=True).weights
    assert weights.shape == (2, 3, 4, 3)
    assert bool((weights.sum(-1) < 1).all())


def test_rollout_is_row_zero_of_the_product():
    layers = [torch.rand(2, 3, 5, 5).double().softmax(-1) for _ in range(3)]
    product = torch.eye(5).double()
    for layer in layers:
        product = (layer.mean(1) + torch.eye(5).double()) / 2 @ product
    torch.testing.assert_close(attention_rollout(layers), product[:, 0])
    with pytest.raises(ValueError, match="no weights"):
        attention_rollout([])


def test_nobody_is_paired_with_itself():
    for seed in range(20):
        partner = paired(5, torch.Generator().manual_seed(seed))
        assert sorted(partner.tolist()) == list(range(5))
        assert not bool((partner == torch.arange(5)).any())
    with pytest.raises(ValueError, match="batch of 1"):
        paired(1)


def test_refusals():
    x = torch.randn(1, 4, 12).double()
    with pytest.raises(ValueError, match="ratio=0"):
        build(GlobalLocal, ratio=0.0)
    with pytest.raises(ValueError, match="rollout is"):
        build(GlobalLocal)(x, rollout=torch.rand(4))
    with pytest.raises(ValueError, match="own"):
        build(PairWise)(x, own=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="own is"):
        build(PairWise)(x, x, own=torch.ones(1, 3, dtype=torch.bool))
