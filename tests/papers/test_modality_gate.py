"""PILL's modality gate against loops, and what it is at first."""

import pytest
import torch

from manyheads.mechanisms.cross.modality_gate import ModalityGate
from manyheads.mechanisms.plain.softmax import Softmax

KINDS = [0, 1, 1, 0, 2, 0]  # text, image, image, text, sound, text


def build(**config):
    torch.manual_seed(0)
    return ModalityGate(12, 3, **config).double().eval()


def tokens():
    torch.manual_seed(1)
    return torch.randn(1, len(KINDS), 12).double()


def told(kinds=KINDS):
    return {"token_kinds": torch.tensor([kinds])}


def by_loops(module, x):
    out = []
    for i in range(len(x)):
        mixed = torch.zeros(12, dtype=x.dtype)
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            q = module.q_proj.weight[part] @ x[i]
            last = i + 1 if module.causal else len(x)
            scores = [(q @ (module.k_proj.weight[part] @ x[j]) / 2).exp() for j in range(last)]
            for j in range(last):
                gate = 1.0 if KINDS[j] == 0 else torch.tanh(module.gate.weight[h] @ x[j])
                mixed[part] += scores[j] / sum(scores) * gate * (module.v_proj.weight[part] @ x[j])
        out.append(module.o_proj.weight @ mixed)
    return torch.stack(out)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equation(causal):
    module, x = build(causal=causal), tokens()
    module.gate.weight.normal_()
    torch.testing.assert_close(module(x, **told()).output[0], by_loops(module, x[0]))


@torch.no_grad()
def test_at_first_others_have_values_of_zero_and_still_take_weight():
    module, plain = build(), Softmax(12, 3).double()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("gate")})
    x = tokens()
    weights = plain(x, need_weights=True).weights
    torch.testing.assert_close(module(x, need_weights=True, **told()).weights, weights)
    values = plain.v_proj(x) * torch.tensor(KINDS).eq(0)[None, :, None]
    wanted = plain.o_proj((weights @ values.unflatten(-1, (3, 4)).transpose(1, 2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, **told()).output, wanted)


@torch.no_grad()
def test_text_alone_is_plain_attention():
    module, plain, x = build(causal=True), Softmax(12, 3, causal=True).double(), tokens()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("gate")})
    torch.testing.assert_close(module(x, **told([0] * 6)).output, plain(x).output)


def test_refusals():
    module, x = build(), tokens()
    for given, words in (
        ({}, r"\['token_kinds'\] missing"),
        (told([0, 1, 1, 0, -2, 0]), "token_kinds go from -2 to 1; want 0 or more"),
        (told(KINDS[1:]), r"torch.int64 \[1, 5\] on cpu; want integers \[1, 6\]"),
    ):
        with pytest.raises(ValueError, match=words):
            module(x, **given)
