"""Label-dependent attention against loops over words, labels and the filter's places."""

import pytest
import torch

from manyheads.mechanisms.pooling.label_dependent import LabelDependent


def build(**config):
    torch.manual_seed(0)
    module = LabelDependent(6, **{"labels": 4, "ngram": 3, **config}).double()
    with torch.no_grad():
        module.filter.add_(0.3 * torch.randn_like(module.filter))
        module.filter_bias.fill_(-0.1)
    return module


def by_loops(module, x, real):
    n, r = len(x), len(module.filter) // 2

    def project(vector):
        return module.joint.weight @ vector + module.joint.bias

    score = {}
    for t in range(n):
        best = 0.0
        for label in module.labels:
            u = module.filter_bias[0].clone()
            for k in range(-r, r + 1):
                if 0 <= t + k < n and real[t + k]:
                    u += module.filter[k + r] * (project(x[t + k]) * project(label)).sum() / 6**0.5
            best = max(best, float(u))
        if real[t]:
            score[t] = torch.tensor(best).double().exp()
    total = sum(score.values())
    return project(sum(s / total * x[t] for t, s in score.items()))


@torch.no_grad()
def test_equation():
    module, x = build(), torch.randn(2, 7, 6).double()
    real = torch.tensor([[True] * 7, [True, True, False, True, True, False, False]])
    result = module(x, mask=real, need_weights=True)
    for row in range(2):
        torch.testing.assert_close(result.output[row], by_loops(module, x[row], real[row]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, 1, 1).double())


@torch.no_grad()
def test_a_filter_wider_than_the_text_and_a_zero_filter():
    module, x = build(ngram=9), torch.randn(2, 2, 6).double()
    torch.testing.assert_close(module(x).output[0], by_loops(module, x[0], [True, True]), rtol=1e-6, atol=1e-6)
    module.filter.zero_()
    torch.testing.assert_close(module(x).output, module.joint(x.mean(1)))  # no label fits better: the mean


@torch.no_grad()
def test_words_that_fit_no_label_weigh_the_same():
    module, x = build(), torch.randn(2, 7, 6).double()
    module.filter_bias.fill_(-2.0)  # many words fit no label now
    result = module(x, need_weights=True)
    assert (result.weights == result.weights.amin(-1, keepdim=True)).sum() > 4
    torch.testing.assert_close(result.output[0], by_loops(module, x[0], [True] * 7), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_word_that_a_label_names_weighs_most():
    module, x = build(ngram=1), torch.randn(1, 7, 6).double()
    module.filter.fill_(1.0)
    module.joint.weight.copy_(torch.eye(6))
    module.joint.bias.zero_()
    module.labels[2] = 20 * x[0, 4]
    assert module(x, need_weights=True).weights.argmax() == 4


def test_refuses_heads_and_even_windows():
    with pytest.raises(ValueError, match="heads=1"):
        LabelDependent(6, 2)
    with pytest.raises(ValueError, match="odd"):
        LabelDependent(6, ngram=4)
