"""LlamaFusion: a modality beside a frozen text model, against loops, a mixture of transformers, and the text model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from manyheads import create_attention
from manyheads.convert.fused import Fused, load_fused

SIZES = {
    "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 2,
    "intermediate_size": 20, "vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": None,
}  # fmt: skip
KINDS = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 0, 0], [0, 3, 3, 3, 0, 0, 0, 0, 0]])
IDS = torch.tensor([[1, 2, 9, 9, 9, 9, 9, 3, 4], [5, 9, 9, 9, 6, 7, 8, 9, 1]])


def tiny(kind: str = "llama", seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def fused(kind: str = "llama", **more: Any) -> Fused:
    made = Fused(tiny(kind, **more))
    torch.manual_seed(1)
    with torch.no_grad():
        for value in made.own_weights().values():
            value.normal_(0, 0.3)
    return made


def images(kinds: Tensor = KINDS) -> Tensor:
    return torch.randn(int((kinds != 0).sum()), 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **more).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma"])
def test_text_alone_is_the_text_model_bit_for_bit(kind: str) -> None:
    made, text = fused(kind), tiny(kind)
    nothing = {"kinds": torch.zeros_like(IDS), "embeddings": torch.zeros(0, 24).double()}
    for more in ({}, nothing):
        torch.testing.assert_close(logits(made, **more), logits(text), rtol=0, atol=0)
    options = {"max_new_tokens": 6, "do_sample": False}
    torch.testing.assert_close(made.generate(IDS, **options), text.generate(IDS, **options))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma"])
def test_a_new_branch_on_single_tokens_is_the_text_model_on_mixed_rows(kind: str) -> None:
    text = tiny(kind)
    made, kinds = Fused(text), torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0]])
    given = text.get_input_embeddings()(IDS)[kinds != 0]
    torch.testing.assert_close(logits(made, kinds=kinds, embeddings=given), logits(text))
    whole = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0]])
    given = text.get_input_embeddings()(IDS)[whole != 0]
    changed = logits(made, kinds=whole, embeddings=given) - logits(text)
    assert changed[0, 1:].abs().max() > 1e-3  # tokens of one image see those behind them
    torch.testing.assert_close(changed[0, :1], torch.zeros_like(changed[0, :1]))


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * gain


def by_loops(made: Fused, row: Tensor, kinds: list[int]) -> Tensor:
    """The only layer of a model without positions, token by token, and its last norm."""
    layer, n, d = made.model.model.layers[0], len(row), 6

    def own(module: Any, i: int) -> Tensor:
        return module.other.weight if kinds[i] else module.text.weight

    attention, rows = layer.self_attn, []
    x = [normed(row[i], own(layer.input_layernorm, i)) for i in range(n)]
    q, k, v = ([own(getattr(attention, f"{part}_proj"), i) @ x[i] for i in range(n)] for part in "qkv")
    for i in range(n):
        heads = []
        for h in range(4):
            mine, read = slice(h * d, (h + 1) * d), slice(h // 2 * d, (h // 2 + 1) * d)
            seen = [j for j in range(n) if j <= i or (kinds[i] and kinds[i] == kinds[j])]
            terms = [math.exp(float(q[i][mine] @ k[j][read]) / math.sqrt(d)) for j in seen]
            heads.append(sum(t * v[j][read] for t, j in zip(terms, seen, strict=True)) / sum(terms))
        state = row[i] + own(attention.o_proj, i) @ torch.cat(heads)
        y = normed(state, own(layer.post_attention_layernorm, i))
        gate, up = (own(getattr(layer.mlp, name), i) @ y for name in ("gate_proj", "up_proj"))
        state = state + own(layer.mlp.down_proj, i) @ (torch.nn.functional.silu(gate) * up)
        rows.append(normed(state, own(made.model.model.norm, i)))
    return torch.stack(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_loops_over_tokens(attention: str) -> None:
    made = fused(num_hidden_layers=1, attn_implementation=attention)
    made.model.model.rotary_emb.inv_freq.zero_()
    with torch.no_grad():
        given = images()
        out = made(IDS, kinds=KINDS, embeddings=given)
        rows = made.model.get_input_embeddings()(IDS)
        rows[KINDS != 0] = given
        want = torch.stack([by_loops(made, row, kinds.tolist()) for row, kinds in zip(rows, KINDS, strict=True)])
        # transformers' eager attention takes its softmax in float32.
        near = {"rtol": 1e-5, "atol": 1e-6} if attention == "eager" else {"rtol": 1e-7, "atol": 1e-7}
        torch.testing.assert_close(out.logits, want @ made.model.lm_head.weight.T, **near)
        torch.testing.assert_close(out.states, want[KINDS != 0], **near)


def test_its_attention_is_our_mixture_of_transformers() -> None:
    made = fused(num_key_value_heads=4)
    layer = made.model.model.layers[0].self_attn
    ours = create_attention(
        "mixture-of-transformers", 24, 4, causal=True, norm=False, rotary={"base": 10000.0}
    ).double()
    with torch.no_grad():
        for m, part in enumerate(("text", "other")):
            weights = [getattr(getattr(layer, f"{name}_proj"), part).weight.T for name in "qkvo"]
            ours.qkv[m] = torch.cat(weights[:3], 1)
            ours.out[m] = weights[3]
        x, others = torch.randn(2, 9, 24, dtype=torch.float64), torch.rand(2, 9) < 0.5
        made.route.others = others
        places = made.model.model.rotary_emb(x, torch.arange(9)[None])
        mask = torch.full((1, 1, 9, 9), -torch.inf, dtype=torch.float64).triu(1)
        got = layer(x, position_embeddings=places, attention_mask=mask)[0]
        want = ours(x, token_kinds=others.long()).output
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # the host's angles are in float32


def test_a_cache_filled_in_parts_equals_one_pass() -> None:
    made, given = fused(), images()
    want, cache, parts, at = logits(made, kinds=KINDS, embeddings=given), None, [], 0
    for step, kinds in zip(IDS.split([1, 6, 1, 1], 1), KINDS.split([1, 6, 1, 1], 1), strict=True):
        count = int((kinds != 0).sum())
        more = {"kinds": kinds, "embeddings": _of(given, at, at + step.shape[1])} if count else {}
        with torch.no_grad():
            out = made(step, past_key_values=cache, use_cache=True, **more)
        cache, at = out.past_key_values, at + step.shape[1]
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), want)


def _of(given: Tensor, start: int, stop: int) -> Tensor:
    """Those of the tokens from start to stop."""
    whole = torch.zeros(*KINDS.shape, 24, dtype=torch.float64)
    whole[KINDS != 0] = given
    return whole[:, start:stop][KINDS[:, start:stop] != 0]


def test_left_padding_changes_nothing() -> None:
    made, given = fused(), images()
    pad = torch.zeros(2, 3, dtype=torch.long)
    ids, kinds = torch.cat([pad, IDS], 1), torch.cat([pad, KINDS], 1)
    mask = torch.cat([pad, torch.ones_like(IDS)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    more = {"attention_mask": mask, "position_ids": places}
    got = logits(made, ids, kinds=kinds, embeddings=given, **more)[:, 3:]
    torch.testing.assert_close(got, logits(made, kinds=KINDS, embeddings=given))


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_text_is_written_behind_images(more: dict[str, Any]) -> None:
    made, given = fused(), images()
    shown = {"kinds": KINDS, "embeddings": given, "attention_mask": torch.ones_like(IDS)}
    options = {"max_new_tokens": 5, "do_sample": False, **more}
    told = made.generate(IDS, **shown, **options)
    torch.testing.assert_close(told, made.generate(IDS, **shown, **options, use_cache=False))
    if not more:
        ids, kinds = IDS, KINDS
        for _ in range(5):
            best = logits(made, ids, kinds=kinds, embeddings=given)[:, -1].argmax(-1, keepdim=True)
            ids, kinds = torch.cat([ids, best], 1), torch.cat([kinds, torch.zeros_like(best)], 1)
        torch.testing.assert_close(told, ids)
        other = made.generate(IDS, **{**shown, "embeddings": -given}, **options)
        assert not torch.equal(other, told)
        pad = torch.zeros(2, 2, dtype=torch.long)
        wide = {key: torch.cat([pad, shown[key]], 1) for key in ("kinds", "attention_mask")}
        padded = made.generate(torch.cat([pad, IDS], 1), embeddings=given, **wide, **options)
        torch.testing.assert_close(padded[:, 2:], told)


def test_a_second_turn_shows_another_image() -> None:
    made, given = fused(), images()
    options = {"max_new_tokens": 3, "do_sample": False}
    shown = {"kinds": KINDS, "embeddings": given, "attention_mask": torch.ones_like(IDS)}
    first = made.generate(IDS, **shown, **options, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, IDS], 1)
    kinds = torch.cat([KINDS, torch.zeros(2, 3, dtype=torch.long), KINDS], 1)
    both = torch.zeros(*kinds.shape, 24, dtype=torch.float64)
    both[:, :9][KINDS != 0], both[:, 12:][KINDS != 0] = given, given.flip(0)
    shown = {"kinds": kinds, "embeddings": both[kinds != 0], "attention_mask": torch.ones_like(ids)}
    told = made.generate(ids, **shown, **options, past_key_values=first.past_key_values)
    torch.testing.assert_close(told, made.generate(ids, **shown, **options, use_cache=False))


@pytest.mark.parametrize("reentrant", [False, True])
def test_only_the_new_modality_learns_and_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    made, given = fused().train(), images().requires_grad_()
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert {id(p) for p in trained.values()} == {id(p) for p in made.own_weights().values()}
    found = []
    for anew in (False, True):
        for layer in made.model.model.layers:
            layer.gradient_checkpointing = anew
            layer._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(
                f, *a, use_reentrant=reentrant
            )
        first = made(IDS, kinds=KINDS, embeddings=given, labels=IDS, use_cache=False)
        second = made(IDS, kinds=KINDS.flip(0), embeddings=given, use_cache=False)  # before the first one's backward
        loss = first.loss + first.states.square().mean() + second.states.square().mean()
        loss.backward()
        found.append([given.grad.clone(), *(p.grad.clone() for p in trained.values())])
        made.zero_grad()
        given.grad = None
    torch.testing.assert_close(*found)
    assert all(grad.abs().max() > 0 for grad in found[0])
    text = logits(made.eval())
    torch.testing.assert_close(text, logits(tiny()), rtol=0, atol=0)


def test_the_loss_is_that_of_text_tokens() -> None:
    made, given = fused(), images()
    with torch.no_grad():
        out = made(IDS, kinds=KINDS, embeddings=given, labels=IDS)
    wanted = [
        -out.logits[b, i].log_softmax(-1)[IDS[b, i + 1]] for b in range(2) for i in range(8) if not KINDS[b, i + 1]
    ]
    torch.testing.assert_close(out.loss.double(), torch.stack(wanted).mean(), rtol=1e-5, atol=1e-5)


def test_the_given_model_is_left_as_it_is_and_its_weights_are_not_copied() -> None:
    text = tiny()
    before, names = logits(text), list(text.state_dict())
    made = Fused(text)
    assert list(text.state_dict()) == names
    torch.testing.assert_close(logits(text), before, rtol=0, atol=0)
    assert made.model.model.layers[0].mlp.up_proj.text.weight is text.model.layers[0].mlp.up_proj.weight
    assert made.model.model.layers[0].mlp.up_proj.other.weight is not text.model.layers[0].mlp.up_proj.weight


def test_it_opens_again_beside_the_same_text_model_alone(tmp_path: Path) -> None:
    made, given = fused(), images()
    path = made.save(tmp_path / "images.safetensors")
    again = load_fused(path, tiny())
    more = {"kinds": KINDS, "embeddings": given}
    torch.testing.assert_close(logits(again, **more), logits(made, **more), rtol=0, atol=0)
    with pytest.raises(ValueError, match="beside another text model"):
        load_fused(path, tiny(seed=4))


def test_bfloat16_with_a_branch_in_float32() -> None:
    made = Fused(tiny().bfloat16())
    more = {"kinds": KINDS, "embeddings": images().float()}
    want = logits(made, **more)
    assert want.dtype == torch.bfloat16
    for value in made.own_weights().values():
        value.data = value.data.float()
    torch.testing.assert_close(logits(made, **more), want, rtol=0.1, atol=0.3)


def test_calls_that_would_be_wrong_are_refused() -> None:
    made, given = fused(), images()
    shown = {"kinds": KINDS, "embeddings": given}
    with pytest.raises(ValueError, match="kinds have 8 tokens of images"):
        made(IDS, kinds=KINDS, embeddings=given[:-1])
    with pytest.raises(ValueError, match="images want input_ids"):
        made(IDS, embeddings=given)
    with pytest.raises(ValueError, match="wants an attention_mask"):
        made.generate(IDS, **shown)
    with pytest.raises(ValueError, match="hides tokens of images"):
        made(IDS, attention_mask=torch.cat([torch.zeros(2, 3), torch.ones(2, 6)], 1).long(), **shown)
    with pytest.raises(ValueError, match="within an image, at token 2"):
        made.generate(IDS, attention_mask=torch.ones_like(IDS), prefill_chunk_size=2, max_new_tokens=1, **shown)
    with pytest.raises(ValueError, match="not into a StaticCache"):
        made(IDS, past_key_values=StaticCache(config=made.config, max_cache_len=16), **shown)
    with pytest.raises(ValueError, match="and no inputs_embeds"):
        made(IDS, inputs_embeds=torch.zeros(2, 9, 24).double(), **shown)
    with pytest.raises(ValueError, match="attention_mask is \\[b, n\\]"):
        made(IDS, attention_mask=torch.ones(2, 1, 9, 9).bool(), **shown)
    with pytest.raises(ValueError, match="packed rows"):
        made(IDS[:1], kinds=KINDS[:1], embeddings=given[:5], position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1]]))
    with pytest.raises(ValueError, match="with a sliding window"):
        Fused(tiny("mistral", sliding_window=4))
