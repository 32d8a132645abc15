"""PILL's modality gate against loops, and what it is at first."""

import pytest
import torch

from manyheads.mechanisms.cross.modality_gate import ModalityGate
from manyheads.mechanisms.plain.softmax import Softmax

KINDS = [0, 1, 1, 0, 2, 0]  # text, image, image, text, sound, text


def build(**config):
    torch.manual_seed(0)
    return ModalityGate(15, 3, kinds=3, **config).double().eval()


def marked(kinds=KINDS):
    torch.manual_seed(1)
    return torch.cat([torch.randn(len(kinds), 12), torch.eye(3)[kinds]], -1).double()[None]


def by_loops(module, x):
    content, kind, out = x[:, :12], x[:, 12:], []
    for i in range(len(x)):
        mixed = torch.zeros(12, dtype=x.dtype)
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            q = module.q_proj.weight[part] @ content[i]
            last = i + 1 if module.causal else len(x)
            scores = [(q @ (module.k_proj.weight[part] @ content[j]) / 2).exp() for j in range(last)]
            for j in range(last):
                gate = 1.0 if kind[j, 0] == 1 else torch.tanh(module.gate.weight[h] @ content[j])
                mixed[part] += scores[j] / sum(scores) * gate * (module.v_proj.weight[part] @ content[j])
        out.append(torch.cat([module.o_proj.weight @ mixed, torch.zeros(3).double()]))
    return torch.stack(out)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equation(causal):
    module, x = build(causal=causal), marked()
    module.gate.weight.normal_()
    torch.testing.assert_close(module(x).output[0], by_loops(module, x[0]))


@torch.no_grad()
def test_at_first_others_have_values_of_zero_and_still_take_weight():
    module, plain = build(), Softmax(12, 3).double()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("gate")})
    x = marked()
    weights = plain(x[..., :12], need_weights=True).weights
    torch.testing.assert_close(module(x, need_weights=True).weights, weights)
    values = plain.v_proj(x[..., :12]) * torch.tensor(KINDS).eq(0)[None, :, None]
    wanted = plain.o_proj((weights @ values.unflatten(-1, (3, 4)).transpose(1, 2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x).output[..., :12], wanted)


@torch.no_grad()
def test_text_alone_is_plain_attention():
    module, plain, x = build(causal=True), Softmax(12, 3, causal=True).double(), marked([0] * 6)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("gate")})
    torch.testing.assert_close(module(x).output[..., :12], plain(x[..., :12]).output)


def test_refusals():
    with pytest.raises(ValueError, match="kinds=1"):
        ModalityGate(15, 3, kinds=1)
    with pytest.raises(ValueError, match="want at least heads=3"):
        ModalityGate(5, 3, kinds=3)


@torch.no_grad()
def test_what_heads_do_not_divide_is_rounded_down():
    module, x = ModalityGate(16, 4, kinds=3).double(), torch.randn(1, 5, 16).double()
    assert module.q_proj.weight.shape == (12, 13)
    result = module(x, need_weights=True)
    assert result.weights.shape == (1, 4, 5, 5)
    torch.testing.assert_close(result.output[..., 13:], torch.zeros(1, 5, 3).double())
