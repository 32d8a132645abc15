"""Mixture-of-Transformers against loops, and against plain attention where all modalities are alike."""

import pytest
import torch

from manyheads.mechanisms.cross.mixture_of_transformers import MixtureOfTransformers
from manyheads.mechanisms.plain.softmax import Softmax

KINDS = [0, 2, 1, 1, 0, 2, 0]


def build(**config):
    torch.manual_seed(0)
    module = MixtureOfTransformers(15, 3, modalities=3, **config).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def marked():
    torch.manual_seed(1)
    return torch.cat([torch.randn(2, 7, 12), torch.eye(3)[KINDS].expand(2, -1, -1)], -1).double()


def rms(row, gain):
    return row / (row.square().mean() + 1e-5).sqrt() * gain


def by_loops(module, x):
    n, content = len(x), x[:, :12]
    q, k, v = ([content[i] @ module.qkv[KINDS[i]][:, 12 * s : 12 * s + 12] for i in range(n)] for s in range(3))
    rows = []
    for i in range(n):
        mixed = torch.zeros(12, dtype=x.dtype)
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            last = i + 1 if module.causal else n
            asks, keys = q[i][part], [k[j][part] for j in range(last)]
            if module.qk_norm is not None:
                asks = rms(asks, module.qk_norm[0, KINDS[i]])
                keys = [rms(key, module.qk_norm[1, KINDS[j]]) for j, key in enumerate(keys)]
            scores = [(asks @ key / 2).exp() for key in keys]
            for j in range(last):
                mixed[part] += scores[j] / sum(scores) * v[j][part]
        row = mixed @ module.out[KINDS[i]]
        row = row if module.norm is None else rms(row, module.norm[KINDS[i]])
        rows.append(torch.cat([row, torch.zeros(3).double()]))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norms", [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_equation(causal, norms):
    module, x = build(causal=causal, norm=norms[0], qk_norm=norms[1]), marked()
    torch.testing.assert_close(module(x).output[1], by_loops(module, x[1]))


@torch.no_grad()
def test_modalities_that_are_alike_are_plain_attention():
    module, plain, x = build(causal=True, norm=False), Softmax(12, 3, causal=True).double(), marked()
    for weight in (module.qkv, module.out):
        weight.copy_(weight[:1].expand_as(weight))
    for projection, weight in zip((plain.q_proj, plain.k_proj, plain.v_proj), module.qkv[0].chunk(3, 1), strict=True):
        projection.weight.copy_(weight.T)
    plain.o_proj.weight.copy_(module.out[0].T)
    torch.testing.assert_close(module(x).output[..., :12], plain(x[..., :12]).output)


def test_a_modality_that_is_absent_is_not_trained():
    module, x = build(), marked()[:, [0, 2, 3, 4, 6]]  # no token of modality 2
    module(x).output.square().sum().backward()
    for parameter in (module.qkv, module.out, module.norm):
        assert parameter.grad[:2].abs().flatten(1).sum(1).min() > 0
        torch.testing.assert_close(parameter.grad[2], torch.zeros_like(parameter[2]))


def test_refusals():
    with pytest.raises(ValueError, match="modalities=1"):
        MixtureOfTransformers(15, 3, modalities=1)
    with pytest.raises(ValueError, match="want at least heads=4"):
        MixtureOfTransformers(6, 4, modalities=3)
