"""What goes in as users have it: rows of several packed texts, adapters that were given no task."""

from __future__ import annotations

import pytest
import torch
from tiny_families import prompt, tiny
from torch.testing import assert_close

from manyheads.explain.attributions import METHODS, compare_attributions, leave_one_out


def test_packed_texts_are_not_joined_by_a_mask() -> None:
    model, first, second = tiny("llama"), prompt(1, 5), prompt(1, 6, seed=2)
    packed = {"input_ids": torch.cat([first, second], 1), "position_ids": torch.tensor([[*range(5), *range(6)]])}
    with pytest.raises(ValueError, match="packed"):
        leave_one_out(model, packed, 5)
    found, alone = (leave_one_out(model, own, 5, remove="zero")[0] for own in (packed, second))
    assert float(found[:5].abs().max()) < 1e-5
    assert_close(found[5:], alone, atol=1e-5, rtol=1e-4)
    plain = {"input_ids": second, "position_ids": torch.arange(6)[None]}
    assert_close(leave_one_out(model, plain, 5), leave_one_out(model, second, 5), atol=1e-5, rtol=1e-4)


# peft asks the library by a name that its newest release has marked as old.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_without_a_task_is_called_as_the_model_within() -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    model, ids = get_peft_model(tiny("llama"), settings).eval(), prompt(1, 7)
    for name in ("relevance", "rollout", "input-gradient"):
        given = METHODS[name](model, None).attribute(ids, 5)
        assert_close(given, METHODS[name](model.get_base_model(), None).attribute(ids, 5), atol=1e-6, rtol=1e-5)
    vectors = model.get_input_embeddings()(ids).detach().requires_grad_()
    slope = torch.autograd.grad(model(inputs_embeds=vectors).logits[0, -1, 5], vectors)[0]
    found = METHODS["input-gradient"](model, None).attribute(ids, 5)
    assert_close(found, (vectors * slope).sum(-1), atol=1e-5, rtol=1e-4)
    rows = [compare_attributions(own, ids, 5, ["rollout"], steps=3).rows[0] for own in (model, model.get_base_model())]
    assert rows[0].deletion == pytest.approx(rows[1].deletion, rel=1e-4)
