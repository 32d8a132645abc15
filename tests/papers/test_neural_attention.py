"""Neural Attention: the network on each concatenated pair, slices of rows, and the layout of the released code."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.scoring import neural_attention
from manyheads.mechanisms.scoring.neural_attention import NeuralAttention

close = torch.testing.assert_close


def pair_score(module: NeuralAttention, q: Tensor, k: Tensor) -> float:
    """w3 . relu(W2 relu(W1 [q'; k'] + b1) + b2) for one query [d] and one key [d]."""
    reduced = [layer.weight @ t + layer.bias for layer, t in ((module.query_in, q), (module.key_in, k))]
    hidden = torch.relu(module.first.weight @ torch.cat(reduced) + module.first.bias)
    hidden = torch.relu(module.second.weight @ hidden + module.second.bias)
    return float(module.third.weight[0] @ hidden)


def loops(module: NeuralAttention, x: Tensor, source: Tensor, causal: bool) -> Tensor:
    d = module.head_dim
    q, k, v = (x @ module.q_proj.weight.T, source @ module.k_proj.weight.T, source @ module.v_proj.weight.T)
    mixed = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for head in range(module.heads):
            part = slice(head * d, (head + 1) * d)
            for i in range(x.shape[1]):
                seen = range(i + 1 if causal else source.shape[1])
                powers = [math.exp(pair_score(module, q[b, i, part], k[b, j, part])) for j in seen]
                for j, power in zip(seen, powers, strict=True):
                    mixed[b, i, part] += power / sum(powers) * v[b, j, part]
    return mixed @ module.o_proj.weight.T


def _module(causal: bool = False, **settings: int) -> NeuralAttention:
    """Weights large enough for scores that matter."""
    torch.manual_seed(0)
    module = NeuralAttention(12, 3, causal=causal, **settings).double()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "proj" not in name:
                weight.normal_()
    return module


@pytest.mark.parametrize("width", [2, 5, 6])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(causal: bool, width: int) -> None:
    module, x = _module(causal, score_dim=width), torch.randn(2, 5, 12, dtype=torch.float64)
    result = module(x, need_weights=True)
    close(result.output, loops(module, x, x, causal), rtol=1e-11, atol=1e-11)
    assert result.weights.std() > 0.02, "the scores must tell keys apart for this test to mean anything"


@torch.no_grad()
def test_cross_equals_loops() -> None:
    module, x = _module(score_dim=4), torch.randn(2, 3, 12, dtype=torch.float64)
    context = torch.randn(2, 6, 12, dtype=torch.float64)
    close(module(x, context).output, loops(module, x, context, False), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_equals_the_released_layout() -> None:
    """Released checkpoints order the rows of one projection as (feature, q k v, head); the result is the same."""
    module, x = _module(score_dim=4), torch.randn(2, 5, 12, dtype=torch.float64)
    weights = torch.stack([p.weight for p in (module.q_proj, module.k_proj, module.v_proj)])
    fused = weights.unflatten(1, (3, 4)).permute(2, 0, 1, 3).flatten(0, 2)
    q, k, v = (x @ fused.T).unflatten(-1, (4, 3, 3)).permute(3, 0, 4, 1, 2)
    pairs = torch.cat(
        [
            module.query_in(q)[:, :, :, None].expand(-1, -1, -1, 5, -1),
            module.key_in(k)[:, :, None].expand(-1, -1, 5, -1, -1),
        ],
        -1,
    )
    scores = module.third(module.second(module.first(pairs).relu()).relu()).squeeze(-1) + 0.7  # a bias changes nothing
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
    close(module(x).output, mixed @ module.o_proj.weight.T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("hidden", [1, 500, 10**9])
def test_slices_change_nothing_and_bound_what_is_held(monkeypatch: pytest.MonkeyPatch, hidden: int) -> None:
    module, x = _module(True, score_dim=4), torch.randn(2, 20, 12, dtype=torch.float64, requires_grad=True)
    wanted = module(x).output
    grads = torch.autograd.grad(wanted.square().sum(), [x, *module.parameters()])
    monkeypatch.setattr(neural_attention, "HIDDEN", hidden)
    sizes = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        got = module(x).output
    close(got, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(got.square().sum(), [x, *module.parameters()]), grads, strict=True):
        close(one, other, rtol=1e-10, atol=1e-10)
    pairs = 2 * 3 * 20 * 20
    assert (max(sizes) > pairs) == (hidden == 10**9)


def test_defaults_and_refusals() -> None:
    assert NeuralAttention(256, 2).score_dim == 4
    assert NeuralAttention(64, 4).score_dim == 2
    with pytest.raises(ValueError, match="score_dim=1 must be at least 2"):
        NeuralAttention(64, 4, score_dim=1)
