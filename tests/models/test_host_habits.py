"""Calls as people make them of transformers' own models: the same checkpoint in ours gives the same."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from manyheads.convert.hosted import hosted

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HOSTS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
}
GREEDY: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
LEAST = torch.finfo(torch.float32).min


def drawn(rows: int, n: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, (rows, n), generator=torch.Generator().manual_seed(seed))


def left_padded() -> dict[str, Tensor]:
    ids = drawn(3, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :7] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def real(values: Tensor) -> Tensor:
    return values[left_padded()["attention_mask"].bool()]


def second_turn(model: Any) -> Tensor:
    first = left_padded()
    out = model.generate(**first, return_dict_in_generate=True, **GREEDY)
    ids = torch.cat([out.sequences, drawn(3, 5, 3)], 1)
    mask = torch.ones_like(ids)
    mask[:, :12] = first["attention_mask"]
    return model.generate(ids, attention_mask=mask, past_key_values=out.past_key_values, **GREEDY)


def sampled(model: Any) -> Tensor:
    torch.manual_seed(5)
    return model.generate(
        **left_padded(), num_return_sequences=2, **{**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}
    )


def scores(model: Any) -> Tensor:
    out = model.generate(
        **left_padded(), num_beams=2, output_scores=True, return_dict_in_generate=True, **GREEDY
    )  # fmt: skip
    return torch.stack(out.scores)


def added_mask(model: Any) -> Tensor:
    mask = torch.full((2, 1, 8, 8), LEAST).triu(1)
    mask[1, :, 3:, 2] = LEAST
    return model(drawn(2, 8), attention_mask=mask).logits


def boolean_mask(model: Any) -> Tensor:
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    mask[1, :, 3:, 2] = False
    return model(drawn(2, 8), attention_mask=mask).logits


def by_embeddings(model: Any) -> Tensor:
    given = left_padded()
    ids = given.pop("input_ids")
    return model.generate(inputs_embeds=model.get_input_embeddings()(ids), **given, **GREEDY)


def packed(model: Any) -> Tensor:
    places = torch.tensor([[*range(4), *range(7), *range(4)]])
    return model(drawn(1, 15), position_ids=places, use_cache=False).logits


def continued(model: Any) -> Tensor:
    ids = drawn(2, 12)
    cache = model(ids[:, :7], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    return model(ids[:, 7:].repeat_interleave(2, 0), past_key_values=cache).logits


def gradients(model: Any, *checkpointing: dict[str, Any]) -> Tensor:
    """Of every parameter by its norm, and of the embeddings whole: the row of padding has none."""
    model = copy.deepcopy(model).train()
    for given in checkpointing:
        model.gradient_checkpointing_enable(given)
        model.enable_input_require_grads()
    given = left_padded()
    model(**given, labels=given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)).loss.backward()
    norms = sorted(float(p.grad.norm()) for p in model.parameters())
    return torch.cat([torch.tensor(norms), model.get_input_embeddings().weight.grad.flatten()])


def resized(model: Any) -> Tensor:
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    model.resize_token_embeddings(101, mean_resizing=False)
    return real(model(**left_padded()).logits[..., :97])


CALLS: dict[str, Callable[[Any], Tensor]] = {
    "greedy": lambda model: model.generate(**left_padded(), **GREEDY),
    "beams": lambda model: model.generate(**left_padded(), num_beams=3, num_return_sequences=2, **GREEDY),
    "scores of beams": scores,
    "sampling": sampled,
    "drafts looked up": lambda model: model.generate(drawn(1, 6).repeat(1, 3), prompt_lookup_num_tokens=4, **GREEDY),
    "drafts of a copy": lambda model: model.generate(drawn(1, 9), assistant_model=copy.deepcopy(model), **GREEDY),
    "drafts of its own layers": lambda model: model.generate(drawn(1, 9), assistant_early_exit=1, **GREEDY),
    "no cache": lambda model: model.generate(**left_padded(), use_cache=False, **GREEDY),
    "embeddings": by_embeddings,
    "an object of settings": lambda model: model.generate(
        **left_padded(),
        generation_config=GenerationConfig(max_new_tokens=9, num_beams=2, eos_token_id=None, pad_token_id=0),
    ),
    "a second turn": second_turn,
    "a prompt in chunks": lambda model: model.generate(**left_padded(), prefill_chunk_size=5, **GREEDY),
    "guidance": lambda model: model.generate(**left_padded(), guidance_scale=1.5, **GREEDY),
    "past the positions": lambda model: model.generate(drawn(1, 120), **{**GREEDY, "max_new_tokens": 12}),
    "packed rows": packed,
    "a mask that is added": added_mask,
    "a mask of booleans": boolean_mask,
    "the last logits": lambda model: model(**left_padded(), logits_to_keep=2).logits,
    "some logits": lambda model: model(**left_padded(), logits_to_keep=torch.tensor([1, 5, 7])).logits[:, 1:],
    "a loss by count": lambda model: model(
        drawn(2, 9), labels=drawn(2, 9), num_items_in_batch=torch.tensor(40)
    ).loss,
    "a cache repeated": continued,
    "hidden states": lambda model: torch.stack(
        [real(h) for h in model(**left_padded(), output_hidden_states=True).hidden_states]
    ),
    "gradients": gradients,
    "gradients, recomputed": lambda model: gradients(model, {"use_reentrant": False}),
    "gradients, recomputed by the older way": lambda model: gradients(model, {"use_reentrant": True}),
    "more tokens": resized,
}  # fmt: skip


@pytest.fixture(scope="module", params=HOSTS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    torch.manual_seed(0)
    host = HOSTS[request.param]().eval()
    return host, hosted(host).eval()


@pytest.mark.filterwarnings("ignore")  # transformers' own, of both models
@pytest.mark.parametrize("call", CALLS)
def test_a_call_gives_what_the_host_gives(pair: tuple[Any, Any], call: str) -> None:
    host, own = pair
    wanted, got = CALLS[call](host), CALLS[call](own)
    if wanted.is_floating_point():
        assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(got, wanted)


def test_it_opens_in_parts_as_it_was(pair: tuple[Any, Any], tmp_path: Path) -> None:
    _, own = pair
    own.save_pretrained(tmp_path, max_shard_size="20KB")
    again = type(own).from_pretrained(tmp_path)
    assert again.get_input_embeddings().padding_idx == 0
    assert_close(again(**left_padded()).logits, own(**left_padded()).logits)


def test_a_mask_that_changes_scores_is_refused(pair: tuple[Any, Any]) -> None:
    _, own = pair
    with pytest.raises(ValueError, match="only changed are not a mask"):
        own(drawn(2, 8), attention_mask=torch.full((2, 1, 8, 8), -1.0))
    with pytest.raises(ValueError, match=r"got torch.int64"):
        own(drawn(2, 8), attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.long))
