"""Products and shifts mixed: the router's choice, its balance in loops, and the command line."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.cli import main
from manyheads.convert import measured_latencies, primitive_mixture, settled_mixture, shifted
from manyheads.convert.damage import Judge
from manyheads.convert.primitive_mlp import balance
from manyheads.hosts.loading import load_model

IDS = torch.arange(1, 41).view(2, 20)


def tiny(kind: str = "llama", **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, **more,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).double().eval()


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **more).logits


def sent(made: Any, expert: int) -> Any:
    """Every token to one of the two, by a router whose input is positive in one place."""
    for layer in made.model.stack.layers:
        choice = torch.tensor([1 - expert, expert]).argmax()
        layer.mlp.router = nn.Linear(32, 2).double()
        nn.init.zeros_(layer.mlp.router.weight)
        nn.init.zeros_(layer.mlp.router.bias)
        with torch.no_grad():
            layer.mlp.router.bias[choice] = 100.0
    return made


# gemma2 has norms around its MLPs, llama biases in them.
@pytest.mark.parametrize(("kind", "more"), [("llama", {"mlp_bias": True}), ("gemma2", {"head_dim": 8}), ("phi3", {})])
def test_all_to_one_expert_is_the_host_or_its_shifts(kind: str, more: dict[str, Any]) -> None:
    model = tiny(kind, **more)
    torch.testing.assert_close(logits(primitive_mixture(model, None)), logits(model))
    torch.testing.assert_close(logits(sent(primitive_mixture(model), 0)), logits(model))
    rounded = shifted(model)
    for mine, plain in zip(rounded.model.layers, model.model.layers, strict=True):
        mine.self_attn = plain.self_attn
    torch.testing.assert_close(logits(sent(primitive_mixture(model), 1)), logits(rounded))


def test_each_token_goes_its_way_and_opens_again_as_it_was(tmp_path: Path) -> None:
    model = tiny()
    made = primitive_mixture(model)
    mlp, x = made.model.stack.layers[0].mlp, torch.randn(1, 12, 32, dtype=torch.float64)
    found, rows = mlp(x)[0], mlp.norm(x)[0]
    taken = set()
    for i in range(12):
        scores = (mlp.router.weight @ rows[i]).tolist()
        taken.add(scores[1] > scores[0])
        torch.testing.assert_close(found[i], mlp.experts[int(scores[1] > scores[0])](rows[i : i + 1])[0])
    assert taken == {True, False}
    settled = settled_mixture(made)
    settled.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64")
    torch.testing.assert_close(logits(again), logits(made))
    weight = again.model.stack.layers[1].mlp.experts[1].up_proj.weight.detach()
    torch.testing.assert_close(weight.abs().log2(), weight.abs().log2().round(), rtol=0, atol=0)
    assert type(again.model.stack.layers[0].mlp).__name__ == type(settled.model.stack.layers[0].mlp).__name__


def test_the_balance_in_loops() -> None:
    scores, noisy = (torch.randn(2, 5, 2, dtype=torch.float64) for _ in range(2))
    real = torch.ones(2, 5, dtype=torch.float64)
    real[1, :3] = 0
    total = 0.0
    for odds in (False, True):
        load = [0.0, 0.0]
        for b in range(2):
            for i in range(5):
                for e, cost in ((0, 6.0), (1, 4.0)):
                    own, other = float(scores[b, i, e]), float(scores[b, i, 1 - e])
                    if odds:
                        z = (own - float(noisy[b, i, 1 - e])) / 0.5
                        share = 0.5 * math.erfc(-z / math.sqrt(2))
                    else:
                        share = math.exp(own) / (math.exp(own) + math.exp(other))
                    load[e] += cost * share * float(real[b, i])
        mean = sum(load) / 2
        total += sum((each - mean) ** 2 for each in load) / mean**2
    assert float(balance(scores, noisy, real, (6.0, 4.0))) == pytest.approx(total, rel=1e-9)


def test_the_dearer_expert_gets_fewer_tokens() -> None:
    """Trained on the balance alone, the shares of tokens become those of the other's cost."""
    torch.manual_seed(0)
    x = torch.randn(1, 1000, 8)
    router = nn.Linear(8, 2)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(100):
        scores = router(x)
        loss = balance(scores, scores + 0.5 * torch.randn_like(scores), torch.ones(1, 1000), (3.0, 1.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    share = float(router(x).softmax(-1)[..., 0].detach().mean())
    assert share == pytest.approx(0.25, abs=0.05)


def test_router_and_both_experts_learn_and_padding_does_not_count() -> None:
    made = primitive_mixture(tiny()).train()
    out = made(IDS, labels=IDS)
    assert out.aux_loss is not None
    out.loss.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    made.eval()
    mask = torch.ones(2, 26, dtype=torch.long)
    mask[:, :6] = 0
    losses = []
    for filler in (1, 9):
        padded = torch.cat([torch.full((2, 6), filler), IDS], 1)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            losses.append(made(padded, attention_mask=mask, labels=padded).aux_loss.detach())
    torch.testing.assert_close(losses[0], losses[1])


def test_the_command_line_mixes_heals_and_writes_what_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, measure = [], Judge.measure

    def once(self: Judge, model: Any, tell: Any) -> dict[str, Any]:
        figures.append(figures[0] if figures else measure(self, model))
        return figures[0]

    monkeypatch.setattr(Judge, "measure", once)
    small = ["--windows", "1", "--keys", "1", "--length", "128"]
    out = tmp_path / "made"
    with pytest.raises(SystemExit) as end:
        main(["convert", "--to", "shiftadd", "--mixture", "--heal", "1k", *small, "--out", str(out)])
    assert not end.value.code
    rows = json.loads((out / "conversion.json").read_text())["rows"]
    assert [row["title"] for row in rows][2] == "shifts of 5 bits, mixed with products, healed"
    model = load_model(out).model
    weight = model.model.stack.layers[1].mlp.experts[1].up_proj.weight.detach()
    torch.testing.assert_close(weight.abs().log2(), weight.abs().log2().round(), rtol=0, atol=0)
    with pytest.raises(SystemExit) as end:
        main(["convert", "check", str(out)])
    assert not end.value.code


def test_what_a_mixture_refuses() -> None:
    with pytest.raises(ValueError, match="want what a token costs"):
        primitive_mixture(tiny(), latencies=(1.0, 0.0))
    with pytest.raises(ValueError, match="--bits 1: want 2 to 8"):
        primitive_mixture(tiny(), 1)
    with pytest.raises(SystemExit):
        main(["convert", "--to", "gqa", "--mixture"])


def test_latencies_are_those_of_the_two_experts() -> None:
    """One of them delayed by a hook: its figure grows by that, and the balance takes the pair."""
    made = primitive_mixture(tiny())
    first = made.model.stack.layers[0].mlp.experts[0]
    hook = first.register_forward_hook(lambda module, args, output: time.sleep(0.02))
    products, shifts = measured_latencies(made, tokens=4, turns=3)
    hook.remove()
    assert products > 0.02 * 1e6 / 4 > 0
    assert shifts > 0
    again = primitive_mixture(tiny(), latencies=(products, shifts))
    assert again.model.stack.layers[0].mlp.latencies == (products, shifts)
    with pytest.raises(ValueError, match="turns=0"):
        measured_latencies(made, turns=0)
