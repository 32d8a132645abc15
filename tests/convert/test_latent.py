"""Grouped heads into a latent: the identities, the attention in loops, and what DeepseekV3 has no place for."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.convert import methods
from manyheads.convert.damage import Judge, Sizes, calibration_rows
from manyheads.convert.grouped import grouped
from manyheads.convert.latent import full_rank, latent
from manyheads.convert.layout import attentions
from manyheads.convert.method import prove
from manyheads.convert.methods import Latent
from manyheads.convert.rorope import rorope, split, turns
from manyheads.hosts.loading import load_model
from manyheads.hosts.questions import Questions, library_text

ROWS = [list(range(1, 41)), list(range(40, 0, -1))]
SIZES = {
    "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "num_hidden_layers": 2,
    "intermediate_size": 24, "vocab_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "sliding_window": None,
}  # fmt: skip


def tiny(kind: str = "llama", **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    return model


def logits(model: Any, places: Any = None) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.tensor(ROWS)  # without a mask, equal places would be documents of one token each
        return model(ids, position_ids=places, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_turned_keys_that_all_keep_their_positions_compute_the_same(kind: str) -> None:
    """RoRoPE with one fold; with two, components of one frequency are turned by another."""
    model = tiny(kind, head_dim=8)
    made = rorope(model, calibration=ROWS)
    mechanism = made.model.stack.layers[0].self_attn.mechanism
    assert (mechanism.kv_heads, mechanism.head_dim) == (1, 32)
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-5, atol=1e-5)
    folded = rorope(model, fold=2, calibration=ROWS)
    assert (logits(folded) - logits(model)).abs().max() > 1e-2


def test_components_in_loops_and_scores_to_the_last_digit() -> None:
    """Two heads of 8 features in blocks of two frequencies: the matrix against complex sums."""
    torch.manual_seed(0)
    keys, query = torch.randn(50, 2, 8).double(), torch.randn(2, 8).double()
    flat = keys.flatten(1)
    matrix, frequencies = turns(flat.T @ flat, 2, 8, 2)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16).double())
    assert frequencies == [0, 1, 0, 1, 2, 3, 2, 3]
    k = torch.complex(keys[..., :4], keys[..., 4:])  # [tokens, head, frequency]
    row = 0
    for block in range(2):
        parts = [k[:, g, 2 * block + f] for g in range(2) for f in range(2)]
        joint = torch.stack([torch.stack([(a * b.conj()).real.sum() for b in parts]) for a in parts])
        energies = torch.linalg.eigvalsh(joint).flip(0)
        for a in range(4):
            component = torch.complex(flat @ matrix[row], flat @ matrix[row + 1])
            torch.testing.assert_close(component.abs().square().sum(), energies[a])
            row += 2
    # One fold: each pair's components turn with that pair's frequency, and scores stay as they are.
    matrix, frequencies = turns(flat.T @ flat, 2, 8, 1)
    for g in range(2):
        whole = torch.zeros(16).double()
        whole[8 * g : 8 * g + 8] = query[g]
        a, b = matrix @ whole, matrix @ flat[3]
        q, c = torch.complex(a[::2], a[1::2]), torch.complex(b[::2], b[1::2])
        angle = torch.tensor([0.7 ** (f + 1) for f in frequencies]).double()
        turned = (q * torch.exp(-1j * angle) * c.conj()).real.sum()
        own = sum(
            (torch.complex(query[g, p], query[g, p + 4]) * torch.exp(torch.tensor(-1j * 0.7 ** (p + 1)))
             * torch.complex(keys[3, g, p], keys[3, g, p + 4]).conj()).real
            for p in range(4)
        )  # fmt: skip
        torch.testing.assert_close(turned, own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("rope_dim", "fold", "wanted"),
    [
        (8, 1, [(0, 0), (1, 0), (2, 0), (3, 0)]),
        (8, 2, [(0, 0), (0, 1), (1, 0), (1, 1)]),
        (4, 2, [(0, 0), (1, 0)]),  # frequencies 0 and 2
        (4, 4, [(0, 0), (0, 1)]),
        (4, 1, [(0, 0), (2, 0)]),
        (2, 2, [(0, 0)]),
    ],
)
def test_which_components_keep_their_positions(rope_dim: int, fold: int, wanted: list[tuple[int, int]]) -> None:
    """(block, component), in the order of frequencies that a rotary embedding of rope_dim features has."""
    moment = torch.randn(60, 16).double()
    moment = moment.T @ moment
    matrix, _ = turns(moment, 2, 8, fold)
    keep, lose = split(moment, 2, 8, rope_dim, fold)
    for place, (block, component) in enumerate(wanted):
        row = 2 * (block * 2 * fold + component)
        torch.testing.assert_close(keep[2 * place : 2 * place + 2], matrix[row : row + 2])
    both = torch.cat([keep, lose])
    torch.testing.assert_close(both @ both.T, torch.eye(16).double())


@pytest.mark.parametrize(("rope_dim", "fold"), [(8, 2), (4, None), (4, 1), (4, 4), (2, 2), (2, 4)])
def test_fewer_rotary_features_and_folds_are_exact_where_positions_turn_nothing(rope_dim: int, fold: Any) -> None:
    model = tiny(head_dim=8)
    made = latent(model, full_rank(model, rope_dim), rope_dim=rope_dim, fold=fold, calibration=ROWS)
    assert made.config.qk_rope_head_dim == rope_dim
    still = torch.zeros(2, 40, dtype=torch.long)
    torch.testing.assert_close(logits(made, still), logits(model, still), rtol=1e-5, atol=1e-5)


def test_every_format_computes_the_same_and_ours_decodes_from_the_latents() -> None:
    model = tiny(head_dim=8)
    arguments: Any = {"rope_dim": 4, "calibration": ROWS}
    wanted = logits(latent(model, 12, **arguments))
    youtu = latent(model, 12, format="youtu", **arguments)
    assert type(youtu).__name__ == "YoutuForCausalLM"
    torch.testing.assert_close(logits(youtu), wanted, rtol=1e-8, atol=1e-8)
    ours = latent(model, 12, format="manyheads", **arguments)
    torch.testing.assert_close(logits(ours), wanted, rtol=1e-5, atol=1e-5)
    ids, mechanism = torch.tensor(ROWS), ours.model.stack.layers[0].self_attn.mechanism
    calls: list[int] = []
    with torch.no_grad():
        past = ours(ids[:, :38], use_cache=True).past_key_values
        absorbed = mechanism._absorbed
        mechanism._absorbed = lambda *args: calls.append(1) or absorbed(*args)
        steps = [ours(ids[:, i : i + 1], past_key_values=past).logits for i in (38, 39)]
    assert len(calls) == 2
    # Absorbed = expanded.
    torch.testing.assert_close(torch.cat(steps, 1), wanted[:, 38:], rtol=1e-5, atol=1e-5)


def test_the_best_fold_is_chosen_on_the_calibration_text() -> None:
    model = tiny(head_dim=8)
    ids = torch.tensor(ROWS)

    def loss(fold: Any) -> float:
        with torch.no_grad():
            made = latent(model, 24, rope_dim=4, fold=fold, calibration=ROWS)
            return float(made(ids, labels=ids).loss)

    tried = [loss(fold) for fold in (1, 2, 4)]
    rises = next((n for n in (1, 2) if tried[n] >= tried[n - 1]), 3)
    assert loss("auto") == pytest.approx(tried[rises - 1], abs=1e-9)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_where_positions_turn_nothing_the_full_rank_is_exact(kind: str, kv_heads: int) -> None:
    model = tiny(kind, num_key_value_heads=kv_heads)
    made = latent(model, full_rank(model), calibration=ROWS)
    assert type(made).__name__ == "DeepseekV3ForCausalLM"
    still = torch.zeros(2, 40, dtype=torch.long)
    torch.testing.assert_close(logits(made, still), logits(model, still), rtol=1e-5, atol=1e-5)
    apart = (logits(made) - logits(model)).abs().max()
    assert (apart < 1e-4) == (kv_heads == 1)  # one head has no component that loses its positions


def test_scores_and_values_in_loops() -> None:
    """The first layer at full rank: the first component of the keys keeps its positions, the others lose them."""
    model = tiny(num_hidden_layers=1)
    made = latent(model, full_rank(model), calibration=ROWS)
    (layer,) = attentions(model)
    x = torch.randn(1, 6, 32).double()
    places = torch.arange(6)[None]
    angle = places[0, :, None] * model.model.rotary_emb.inv_freq.double()
    q, k, v = (getattr(layer.module, f"{p}_proj")(x)[0].view(6, -1, 4) for p in "qkv")
    pairs = [torch.complex(t[..., :2], t[..., 2:]) for t in (q, k)]
    rows = torch.tensor(ROWS)
    with torch.no_grad():
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(rows))
        seen = layer.module.k_proj(hidden).view(-1, 4, 4)
    wanted = torch.zeros(6, 8, 4).double()
    turns = []
    for p in range(2):
        c = torch.complex(seen[..., p], seen[..., p + 2])
        turns.append(torch.linalg.eigh((c.T @ c.conj()).real)[1].flip(1))
    for h in range(8):
        g = h // 2
        for i in range(6):
            scores = torch.zeros(i + 1).double()
            for j in range(i + 1):
                for p in range(2):
                    for a in range(4):
                        component = sum(turns[p][g2, a] * pairs[1][j, g2, p] for g2 in range(4))
                        turn = torch.exp(1j * (angle[i, p] - angle[j, p])) if a == 0 else 1.0
                        query = turns[p][g, a] * pairs[0][i, h, p] * turn
                        scores[j] += (query * component.conj()).real / 2.0
            weights = scores.softmax(0)
            wanted[i, h] = sum(weights[j] * v[j, g] for j in range(i + 1))
    wanted = wanted.flatten(1) @ layer.module.o_proj.weight.T
    attention = made.model.layers[0].self_attn
    past = torch.full((6, 6), -torch.inf).triu(1).double()[None, None]
    made.set_attn_implementation("eager")
    out = attention(x, position_embeddings=made.model.rotary_emb(x, places), attention_mask=past)[0]
    torch.testing.assert_close(out[0], wanted, rtol=1e-5, atol=1e-5)


def test_a_lower_rank_loses_more_and_bfloat16_keeps_the_constant_channel() -> None:
    model = tiny()
    full = latent(model, full_rank(model), calibration=ROWS)
    gaps = [(logits(latent(model, rank, calibration=ROWS)) - logits(full)).abs().mean() for rank in (24, 16, 8)]
    assert gaps[0] < gaps[1] < gaps[2]
    small = tiny().bfloat16()
    low = latent(small, full_rank(small), calibration=ROWS)
    assert next(low.parameters()).dtype == torch.bfloat16
    scale = logits(full).abs().max()
    own = (logits(small).double() - logits(model)).abs().mean() / scale
    torch.testing.assert_close((logits(low).double() - logits(full)).abs().mean() / scale, own, rtol=0, atol=0.02)


def test_decoding_with_its_cache_equals_one_pass() -> None:
    made = latent(tiny(), 12, calibration=ROWS)
    ids = torch.tensor(ROWS)
    with torch.no_grad():
        first = made(ids[:, :30], use_cache=True)
        later = made(ids[:, 30:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(later, logits(made)[:, 30:], rtol=1e-6, atol=1e-6)
    layer = first.past_key_values.layers[0]
    assert layer.keys.shape[-1] + layer.values.shape[-1] == 12 + 1 + 4


def test_an_activation_that_only_the_stock_class_has() -> None:
    """Our model has no place for it, so that only its format is refused, and the turned keys are not tried."""
    model = tiny(hidden_act="relu")
    prove(Latent(), model, [28], ROWS)
    with pytest.raises(ValueError, match="for which our model has no place"):
        latent(model, 28, format="manyheads", calibration=ROWS)


def test_the_identities_are_tried_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    claims = [identity.claim for identity in Latent(format="youtu").identities(tiny(), [28], ROWS)]
    assert [claim.split(",")[0] for claim in claims] == [
        "the full rank where positions turn nothing", "keys turned", "youtu",
    ]  # fmt: skip
    prove(Latent(rope_dim=2, format="youtu"), tiny(), [28], ROWS)
    monkeypatch.setattr(methods, "rorope", lambda model, calibration: rorope(model, fold=2, calibration=calibration))
    with pytest.raises(RuntimeError, match="keys turned"):
        prove(Latent(), tiny(), [28], ROWS)


def test_what_the_target_has_no_place_for_is_refused() -> None:
    with pytest.raises(ValueError, match="no converter to a latent"):
        latent(tiny("qwen2"), 8, calibration=ROWS)
    with pytest.raises(ValueError, match="has biases in its attention"):
        latent(tiny(attention_bias=True), 8, calibration=ROWS)
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rotary scaling 'linear'"):
        latent(tiny(rope_parameters=scaled), 8, calibration=ROWS)
    with pytest.raises(ValueError, match="sliding window"):
        latent(tiny("mistral", sliding_window=8), 8, calibration=ROWS)
    with pytest.raises(ValueError, match="--rank 29: want 1 to 28"):
        latent(tiny(), 29, calibration=ROWS)
    with pytest.raises(ValueError, match="--norm 'none'"):
        latent(tiny(), 8, norm="none", calibration=ROWS)
    with pytest.raises(ValueError, match="needs calibration text"):
        latent(tiny(), 8)
    with pytest.raises(ValueError, match=r"--rope-dim 3: want an even divisor of LlamaForCausalLM's head size 4: 2, 4"):
        latent(tiny(), 8, rope_dim=3, calibration=ROWS)
    with pytest.raises(ValueError, match=r"--fold 3: want a divisor of LlamaForCausalLM's 2 frequencies .*: 1, 2"):
        latent(tiny(), 8, fold=3, calibration=ROWS)
    with pytest.raises(ValueError, match="--format 'gguf': want one of deepseek_v3, youtu, manyheads"):
        latent(tiny(), 8, format="gguf", calibration=ROWS)
    with pytest.raises(ValueError, match="--rank 31: want 1 to 30"):
        latent(tiny(), 31, rope_dim=2, calibration=ROWS)


def test_at_equal_bytes_a_latent_costs_less_than_fewer_heads() -> None:
    """The paper's claim, on the packaged model: half of the cache, before any training."""
    loaded = load_model()
    rows = calibration_rows(Questions(loaded, text=library_text(), seed=1), 2048, 256)
    judge = Judge(loaded, Questions(loaded), Sizes(windows=2, length=256, keys=1, key_length=192))
    pooled = judge.distance(grouped(loaded.model, 2, calibration=rows))
    made = judge.distance(latent(loaded.model, 96, calibration=rows))
    fitted = judge.distance(latent(loaded.model, 96, norm="fitted", calibration=rows))
    assert made["kl_bits"] < fitted["kl_bits"] < pooled["kl_bits"]
    assert made["kl_bits"] < 0.5 * pooled["kl_bits"]
