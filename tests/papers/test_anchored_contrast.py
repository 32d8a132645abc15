"""MoRE's contrast against loops, its rows without a modality, and three encoders that meet at the text."""

import math

import pytest
import torch
from torch import nn

from manyheads.training import anchored_contrast


def by_loops(anchor, others, tau, present):
    total = 0.0
    for other, real in zip(others, present, strict=True):
        rows = [i for i in range(len(anchor)) if real[i]]
        cos = {
            (i, j): float(anchor[i] @ other[j] / anchor[i].norm() / other[j].norm()) / tau for i in rows for j in rows
        }
        for i in rows:
            there = math.log(sum(math.exp(cos[i, j]) for j in rows)) - cos[i, i]
            back = math.log(sum(math.exp(cos[j, i]) for j in rows)) - cos[i, i]
            total += (there + back) / 2 / len(rows)
    return total


def test_equation_by_loops():
    anchor, xray, ecg = torch.randn(3, 5, 6).double()
    present = [[True, False, True, True, True], [True, True, False, False, True]]
    found = anchored_contrast(anchor, [xray, ecg], temperature=0.3, present=[torch.tensor(each) for each in present])
    assert float(found) == pytest.approx(by_loops(anchor, [xray, ecg], 0.3, present))
    found = anchored_contrast(anchor, [xray, ecg], temperature=0.3, present=[None, torch.tensor(present[1])])
    assert float(found) == pytest.approx(by_loops(anchor, [xray, ecg], 0.3, [[True] * 5, present[1]]))
    assert anchored_contrast(anchor, [xray], present=[torch.zeros(5, dtype=torch.bool)]) == 0


def test_three_encoders_meet_at_the_text_and_the_temperature_learns():
    """Image and signal are never compared, and find each other all the same."""
    torch.manual_seed(0)
    encoders, log_tau = [nn.Linear(12, 8) for _ in range(3)], nn.Parameter(torch.tensor(0.1).log())
    optimiser = torch.optim.Adam([*(p for each in encoders for p in each.parameters()), log_tau], 1e-2)
    views = [torch.randn(4, 12) for _ in range(3)]

    def pairs(rows):
        cause = torch.randn(rows, 4)
        return [
            encode(cause @ view + 0.1 * torch.randn(rows, 12)) for encode, view in zip(encoders, views, strict=True)
        ]

    def retrieved():
        with torch.no_grad():
            _, image, signal = (nn.functional.normalize(each, dim=-1) for each in pairs(32))
            return ((image @ signal.T).argmax(1) == torch.arange(32)).double().mean()

    before = retrieved()
    for _ in range(80):
        text, image, signal = pairs(32)
        loss = anchored_contrast(text, [image, signal], temperature=log_tau.exp())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert before < 0.3
    assert retrieved() > 0.8
    assert abs(log_tau.exp().item() - 0.1) > 1e-3


def test_refusals_and_half_precision():
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match="one width"):
        anchored_contrast(x, [torch.randn(4, 5)])
    with pytest.raises(ValueError, match="temperature=0"):
        anchored_contrast(x, [x], temperature=0.0)
    with pytest.raises(ValueError, match="0 other"):
        anchored_contrast(x, [])
    assert anchored_contrast(x.bfloat16(), [x.bfloat16()]).dtype == torch.float32
