"""Composite attention against loops, and as the text rows of attention over images and text end to end."""

import pytest
import torch

from manyheads.functional.grouped import attend_rows
from manyheads.mechanisms.cross import ee_mllm
from manyheads.mechanisms.cross.ee_mllm import CompositeAttention
from manyheads.mechanisms.plain.softmax import Softmax


def build(**config):
    torch.manual_seed(0)
    return CompositeAttention(12, 3, **config).double().eval()


def by_loops(module, text, images, real):
    rows = []
    for i in range(len(text)):
        seen = [image for image, there in zip(images, real, strict=True) if there] + list(text[: i + 1])
        mixed = torch.zeros(12, dtype=text.dtype)
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            q = module.q_proj.weight[part] @ text[i]
            scores = [(q @ (module.k_proj.weight[part] @ token) / 2).exp() for token in seen]
            for token, score in zip(seen, scores, strict=True):
                mixed[part] += score / sum(scores) * (module.v_proj.weight[part] @ token)
        rows.append(module.o_proj.weight @ mixed)
    return torch.stack(rows)


@torch.no_grad()
def test_equation():
    module, text, images = build(), torch.randn(2, 5, 12).double(), torch.randn(2, 4, 12).double()
    real = torch.tensor([[True] * 4, [True, False, True, False]])
    for need_weights in (False, True):
        found = module(text, images, mask=real, need_weights=need_weights).output
        for row in range(2):
            torch.testing.assert_close(found[row], by_loops(module, text[row], images[row], real[row]))


@pytest.mark.parametrize("rotary", [None, {"base": 100.0}])
@torch.no_grad()
def test_text_rows_of_causal_attention_end_to_end(rotary):
    """Images before the text: what the text sees is the same as in a language model that has them in its sequence."""
    module, plain = build(rotary=rotary), Softmax(12, 3, causal=True, rotary=rotary).double()
    plain.load_state_dict(module.state_dict())
    text, images = torch.randn(2, 5, 12).double(), torch.randn(2, 4, 12).double()
    whole = plain(torch.cat([images, text], 1), need_weights=True)
    found = module(text, images, need_weights=True)
    torch.testing.assert_close(found.output, whole.output[:, 4:])
    torch.testing.assert_close(found.weights, whole.weights[:, :, 4:, :4])


@torch.no_grad()
def test_decoding_reads_images_once():
    module, text, images = build(rotary={}), torch.randn(2, 6, 12).double(), torch.randn(2, 4, 12).double()
    wanted, state = module(text, images).output, module.init_state(2)
    parts = [module(text[:, :3], images, state=state).output]
    parts += [module(text[:, i : i + 1], torch.zeros_like(images), state=state).output for i in range(3, 6)]
    torch.testing.assert_close(torch.cat(parts, 1), wanted)
    with pytest.raises(ValueError, match="start a new state"):
        module(text[:, :1], images[:, :2], state=state)


@torch.no_grad()
def test_a_step_copies_no_keys(monkeypatch):
    module, text, images = build(), torch.randn(2, 6, 12).double(), torch.randn(2, 4, 12).double()
    state, read = module.init_state(2), []
    monkeypatch.setattr(
        ee_mllm, "attend_rows", lambda q, k, v, *a, **kw: read.append((k, v)) or attend_rows(q, k, v, *a, **kw)
    )
    for i in range(6):
        module(text[:, i : i + 1], images, state=state)
    for held, name in zip(read[-1], ("keys", "values"), strict=True):
        assert held.shape[2] == 10
        assert held.untyped_storage().data_ptr() == state.grown[name].data.untyped_storage().data_ptr()


@torch.no_grad()
def test_padded_images_take_up_no_place():
    module, text, images = build(rotary={"base": 100.0}), torch.randn(1, 5, 12).double(), torch.randn(1, 4, 12).double()
    real = torch.tensor([[True, False, True, False]])
    wanted = module(text, images[:, [0, 2]]).output
    torch.testing.assert_close(module(text, images, mask=real).output, wanted)
    state = module.init_state(1)
    parts = [module(text[:, i : i + 1], images, mask=real, state=state).output for i in range(5)]
    torch.testing.assert_close(torch.cat(parts, 1), wanted)
