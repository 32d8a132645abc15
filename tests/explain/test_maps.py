"""What heads' parameters map: matrices from the checkpoint's own, a planted map, and relations counted in loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import prompt, tiny
from torch import Tensor
from torch.testing import assert_close
from written_heads import random_llama
from zoo import build

from manyheads import create_attention
from manyheads.explain.detectors import Maps, detect
from manyheads.hosts.loading import Loaded, load_model


def parts(family: str, model: Any, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """W_V [dim, e] and W_O [e, dim] of a query head, cut out of the checkpoint by its layout."""
    rows = slice(head * 8, head * 8 + 8)
    group = slice(head // 2 * 8, head // 2 * 8 + 8)
    if family == "gpt2":
        attention = model.transformer.h[layer].attn
        return attention.c_attn.weight[:, 64:][:, rows], attention.c_proj.weight[rows]
    if family == "gpt_neox":
        attention = model.gpt_neox.layers[layer].attention
        # Queries, keys and values of each head stand side by side.
        fused = attention.query_key_value.weight.view(4, 3, 8, 32)[head, 2]
        return fused.T, attention.dense.weight[:, rows].T
    if family == "bert":
        attention = model.encoder.layer[layer].attention
        return attention.self.value.weight[rows].T, attention.output.dense.weight[:, rows].T
    attention = model.model.layers[layer].self_attn
    if family == "phi3":
        return attention.qkv_proj.weight[48:][group].T, attention.o_proj.weight[:, rows].T
    return attention.v_proj.weight[group].T, attention.o_proj.weight[:, rows].T


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "gemma2", "bert"])
def test_matrices_are_the_checkpoints(family: str) -> None:
    model = build(family)
    maps = Maps.of(model, first_mlp=False)
    embedding = model.get_input_embeddings().weight
    head_of = model.get_output_embeddings()
    unembedding = embedding if head_of is None else head_of.weight
    with torch.no_grad():
        for layer in range(len(maps.output)):
            for head in range(4):
                value, output = parts(family, model, layer, head)
                sources = torch.tensor([5, 17, 60])
                expected = embedding[sources] @ value @ output @ unembedding.T
                assert_close(maps.rows(layer, head, sources), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_the_first_mlp_reads_its_own_norm(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        tokens = model.get_input_embeddings().weight
        if family == "gpt2":
            block = model.transformer.h[0]
            # The heads' own bias stays, though they are silent.
            expected = block.mlp(block.ln_2(tokens + block.attn.c_proj.bias))
        elif family == "gpt_neox":
            block = model.gpt_neox.layers[0]
            expected = block.mlp(block.post_attention_layernorm(tokens))
        elif family == "gemma2":
            block = model.model.layers[0]
            expected = block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(tokens)))
        else:
            block = model.model.layers[0]
            expected = block.mlp(block.post_attention_layernorm(tokens))
    maps = Maps.of(model)
    assert_close(maps.first(tokens.detach()), expected, rtol=1e-3, atol=1e-3)
    value, output = parts(family, model, 1, 3)
    written = (expected @ value @ output).detach()
    assert_close(maps.written(1, 3, torch.arange(61)), written, rtol=1e-3, atol=1e-3)
    # The first layer's heads read the embedding itself.
    value, output = parts(family, model, 0, 3)
    assert_close(maps.written(0, 3, torch.arange(61)), (tokens @ value @ output).detach(), rtol=1e-3, atol=1e-3)


def test_a_layer_of_two_parts_is_taken_whole() -> None:
    """T5's attention and MLP are numbered parts of a numbered block."""
    model = build("t5")
    with torch.no_grad():
        tokens = model.get_input_embeddings().weight
        expected = model.encoder.block[0].layer[1](tokens) - tokens
    assert_close(Maps.of(model, "encoder").first(tokens.detach()), expected, rtol=1e-3, atol=1e-4)


def test_a_layer_that_is_normalised_last_gives_its_output() -> None:
    model = build("bert")
    with torch.no_grad():
        block = model.encoder.layer[0]
        tokens = model.get_input_embeddings().weight
        middle = block.attention.output.LayerNorm(tokens + block.attention.output.dense.bias)
        expected = block.output(block.intermediate(middle), middle)
    assert_close(Maps.of(model).first(tokens.detach()), expected, rtol=1e-3, atol=1e-4)


def planted_map() -> tuple[Any, Tensor]:
    """Head 1.4 (of KV head 2) maps every token to the one `step` places on; the vocabulary is orthonormal."""
    loaded = random_llama(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=256
    )
    model, step = loaded.model, 7
    basis = torch.linalg.qr(torch.randn(256, 256)).Q
    targets = (torch.arange(256) + step) % 256
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(basis)
        model.lm_head.weight.copy_(basis)
        attention = model.model.layers[1].self_attn
        attention.v_proj.weight[2 * 256 : 3 * 256] = torch.eye(256)
        attention.o_proj.weight[:, 4 * 256 : 5 * 256] = (basis.T @ basis[targets]).T
    return loaded, targets


def test_a_planted_map_is_found_and_nothing_else() -> None:
    loaded, targets = planted_map()
    maps = Maps.of(loaded, first_mlp=False)
    pairs = [(token, int(targets[token])) for token in range(0, 256, 3)]
    found = maps.relation(pairs)
    assert float(found[1, 4]) == 1.0
    found[1, 4] = 0
    assert float(found.max()) < 0.05
    assert float(maps.relation(pairs, suppress=True).max()) < 0.05
    texts = [(chr(a), chr(b)) for a, b in pairs if 32 < a < 120 and 32 < b < 120]
    assert float(maps.relation([*texts, ("two", "x")])[1, 4]) == 1.0
    with torch.no_grad():
        loaded.model.model.layers[1].self_attn.o_proj.weight *= -1
    assert float(Maps.of(loaded, first_mlp=False).relation(pairs, suppress=True)[1, 4]) == 1.0


def test_salient_mappings_name_the_tokens() -> None:
    loaded, _ = planted_map()
    with torch.no_grad():
        # Tokens 65 and 80 are written three times and twice as large.
        basis = loaded.model.model.embed_tokens.weight
        rows = loaded.model.model.layers[1].self_attn.v_proj.weight[512:768]
        rows += 2 * torch.outer(basis[65], basis[65]) + torch.outer(basis[80], basis[80])
    best, second = Maps.of(loaded, first_mlp=False).salient(1, 4, sources=2, targets=1)
    assert (best.source, best.targets, best.source_text, best.target_texts) == (65, [72], "A", ("H",))
    assert best.saliency == pytest.approx(3.0, abs=1e-4)
    assert (second.source, second.targets, second.source_text) == (80, [87], "P")
    assert second.saliency == pytest.approx(2.0, abs=1e-4)


def test_relation_and_saliency_equal_loops() -> None:
    model = tiny("llama")
    maps = Maps.of(model)
    pairs = [(a, (3 * a + 1) % 61) for a in range(1, 41)]
    for k, suppress in ((1, False), (5, False), (5, True)):
        found = maps.relation(pairs, k=k, suppress=suppress)
        for layer in range(3):
            for head in range(4):
                rows = maps.rows(layer, head, [a for a, _ in pairs]) * (-1 if suppress else 1)
                hits = 0
                for row, (_, target) in zip(rows.tolist(), pairs, strict=True):
                    hits += sum(value > row[target] for value in row) < k
                assert float(found[layer, head]) == pytest.approx(hits / 40)
    written, source = maps.written(2, 1, torch.arange(61)), maps.first(maps.embedding)
    expected = torch.tensor([float(written[i].norm() / source[i].norm()) for i in range(61)])
    assert_close(maps.saliency(2, 1)[1:], expected[1:])


def test_copying_heads_of_the_packaged_model() -> None:
    loaded = load_model()
    table = detect(loaded, ["maps-copy"])
    assert table.found("maps-copy") == [(0, 6)]
    assert table.settings["maps-copy"] == {"on": "parameters"}
    assert_close(table["maps-copy"], Maps.of(loaded).relation([(token, token) for token in range(256)]))


def test_nothing_is_left_behind() -> None:
    model = tiny("llama").train()
    before = model(prompt(1, 5)).logits
    Maps.of(model).salient(1, 1)
    assert model.training
    assert_close(model(prompt(1, 5)).logits, before, rtol=0, atol=0)
    assert not model.model.layers[0]._forward_hooks
    assert not model.model.layers[0]._forward_pre_hooks


def test_what_cannot_be_done_is_told() -> None:
    maps = Maps.of(tiny("llama"))
    for call, words in (
        (lambda: maps.relation([]), "none of the pairs"),
        (lambda: maps.relation([(1, 2)], k=0), "1 to 61"),
        (lambda: maps.relation([("a", "b")]), "without a tokenizer"),
        (lambda: maps.relation([(1, 99)]), "no token ids"),
        (lambda: maps.rows(0, 0, [99]), "no token ids"),
        (lambda: maps.rows(3, 0, [1]), "no head 3.0"),
        (lambda: maps.rows(0, 4, [1]), "no head 0.4"),
        (lambda: Maps.of(build("vit")), "no embedding"),
        (lambda: Maps.of(build("clip")), "no embedding"),
        (lambda: Maps.of(create_attention("softmax", 16, 4)), "no embedding"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError, match="none of the pairs"):
        Maps.of(Loaded(tiny("llama"), None, "bytes")).relation([("two", "x")])
