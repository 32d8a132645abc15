"""What each kind of token has of its own, adapters and scales; and layers that read higher ones, of a pass before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import causal_lm, randomised, tiny, tokens
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

from manyheads.models import ManyheadsForCausalLM, ManyheadsForSeq2SeqLM, ManyheadsForSequenceClassification

KINDS = 3
MOT = {"name": "mixture-of-transformers", "modalities": KINDS, "norm": False}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"layers": [MOT, "softmax"], "num_token_kinds": KINDS, "by_kind": "mlp"},
    "adapter": {"layers": ["modality-gate"], "num_token_kinds": KINDS, "by_kind": ["adapter"], "adapter_size": 5},
    "one-peace": {
        "layers": [{"name": "softmax", "shell": {"out_norm": True}}],
        "num_token_kinds": KINDS,
        "by_kind": ["mlp"],
        "hidden_act": "geglu",
        "mlp_norm": True,
        "layer_scale": 0.1,
    },
    "places": {"num_token_kinds": KINDS, "by_kind": ["embedding", "positions"], "positions": "learned"},
    "back": {"layers": ["softmax"], "back": "back-attention", "num_token_kinds": KINDS, "by_kind": ["mlp"]},
    "back-higher": {"num_hidden_layers": 4, "back": "back-attention", "back_layers": (1, 2), "layers": [MOT]},
    "back-recurrent": {"layers": ["h3", MOT], "back": "back-attention"},
}  # fmt: skip


def kinds(rows: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(KINDS, (rows, n), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: Any) -> Any:
    torch.manual_seed(0)
    return causal_lm(**MODELS[request.param])


def built(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return causal_lm(**{**MODELS[name], **settings})


# -- what all of them must do ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_passes_in_parts_are_one_pass(model: Any) -> None:
    ids, of = tokens(2, 9), kinds(2, 9)
    wanted, cache, found = model(ids, token_kinds=of).logits, None, []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        out = model(ids[:, start:stop], token_kinds=of[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    assert_close(torch.cat(found, 1), wanted)
    assert (wanted - model(ids, token_kinds=kinds(2, 9, seed=1)).logits).abs().max() > 1e-3


@torch.no_grad()
def test_left_padding_of_any_kind_is_no_padding(model: Any) -> None:
    ids, of, mask = tokens(2, 9), kinds(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    out = model(ids, mask, token_kinds=of.masked_fill(mask == 0, -100)).logits
    assert_close(out[0], model(ids[:1], token_kinds=of[:1]).logits[0])
    assert_close(out[1, 4:], model(ids[1:, 4:], token_kinds=of[1:, 4:]).logits[0])


@torch.no_grad()
def test_documents_in_a_row_are_apart(model: Any) -> None:
    ids, of, lengths = tokens(1, 12), kinds(1, 12), [5, 1, 6]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    out = model(ids, position_ids=places, token_kinds=of, use_cache=False).logits
    alone = [model(i, token_kinds=k).logits for i, k in zip(ids.split(lengths, 1), of.split(lengths, 1), strict=True)]
    assert_close(out, torch.cat(alone, 1))


@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(model: Any) -> None:
    ids, of, mask = tokens(2, 6), kinds(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "attention_mask": mask, "token_kinds": of}
    wanted = model.generate(ids, use_cache=False, **how)
    assert model.generate(ids, use_cache=True, **how).equal(wanted)
    assert model.generate(ids, num_beams=2, **how).equal(model.generate(ids, num_beams=2, use_cache=False, **how))


@torch.no_grad()
def test_a_cache_that_is_cropped_goes_on(model: Any) -> None:
    ids, of = tokens(2, 9), kinds(2, 9)
    cache = model(ids[:, :3], token_kinds=of[:, :3], use_cache=True).past_key_values
    cache.activate_past_recording()
    model(ids[:, 3:8], token_kinds=of[:, 3:8], past_key_values=cache)
    cache.crop(-2)
    last = model(ids[:, 6:], token_kinds=of[:, 6:], past_key_values=cache).logits
    assert_close(last, model(ids, token_kinds=of).logits[:, 6:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_through_checkpoints_are_those_without(model: Any, reentrant: bool) -> None:
    ids, of, found = tokens(2, 7), kinds(2, 7), []
    for again in (False, True):
        one = ManyheadsForCausalLM(model.config).double()
        one.load_state_dict(model.state_dict())
        if again:
            one.activation_checkpointing_enable({"use_reentrant": reentrant})
            one.enable_input_require_grads()
        one.train()
        one(ids, labels=ids, token_kinds=of).loss.backward()
        found.append([p.grad for p in one.parameters()])
    assert all(grad is not None for grad in found[0])
    assert_close(found[0], found[1])


@torch.no_grad()
def test_what_is_saved_is_loaded(model: Any, tmp_path: Path) -> None:
    ids, of = tokens(2, 7), kinds(2, 7)
    model.save_pretrained(tmp_path)
    loaded = ManyheadsForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_close(loaded(ids, token_kinds=of).logits, model(ids, token_kinds=of).logits)


def test_kinds_are_checked(model: Any) -> None:
    ids, of = tokens(2, 7), kinds(2, 7)
    with pytest.raises(ValueError, match="takes token_kinds"):
        model(ids)
    with pytest.raises(ValueError, match=r"token_kinds go from 0 to 7; want 0 to 2"):
        model(ids, token_kinds=of.masked_fill(of == 1, 7))
    with pytest.raises(ValueError, match=r"token_kinds are torch.float64.*want integers"):
        model(ids, token_kinds=of.double())
    with pytest.raises(ValueError, match=r"token_kinds: got \[2, 6\] on cpu"):
        model(ids, token_kinds=of[:, 1:])
    with pytest.raises(ValueError, match="remembers"):
        model(ids, token_kinds=of, past_key_values=DynamicCache()) if model.model.stack.own else built("mlp")(
            ids, token_kinds=of, past_key_values=DynamicCache()
        )


# -- each for itself ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_token_passes_the_mlp_of_its_kind() -> None:
    model = built("mlp")
    block, x, of = model.model.stack.layers[0], torch.randn(2, 7, 16, dtype=torch.float64), kinds(2, 7)
    of[of == 1] = 0  # a kind that no token has
    found = block.mlp(x, of)
    for b in range(2):
        for i in range(7):
            assert_close(found[b, i], block.mlp.kinds[int(of[b, i])](x[b, i]))


@torch.no_grad()
def test_kinds_that_are_alike_are_one() -> None:
    model, plain, ids = built("mlp", layers=["softmax"]), causal_lm("softmax"), tokens(2, 7)
    state = plain.state_dict()
    for name in model.state_dict():
        parts = name.split(".kinds.")
        state[name] = state[parts[0] + "." + parts[1].split(".", 1)[1]] if len(parts) == 2 else state[name]
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    assert_close(model(ids, token_kinds=kinds(2, 7)).logits, plain(ids).logits)


@torch.no_grad()
def test_new_adapters_change_nothing_and_trained_ones_their_kind() -> None:
    config = tiny(**{**MODELS["adapter"], "layers": ["softmax"]})
    torch.manual_seed(0)
    model = ManyheadsForCausalLM(config).double().eval()
    plain = ManyheadsForCausalLM(tiny(layers=["softmax"])).double().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    ids, of = tokens(1, 7), kinds(1, 7)
    assert_close(model(ids, token_kinds=of).logits, plain(ids).logits)
    mlp, x = model.model.stack.layers[0].mlp, torch.randn(1, 7, 16, dtype=torch.float64)
    before = mlp(x, of)
    torch.nn.init.normal_(mlp.adapters[2].up_proj.weight)
    moved = (mlp(x, of) - before).abs().amax((0, 2))
    assert moved[of[0] != 2].max() == 0
    assert moved[of[0] == 2].min() > 1e-4
    h = mlp.norm(x[0, of[0] == 2])
    own = mlp.adapters[2]
    added = (torch.nn.functional.silu(h @ own.gate_proj.weight.T) * (h @ own.down_proj.weight.T)) @ own.up_proj.weight.T
    assert_close(mlp(x, of)[0, of[0] == 2], mlp.on_normed(h + added))


@torch.no_grad()
def test_the_block_of_one_peace() -> None:
    """x + g1 W_o LN(heads); x + g2 W LN(gelu(W0 x) * W1 x), the gains at 0.1 before any training."""
    config = tiny(**MODELS["one-peace"])
    torch.manual_seed(0)
    block = ManyheadsForCausalLM(config).double().eval().model.stack.layers[0]
    for gains in (block.self_scale.weight, block.mlp_scale.weight):
        assert_close(gains.data, torch.full_like(gains, 0.1), rtol=1e-6, atol=0)
    x, of = torch.randn(1, 5, 16, dtype=torch.float64), kinds(1, 5)
    mechanism = block.self_attn.mechanism
    plain = type(mechanism)(16, 4, causal=True, rotary=mechanism.config["rotary"]).double()
    plain.load_state_dict({k: v for k, v in mechanism.state_dict().items() if "out_norm" not in k})
    plain.o_proj = torch.nn.Identity()
    heads = plain(block.self_attn.norm(x)).output
    y = x + 0.1 * mechanism.o_proj(torch.nn.functional.rms_norm(heads, (16,), eps=1e-6))
    rows = []
    for i, kind in enumerate(of[0].tolist()):
        mlp = block.mlp.kinds[kind]
        h = mlp.norm(y[0, i])
        inner = torch.nn.functional.gelu(mlp.gate_proj(h)) * mlp.up_proj(h)
        rows.append(y[0, i] + 0.1 * mlp.down_proj(torch.nn.functional.rms_norm(inner, (24,), eps=1e-6)))
    from manyheads.models.masks import Masks

    assert_close(block(x, None, Masks(beside={"token_kinds": of}))[0][0], torch.stack(rows), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_half_precision_goes_through_all_parts() -> None:
    ids, of = tokens(2, 7), kinds(2, 7)
    model = built("one-peace", num_token_kinds=KINDS, by_kind=["mlp", "adapter"], adapter_size=4).float()
    wanted = model(ids, token_kinds=of).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids, token_kinds=of).logits
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert model.bfloat16()(ids, token_kinds=of).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_positions_count_each_kind_apart() -> None:
    stack = built("places").model.stack
    of = torch.tensor([[0, 0, 1, 1, 0, 2, 1]])
    from manyheads.models.masks import Masks

    x = torch.zeros(1, 7, 16, dtype=torch.float64)
    found = stack._placed(x, Masks(beside={"token_kinds": of}), None)
    places = torch.tensor([[0, 1, 0, 1, 2, 0, 2]])
    assert_close(found, stack.embed_kinds(of) + stack.embed_positions(places))
    small = built("places", max_position_embeddings=4)
    assert small(tokens(1, 7), token_kinds=of).logits.shape[1] == 7
    with pytest.raises(ValueError, match="5 tokens of a kind, but max_position_embeddings=4"):
        small(tokens(1, 7), token_kinds=torch.tensor([[0, 1, 1, 1, 1, 1, 2]]))


@pytest.mark.parametrize(("low", "high"), [(0, -1), (1, 1), (1, 2)])
@torch.no_grad()
def test_the_lower_layer_reads_the_higher_one_of_a_pass_before(low: int, high: int) -> None:
    model, ids = (
        causal_lm(num_hidden_layers=3, layers=["softmax"], back="back-attention", back_layers=(low, high)),
        tokens(2, 7),
    )
    stack = model.model.stack
    x = model.model.embed_tokens(ids)
    for block in stack.layers[:low]:
        x = block(x)[0]
    first = x
    for block in stack.layers[low : high % 3 + 1]:
        first = block(first)[0]
    read = stack.back.mechanism(stack.back.norm(x), higher=stack.norm_higher(first)).output
    x = x + read
    for block in stack.layers[low:]:
        x = block(x)[0]
    assert_close(model.model(ids).last_hidden_state, stack.norm(x))


def test_what_does_not_fit_is_refused() -> None:
    for settings, told in (
        ({"num_token_kinds": 2}, "want at least 2 kinds and what each has of its own"),
        ({"by_kind": "mlp"}, "want at least 2 kinds"),
        ({"num_token_kinds": 2, "by_kind": "mpl"}, "did you mean 'mlp'"),
        ({"num_token_kinds": 2, "by_kind": "adapter"}, "'adapter' wants adapter_size"),
        ({"num_token_kinds": 2, "by_kind": "positions"}, "'positions' wants positions=\"learned\""),
        ({"num_token_kinds": 2, "by_kind": "mlp", "intermediate_size": 0}, "'mlp' wants intermediate_size"),
        ({"num_token_kinds": 2, "by_kind": "mlp", "num_local_experts": 2}, "want one of the two"),
        ({"layer_scale": 0.0}, "layer_scale=0.0; want a positive number"),
        ({"back": "softmax"}, "'softmax', which reads no higher layer"),
        ({"back": "back-attention", "back_layers": (1, 0)}, "want a layer that reads what comes after it"),
        ({"back": "back-attention", "back_layers": (0, 2)}, "of 2 layers"),
        ({"back": "back-attention", "is_encoder_decoder": True}, "of models with one stack"),
    ):
        with pytest.raises(ValueError, match=told):
            tiny(**settings)
    with pytest.raises(ValueError, match="back is 'back-attention', which declares"):
        ManyheadsForSequenceClassification(tiny(back="back-attention", is_causal=False))
    with pytest.raises(ValueError, match="token_kinds was given, and no layer takes it"):
        randomised(ManyheadsForCausalLM(tiny(back="back-attention")))(tokens(1, 3), token_kinds=kinds(1, 3))
    assert ManyheadsForSeq2SeqLM(tiny(is_encoder_decoder=True, layer_scale=0.1)).model.decoder.layers[0].cross_scale


def test_what_no_shard_and_no_policy_has_is_refused() -> None:
    from manyheads.hosts.own_cache import own_windows
    from manyheads.parallel import sequence_parallel

    one = built("mlp", layers=["softmax"])
    with pytest.raises(ValueError, match="reads token_kinds beside its tokens"), sequence_parallel(one):
        pass
    with pytest.raises(ValueError, match=r"remembers more than its layers do \(back, first\)"):
        own_windows(causal_lm(back="back-attention"))


@torch.no_grad()
def test_boxes_are_embedded_where_positions_are_boxes() -> None:
    model = causal_lm(positions="boxes", max_2d_position_embeddings=20)
    stack, ids = model.model.stack, tokens(2, 7)
    boxes = torch.randint(10, (2, 7, 4), generator=torch.Generator().manual_seed(0))
    boxes[..., 2:] += 9
    x0, y0, x1, y1 = boxes.unbind(-1)
    table = stack.embed_boxes.weight.view(4, 20, 16)
    told = table[0][x0] + table[0][x1] + table[1][y0] + table[1][y1] + table[2][y1 - y0] + table[3][x1 - x0]
    x = model.model.embed_tokens(ids) + told
    for block in stack.layers:
        x = block(x)[0]
    assert_close(model(ids, boxes=boxes).logits, model.lm_head(stack.norm(x)))
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "boxes": boxes}
    assert model.generate(ids, **how).equal(model.generate(ids, use_cache=False, **how))
    with pytest.raises(ValueError, match='the model, with positions="boxes", takes boxes'):
        model(ids)
    with pytest.raises(ValueError, match="the model: boxes go from 0 to 20; want x0 <= x1"):
        model(ids, boxes=boxes.masked_fill(boxes == boxes.max(), 20))


@pytest.mark.parametrize("parts", [["mlp"], ["adapter"], ["mlp", "adapter"]])
@torch.no_grad()
def test_a_trained_model_with_new_parts_computes_the_same(parts: list[str]) -> None:
    from manyheads.models.extended import extended

    model, ids, of = causal_lm("softmax", mlp_bias=True), tokens(2, 7), kinds(2, 7)
    settings = {"adapter_size": 4} if "adapter" in parts else {}
    made = extended(model, num_token_kinds=KINDS, by_kind=parts, **settings)
    assert_close(made(ids, token_kinds=of).logits, model(ids).logits)
    fresh = {name for name, _ in made.named_parameters()} - {name for name, _ in model.named_parameters()}
    for name, parameter in made.named_parameters():
        if name in fresh and (".kinds.1." in name or ".adapters.1." in name):
            parameter.add_(0.1)
    moved = (made(ids, token_kinds=of).logits - model(ids).logits).abs().amax(-1)
    assert_close(made(ids, token_kinds=of * 0).logits, model(ids).logits)
    assert moved[of == 1].max() > 1e-4
    for wrong in ({"layer_scale": 0.1}, {"num_token_kinds": 2, "by_kind": "embedding"}):
        with pytest.raises(ValueError, match="on a model without them"):
            extended(model, **wrong)
    with pytest.raises(ValueError, match="has kinds or adapters already"):
        extended(made, num_token_kinds=2, by_kind="mlp")
