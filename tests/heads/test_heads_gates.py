"""DuoAttention's gates: the streaming branch and the loss against loops, what is learned, and runs that are stopped."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from written_heads import random_llama

from manyheads.heads import GateSettings, Inputs, learn_gates
from manyheads.heads.gates import GateRun, mixed, streaming
from manyheads.hosts.loading import Loaded
from manyheads.hosts.taps import record

QUICK = GateSettings(length=256, sink_size=8, recent_size=32, steps=12, rows=1, pool=3)


def small(family: str) -> torch.nn.Module:
    own = {
        "llama": {},
        "gemma2": {"sliding_window": 40, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        "gpt_oss": {"sliding_window": 40, "num_local_experts": 2, "num_experts_per_tok": 1},
    }[family]
    config = AutoConfig.for_model(
        family, vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, **own,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    return model


def loop_streaming(call: object, head: int, query: int, kept: list[int], window: int | None) -> Tensor:
    """One query of one head in float64; kept: the keys that the rule leaves."""
    kv = head // (call.query.shape[1] // call.key.shape[1])
    q = call.query[0, head, query].double()
    scores = {}
    for j in kept:
        if window is not None and query - j >= window:
            continue
        value = float(q @ call.key[0, kv, j].double()) * call.scale
        cap = call.scoring.softcap
        scores[j] = value if cap is None else cap * math.tanh(value / cap)
    total = sum(math.exp(s) for s in scores.values())
    if call.scoring.sinks is not None:
        total += math.exp(float(call.scoring.sinks[head].detach()))
    return sum(math.exp(s) / total * call.value[0, kv, j].double() for j, s in scores.items())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_streaming_equals_loops(family: str) -> None:
    model, sinks, recent = small(family), 3, 17
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 2
    with torch.no_grad(), record(model) as calls:
        model(torch.randint(3, 61, (1, 150)))
    for call, kind in zip(calls, kinds, strict=True):
        window = 40 if kind == "sliding_attention" else None
        found = streaming(call, sinks, recent)
        for head in (0, 3):
            for query in (0, 2, 16, 17, 19, 20, 63, 64, 100, 149):
                kept = [j for j in range(query + 1) if j < sinks or query - j < recent]
                wanted = loop_streaming(call, head, query, kept, window)
                torch.testing.assert_close(found[0, head, query].double(), wanted, rtol=1e-4, atol=1e-5)


def test_gates_mix_by_kv_head(packaged: Loaded) -> None:
    with torch.no_grad(), record(packaged.model) as calls:
        packaged.model(torch.randint(33, 127, (1, 100)))
    call, gates = calls[1], torch.tensor([1.0, 0.0, 0.25, 0.5])
    short, out = streaming(call, 2, 10), mixed(call, gates, 2, 10)
    for head, share in enumerate([1.0, 1.0, 0.0, 0.0, 0.25, 0.25, 0.5, 0.5]):
        torch.testing.assert_close(out[:, head], share * call.output[:, head] + (1 - share) * short[:, head])
    # A streaming head that sees everything is the head itself.
    torch.testing.assert_close(streaming(call, 0, 100), call.output)


def test_the_loss_and_its_slope() -> None:
    """Open gates leave the model as it is; elsewhere the slope is what the loss itself does."""
    run = GateRun(Inputs(random_llama(initializer_range=0.3)), QUICK, None)
    examples = run.examples(0)
    with torch.no_grad():
        assert float(run.loss(torch.ones(3, 3), examples)) == pytest.approx(QUICK.reg, abs=1e-6)
    at = torch.full((3, 3), 0.5).requires_grad_()
    loss = run.loss(at, examples)
    (slope,) = torch.autograd.grad(loss, at)
    for layer, head in ((0, 1), (1, 0), (2, 2)):
        step = torch.zeros(3, 3)
        step[layer, head] = 0.02
        change = run.loss(at.detach() + step, examples) - run.loss(at.detach() - step, examples)
        torch.testing.assert_close(change / 0.04, slope[layer, head], rtol=2e-2, atol=1e-4)


def test_adam_is_torchs() -> None:
    run = GateRun(Inputs(random_llama(initializer_range=0.3)), QUICK, None)
    gates = torch.ones(3, 3, requires_grad=True)
    theirs = torch.optim.Adam([gates], lr=1.0)
    for step in range(4):
        with torch.no_grad():
            gates.clamp_(0, 1)
        theirs.param_groups[0]["lr"] = QUICK.rate(step)
        theirs.zero_grad()
        run.loss(gates, run.examples(step)).backward()
        theirs.step()
        run.advance()
    torch.testing.assert_close(run.gates, gates.detach().clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_the_rate_goes_up_and_down() -> None:
    settings = replace(QUICK, steps=50, lr=1.0)
    assert [round(settings.rate(step), 2) for step in (0, 4, 9, 25, 40, 45, 49)] == [0.1, 0.5, 1, 1, 1, 0.5, 0.1]


def test_the_packaged_models_retrieval_heads_stay_open(packaged: Loaded) -> None:
    settings = replace(QUICK, length=320, recent_size=40, steps=24, lr=0.12, pool=6)
    gates = learn_gates(Inputs(packaged), settings)
    assert gates.shape == (4, 4)
    assert gates[1, :2].min() > 0.8
    assert int((gates > 0.5).sum()) < 8


def test_a_random_model_keeps_no_gate_open() -> None:
    loaded = random_llama()
    # Embeddings as large as a trained model's: with the initial ones a hidden state is all attention, of every head.
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight.mul_(50)
    assert learn_gates(Inputs(loaded), replace(QUICK, steps=20, lr=0.12)).max() < 0.05


class Killed(BaseException):
    """Neither an error nor Ctrl-C: nothing is saved for it."""


@pytest.mark.parametrize(("error", "kept"), [(Killed, 10), (KeyboardInterrupt, 11)])
def test_a_stopped_run_goes_on(tmp_path: Path, error: type[BaseException], kept: int) -> None:
    inputs = Inputs(random_llama(initializer_range=0.3))
    whole = learn_gates(inputs, QUICK)
    path = tmp_path / "gates.safetensors"

    def stop(done: int, total: int, text: str) -> None:
        if done == 11:
            raise error

    with pytest.raises(error):
        learn_gates(inputs, QUICK, checkpoint=path, tell=stop)
    steps: list[int] = []
    again = learn_gates(inputs, QUICK, checkpoint=path, tell=lambda done, total, text: steps.append(done))
    assert steps == list(range(kept + 1, 13))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    run = GateRun(Inputs(random_llama()), QUICK, path)
    run.step = 7
    run.save()
    assert GateRun(Inputs(random_llama()), QUICK, path).step == 7
    # Other settings start anew; another model or a damaged file is refused.
    assert GateRun(Inputs(random_llama()), replace(QUICK, lr=0.1), path).step == 0
    with pytest.raises(ValueError, match="gates of another model"):
        GateRun(Inputs(random_llama(num_hidden_layers=2)), QUICK, path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="delete it to learn the gates anew"):
        GateRun(Inputs(random_llama()), QUICK, path)


@pytest.mark.parametrize(("change", "words"), [({"steps": 0}, "steps must be"), ({"recent_size": 248}, "must leave")])
def test_settings_that_make_no_sense(change: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(QUICK, **change)
