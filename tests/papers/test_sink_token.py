"""A learnable sink (arXiv:2309.17453): where it is put, that padding and streams see it as told, that it learns."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from manyheads.shrink import StreamingLLM
from manyheads.training import add_sink_token, with_sink_token


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=20, max_position_embeddings=64, **sizes, bos_token_id=None, eos_token_id=None)
    return LlamaForCausalLM(config).eval()


def test_it_stands_before_the_first_real_token() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0], [1, 2, 3, 4], [0, 0, 0, 0]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 5, 6], [7, 8, 9, -100], [1, 2, 3, 4], [-100] * 4]),
        "position_ids": torch.tensor([[0, 0, 0, 1], [0, 1, 2, 2], [0, 1, 2, 3], [0, 0, 0, 0]]),
    }
    found = with_sink_token(batch, 99)
    assert found["input_ids"].tolist() == [[0, 0, 99, 5, 6], [99, 7, 8, 9, 0], [99, 1, 2, 3, 4], [99, 0, 0, 0, 0]]
    assert found["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1] * 5, [0] * 5]
    assert found["labels"].tolist() == [
        [-100, -100, -100, 5, 6], [-100, 7, 8, 9, -100], [-100, 1, 2, 3, 4], [-100] * 5,
    ]  # fmt: skip
    assert found["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3], [0, 1, 2, 3, 4], [0, 1, 1, 1, 1]]
    assert with_sink_token({"input_ids": batch["input_ids"][2:3]}, 99)["input_ids"].tolist() == [[99, 1, 2, 3, 4]]


def test_a_padded_row_is_the_row_alone() -> None:
    model = small()
    sink = add_sink_token(model)
    assert (sink, model.get_input_embeddings().num_embeddings) == (20, 21)
    ids = torch.randint(20, (1, 6))
    padded = {"input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)}
    padded["attention_mask"] = torch.tensor([[0] * 3 + [1] * 6])
    alone = model(**with_sink_token({"input_ids": ids}, sink)).logits
    beside = with_sink_token(padded, sink)
    beside["position_ids"] = (beside["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert_close(model(**beside).logits[:, 3:], alone)
    assert_close(model(torch.cat([torch.tensor([[sink]]), ids], 1)).logits, alone)


def test_it_learns_and_is_never_generated() -> None:
    model = small()
    sink = add_sink_token(model)
    ids = torch.randint(20, (2, 8))
    model(**with_sink_token({"input_ids": ids, "labels": ids}, sink)).loss.backward()
    assert model.get_input_embeddings().weight.grad[sink].abs().sum() > 0
    with torch.no_grad():
        model.lm_head.weight[sink] = 100 * model.lm_head.weight[0]
        model.lm_head.weight[sink] -= 50 * model.lm_head.weight.mean(0)
    for _ in range(3):
        drawn = model.generate(torch.randint(20, (2, 4)), max_new_tokens=4, do_sample=True, pad_token_id=0)
        assert not bool((drawn == sink).any())


def test_a_stream_keeps_it_alone() -> None:
    """Of nine tokens a budget of four leaves the sink and the last three."""
    model = small()
    sink = add_sink_token(model)
    prompt = with_sink_token({"input_ids": torch.randint(20, (1, 8))}, sink)
    policy = StreamingLLM(budget_tokens=4, sink_size=1, positions="text")
    cache, whole = policy.make_cache(model), DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompt, past_key_values=cache)
        model(**prompt, past_key_values=whole)
        token = torch.tensor([[3]])
        found = model(token, past_key_values=cache, position_ids=torch.tensor([[9]])).logits
        for layer in whole.layers:
            layer.keys, layer.values = (rows[:, :, [0, 7, 8]] for rows in (layer.keys, layer.values))
        wanted = model(token, past_key_values=whole, position_ids=torch.tensor([[9]])).logits
    assert_close(found, wanted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_type_ids": torch.zeros(1, 4, dtype=torch.long)}, "of the rest only"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "want all of one shape"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "positions start again"),
        ({"input_ids": torch.tensor([[9, 1, 2, 3]])}, "hold the sink, 9, already"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "want all of one shape"),
    ],
)
def test_refuses(changes: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        with_sink_token({"input_ids": torch.tensor([[1, 2, 3, 4]]), **changes}, 9)
    with pytest.raises(ValueError, match="predicts no next token"):
        add_sink_token(small().model)
