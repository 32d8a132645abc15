"""Documents packed into one row see nothing of each other, in any mechanism, as in transformers' Llama."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from test_decode import CAUSAL
from tiny_models import causal_lm, randomised, seq2seq, tiny, tokens
from torch import Tensor
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

from manyheads.models import ManyheadsForSequenceClassification
from manyheads.models.packed import Documents

IDS = tokens(2, 19)
CUTS = ((4, 1, 9, 5), (11, 8))  # rows are cut at different places


def restarting(cuts: tuple[tuple[int, ...], ...] = CUTS, start: int = 0) -> Tensor:
    return torch.stack([torch.cat([torch.arange(start, start + size) for size in row]) for row in cuts])


def alone(model: Any, ids: Tensor = IDS, cuts: tuple[tuple[int, ...], ...] = CUTS, **call: Any) -> Tensor:
    rows = []
    for row, sizes in zip(ids, cuts, strict=True):
        parts = [model(part[None], use_cache=False, **call).logits for part in row.split(sizes)]
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)


def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(vocab_size=29, initializer_range=0.3, **sizes)).double().eval()


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_every_mechanism(name: str) -> None:
    model = causal_lm(name, short_conv=3)
    assert_close(model(IDS, position_ids=restarting()).logits, alone(model), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_as_in_llama() -> None:
    for positions in (restarting(), torch.tensor([*range(7), *range(11, 23)])[None].expand(2, -1)):
        for model in (llama(), causal_lm("softmax")):
            found = model(IDS, position_ids=positions, use_cache=False).logits
            for row in range(2):
                cuts = [0, *(int(i) + 1 for i in (positions[row].diff() != 1).nonzero()), 19]
                for start, stop in pairwise(cuts):
                    own = slice(start, stop)
                    call = {"position_ids": positions[row : row + 1, own]}
                    wanted = model(IDS[row : row + 1, own], use_cache=False, **call).logits
                    assert_close(found[row : row + 1, own], wanted, rtol=1e-6, atol=1e-6)


def test_the_loss_is_llamas() -> None:
    """Labels are shifted as they are given: over borders too, where the collator has not put -100."""
    for labels in (IDS, IDS.masked_fill(restarting() == 0, -100)):
        found = {}
        for model in (llama(), causal_lm("softmax")):
            out = model(IDS, position_ids=restarting(), labels=labels, use_cache=False)
            wanted = torch.nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
            assert_close(out.loss, wanted, check_dtype=False, rtol=1e-6, atol=1e-6)
            found[type(model)] = out.loss
        assert len(found) == 2


@pytest.mark.parametrize("settings", [{"positions": "learned"}, {"positions": "none"}, {"is_causal": None}])
@torch.no_grad()
def test_positions_of_the_model(settings: dict[str, Any]) -> None:
    model = causal_lm("softmax", "aaren", **settings)
    found = model(IDS, position_ids=restarting()).logits
    assert_close(found, alone(model))
    moved = model(IDS, position_ids=restarting(start=3)).logits
    gap = (moved - found).abs().max()
    assert (gap > 1e-3) == (settings.get("positions") == "learned")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradients_losses_and_checkpointing() -> None:
    model = causal_lm("moh", "based", max_position_embeddings=64).train()
    gradients = []
    for way in ("alone", "packed", "checkpointed"):
        model.zero_grad()
        if way == "checkpointed":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if way == "alone":
            padded, mask = torch.zeros(6, 11, dtype=torch.long), torch.zeros(6, 11, dtype=torch.long)
            parts = [part for row, sizes in zip(IDS, CUTS, strict=True) for part in row.split(sizes)]
            for row, part in enumerate(parts):
                padded[row, : len(part)], mask[row, : len(part)] = part, 1
            out = model(padded, attention_mask=mask, use_cache=False)
            logits = out.logits[mask.bool()]
        else:
            out = model(IDS, position_ids=restarting())
            logits = out.logits.flatten(0, 1)
        (logits.square().mean() + out.aux_loss).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_close(gradients[1], gradients[0])
    assert_close(gradients[2], gradients[0])


@torch.no_grad()
def test_weights_and_hidden_states_stand_where_their_tokens_do() -> None:
    model = causal_lm("softmax", "hyena")
    out = model(IDS, position_ids=restarting(), output_attentions=True, output_hidden_states=True)
    assert out.past_key_values is None
    assert out.attentions[1] is None
    document = restarting().eq(0).cumsum(1)
    same = (document[:, :, None] == document[:, None])[:, None]
    assert bool((out.attentions[0].masked_select(~same) == 0).all())
    assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 19, dtype=torch.float64))
    own = model(IDS[:1, 5:14], output_attentions=True, output_hidden_states=True, use_cache=False)
    assert_close(out.attentions[0][:1, :, 5:14, 5:14], own.attentions[0])
    assert_close([h[:1, 5:14] for h in out.hidden_states], list(own.hidden_states))


@torch.no_grad()
def test_one_long_and_many_short_documents_cost_no_more_than_twice_their_tokens() -> None:
    model, cuts = causal_lm("softmax", "based"), ((64, *[1, 2, 5] * 8),)
    ids, cells = tokens(1, sum(cuts[0])), []
    model.model.stack.register_forward_pre_hook(
        lambda module, given: cells.append(given[0].shape[0] * given[0].shape[1])
    )
    out = model(ids, position_ids=restarting(cuts), output_attentions=True)
    assert sum(cells) < 2 * ids.shape[1]
    assert_close(out.logits, alone(model, ids, cuts))
    assert_close(out.attentions[0].sum(-1), torch.ones(1, 4, ids.shape[1], dtype=torch.float64))


@pytest.mark.parametrize(
    "options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}, {"position_ids_start": 2}]
)
def test_what_the_flattening_collator_gives(options: dict[str, Any]) -> None:
    model = causal_lm("softmax", "aaren")
    collate = DataCollatorWithFlattening(**options)
    batch = collate([{"input_ids": IDS[0, :n].tolist()} for n in (5, 1, 8)])
    out = model(**batch)
    wanted = [model(IDS[:1, :n], use_cache=False).logits for n in (5, 1, 8)]
    assert_close(out.logits, torch.cat(wanted, 1))  # rotary positions are relative
    assert out.loss is not None
    if len(options) and "position_ids_start" not in options:
        del batch["position_ids"]
        assert_close(model(**batch).logits, out.logits)
    single = collate([{"input_ids": IDS[0].tolist()}])
    assert model(**single).past_key_values is not None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"seq_idx": torch.tensor([[0] * 10 + [1] * 9])}, "seq_idx and position_ids do not agree.*token 10 of row 0"),
        ({"seq_idx": torch.zeros(1, 4)}, r"seq_idx has shape \(1, 4\); want \[1, 19\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 10, 19])}, "cu_seq_lens_q and position_ids do not agree"),
        ({"cu_seq_lens_k": torch.tensor([0, 11, 18])}, "rising from 0 to 19"),
        ({"max_length_q": 9}, "max_length_q is 9, but the longest document given has 11"),
        ({"seq_idx": torch.zeros(1, 19), "attention_mask": torch.ones(1, 19)}, "seq_idx and attention_mask"),
        ({"use_cache": True}, "2 documents in this pass.*use_cache=False"),
    ],
)
def test_refusals(call: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        causal_lm("softmax")(IDS[1:], position_ids=restarting(CUTS[1:]), **call)


@torch.no_grad()
def test_other_models_refuse_or_are_right() -> None:
    model = causal_lm("softmax")
    cache = model(IDS[:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a cache goes on with one document"):
        model(IDS, position_ids=restarting(), past_key_values=cache)
    with pytest.raises(ValueError, match="one label"):
        randomised(ManyheadsForSequenceClassification(tiny("softmax")))(IDS, position_ids=restarting())
    with pytest.raises(ValueError, match="decoder_position_ids"):
        seq2seq("softmax")(IDS, decoder_input_ids=IDS, decoder_position_ids=restarting())
    encoder = randomised(ManyheadsForSequenceClassification(tiny("softmax"))).model
    found = encoder(IDS, position_ids=restarting()).last_hidden_state
    assert_close(found[1:, 11:], encoder(IDS[1:, 11:]).last_hidden_state)


@torch.no_grad()
def test_positions_that_count_on_and_masks_are_left_to_their_own() -> None:
    model = causal_lm("softmax")
    usual = model(IDS).logits
    assert_close(model(IDS, position_ids=torch.arange(4, 23)[None]).logits, usual)
    masked = model(IDS, position_ids=restarting(), attention_mask=torch.ones_like(IDS)).logits
    assert bool((masked - alone(model)).abs().max() > 1e-3)  # as in transformers: a mask says what may be seen
    assert model(IDS[:, :1], position_ids=torch.full((2, 1), 5)).past_key_values is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_types(dtype: torch.dtype) -> None:
    model = causal_lm("softmax", "aaren").float()
    wanted = model(IDS, position_ids=restarting()).logits
    with torch.autocast("cpu", dtype):
        assert_close(model(IDS, position_ids=restarting()).logits.float(), wanted, rtol=0.1, atol=0.3)
    narrow = model.to(dtype)(IDS, position_ids=restarting()).logits
    assert narrow.dtype == dtype
    assert_close(narrow.float(), wanted, rtol=0.1, atol=0.3)


def test_groups_cover_every_document_once() -> None:
    lengths = torch.tensor([1, 1, 2, 3, 4, 5, 8, 9, 64, *[1] * 40])
    documents = Documents(lengths.cumsum(0) - lengths, lengths, None)
    groups = documents._groups()
    assert torch.cat(groups).sort().values.tolist() == list(range(len(lengths)))
    assert all(int(lengths[g].max()) < 2 * int(lengths[g].min()) or int(lengths[g].max()) <= 2 for g in groups)
