"""EIT (arXiv:2212.10197) against loops over pairs of tokens and of heads."""

import math

import pytest
import torch
from torch import Tensor

from manyheads.mechanisms.mixing.eit import EnhancedMultiHead
from manyheads.mechanisms.plain.softmax import Softmax

H, D = 3, 4


def score(module: EnhancedMultiHead, q: Tensor, k: Tensor) -> list[float]:
    """q, k [H, D] of one pair of tokens -> one score per head."""
    inner, within = module.inner_in.out_channels // H, []
    for i in range(H):
        maps = torch.stack([q[i] @ k[j] for j in range(H)]) / math.sqrt(D)
        own = slice(i * inner, (i + 1) * inner)
        hidden = (module.inner_in.weight[own, :, 0, 0] @ maps + module.inner_in.bias[own]).clamp(min=0)
        within.append(module.inner_out.weight[i, :, 0, 0] @ hidden + module.inner_out.bias[i])
    hidden = (module.cross_in.weight[:, :, 0, 0] @ torch.stack(within) + module.cross_in.bias).clamp(min=0)
    return (module.cross_out.weight[:, :, 0, 0] @ hidden).tolist()


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_loops(causal: bool) -> None:
    module = EnhancedMultiHead(12, H, inner=2, cross=5, causal=causal).double()
    x = torch.randn(6, 12, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (H, D)) for p in (module.q_proj, module.k_proj, module.v_proj))
    rows = []
    for i in range(6):
        seen = range(i + 1 if causal else 6)
        scores = [score(module, q[i], k[j]) for j in seen]
        mixed = []
        for h in range(H):
            terms = [math.exp(row[h]) for row in scores]
            mixed.append(sum(t / sum(terms) * v[j, h] for t, j in zip(terms, seen, strict=True)))
        rows.append(module.o_proj.weight @ torch.cat(mixed))
    torch.testing.assert_close(module(x[None]).output[0], torch.stack(rows))


@torch.no_grad()
def test_networks_that_pass_the_own_map_on_are_multi_head_attention() -> None:
    """relu(s) - relu(-s) = s, so that two hidden features per map carry it through each network unchanged."""
    module, plain = EnhancedMultiHead(12, H, inner=2, cross=2 * H).double(), Softmax(12, H).double()
    for layer in (module.inner_in, module.inner_out, module.cross_in, module.cross_out):
        for parameter in layer.parameters():
            parameter.zero_()
    for h in range(H):
        for side, sign in enumerate((1.0, -1.0)):
            module.inner_in.weight[2 * h + side, h, 0, 0] = sign
            module.inner_out.weight[h, side, 0, 0] = sign
            module.cross_in.weight[2 * h + side, h, 0, 0] = sign
            module.cross_out.weight[h, 2 * h + side, 0, 0] = sign
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k.endswith("proj.weight")})
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x).output, plain(x).output)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="inner=0"):
        EnhancedMultiHead(12, H, inner=0)
