"""Mixture-of-Transformers against loops, and against plain attention where all modalities are alike."""

import pytest
import torch

from manyheads.mechanisms.cross.mixture_of_transformers import MixtureOfTransformers
from manyheads.mechanisms.plain.softmax import Softmax

KINDS = [0, 2, 1, 1, 0, 2, 0]


def build(**config):
    torch.manual_seed(0)
    module = MixtureOfTransformers(12, 3, modalities=3, **config).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def tokens():
    torch.manual_seed(1)
    return torch.randn(2, 7, 12).double()


def kinds(rows=2):
    return torch.tensor(KINDS).expand(rows, -1)


def rms(row, gain):
    return row / (row.square().mean() + 1e-5).sqrt() * gain


def by_loops(module, x):
    n = len(x)
    q, k, v = ([x[i] @ module.qkv[KINDS[i]][:, 12 * s : 12 * s + 12] for i in range(n)] for s in range(3))
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
        rows.append(row if module.norm is None else rms(row, module.norm[KINDS[i]]))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norms", [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_equation(causal, norms):
    module, x = build(causal=causal, norm=norms[0], qk_norm=norms[1]), tokens()
    torch.testing.assert_close(module(x, token_kinds=kinds()).output[1], by_loops(module, x[1]))


@torch.no_grad()
def test_modalities_that_are_alike_are_plain_attention():
    module, plain, x = build(causal=True, norm=False), Softmax(12, 3, causal=True).double(), tokens()
    for weight in (module.qkv, module.out):
        weight.copy_(weight[:1].expand_as(weight))
    for projection, weight in zip((plain.q_proj, plain.k_proj, plain.v_proj), module.qkv[0].chunk(3, 1), strict=True):
        projection.weight.copy_(weight.T)
    plain.o_proj.weight.copy_(module.out[0].T)
    torch.testing.assert_close(module(x, token_kinds=kinds()).output, plain(x).output)


def test_a_modality_that_is_absent_is_not_trained():
    here = [0, 2, 3, 4, 6]  # no token of modality 2
    module, x = build(), tokens()[:, here]
    module(x, token_kinds=kinds()[:, here]).output.square().sum().backward()
    for parameter in (module.qkv, module.out, module.norm):
        assert parameter.grad[:2].abs().flatten(1).sum(1).min() > 0
        torch.testing.assert_close(parameter.grad[2], torch.zeros_like(parameter[2]))


@torch.no_grad()
def test_of_padding_no_kind_is_asked():
    module, x = build(), tokens()
    real = torch.tensor([[False] * 2 + [True] * 5, [True] * 7])
    strange = kinds().masked_fill(~real, -100)
    wanted = module(x[:1, 2:], token_kinds=kinds(1)[:, 2:]).output
    torch.testing.assert_close(module(x, mask=real, token_kinds=strange).output[:1, 2:], wanted)


def test_refusals():
    with pytest.raises(ValueError, match="modalities=1"):
        MixtureOfTransformers(12, 3, modalities=1)
    module, x = build(), tokens()
    with pytest.raises(ValueError, match=r"\['token_kinds'\] missing"):
        module(x)
    for given, told in (
        (kinds() + 1, "token_kinds go from 1 to 3; want 0 to 2"),
        (kinds() - 1, "token_kinds go from -1 to 1; want 0 to 2"),
        (kinds(1), r"token_kinds are torch.int64 \[1, 7\] on cpu; want integers \[2, 7\]"),
        (kinds().double(), "token_kinds are torch.float64"),
        (KINDS, r"token_kinds are \[0, 2, 1"),
    ):
        with pytest.raises(ValueError, match=told):
            module(x, token_kinds=given)
