"""Mechanisms made to take over a trained layer: softmax's equal at their limit, and what they learn from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.cli import main
from manyheads.convert.cases import as_softmax, case_spec
from manyheads.convert.hosted import hosted
from manyheads.convert.imitation import LOSSES, transfer
from manyheads.convert.methods import Hosted
from manyheads.hosts.loading import load_model

ROWS = [list(range(1, 31)), list(range(30, 0, -1))]
SIZES = {
    "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "num_hidden_layers": 2,
    "intermediate_size": 24, "vocab_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "sliding_window": None,
}  # fmt: skip
SMALL = ["--windows", "1", "--keys", "2", "--length", "128", "--calibrate", "256"]


def tiny(kind: str = "llama", **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@torch.no_grad()
def logits(model: Any, **more: Any) -> torch.Tensor:
    return model(torch.tensor(ROWS), **more).logits


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["convert", *arguments])
    return int(end.value.code or 0)


# qwen2 has biases, qwen3 norms of queries and keys and heads of a width of their own: all must come along.
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["cca", "hedgehog", "moh", "mswa"])
def test_at_its_limit_it_is_the_host(name: str, kind: str) -> None:
    model = tiny(kind, **({"head_dim": 6} if kind == "qwen3" else {}))
    spec = as_softmax(case_spec({"name": name}, 8), 8)
    assert spec is not None
    made = hosted(model, spec, [0, 1])
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-5, atol=1e-5)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :9] = 0
    padded = [
        logits(m, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))[1, 9:] for m in (made, model)
    ]
    torch.testing.assert_close(*padded, rtol=1e-5, atol=1e-5)
    told = [m.generate(torch.tensor(ROWS)[:, :12], max_new_tokens=6, do_sample=False) for m in (made, model)]
    torch.testing.assert_close(*told)


def test_a_conversion_is_refused_whose_limit_is_not_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    from manyheads.convert.method import prove
    from manyheads.mechanisms.linear import hedgehog

    method, model = Hosted({"name": "hedgehog", "window": 4}, (0,)), tiny()
    prove(method, model, (1,), [])
    right = hedgehog.near_far_read
    monkeypatch.setattr(hedgehog, "near_far_read", lambda q, *args, **kwargs: right(1.3 * q, *args, **kwargs))
    with pytest.raises(RuntimeError, match="hedgehog that is softmax's equal"):
        prove(method, model, (1,), [])


@pytest.mark.parametrize("name", ["cca", "hedgehog", "moh", "mswa"])
@pytest.mark.parametrize(("kind", "more"), [("gemma2", {"sliding_window": 8}), ("mistral", {"sliding_window": 8})])
def test_a_host_whose_cap_or_window_has_no_place_is_converted_all_the_same(
    kind: str, more: dict[str, Any], name: str
) -> None:
    from manyheads.convert.cases import case_spec
    from manyheads.convert.method import prove

    model = tiny(kind, **more)
    method = Hosted(case_spec({"name": name}, 8), (0, 1))
    held = prove(method, model, (2,), [])
    assert all(each["gap"] < 1e-5 for each in held)
    assert logits(method.make(model, 2, [])).isfinite().all()


def test_a_window_decodes_in_a_bounded_state_as_in_one_pass() -> None:
    made = hosted(tiny(), {"name": "hedgehog", "window": 4}, [0, 1])
    row = torch.tensor(ROWS[:1])
    out = made(row[:, :20], use_cache=True)
    sizes, parts = [], [out.logits]
    for t in range(20, 30):
        out = made(row[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
        sizes.append(out.past_key_values.layers[0].nbytes)
    torch.testing.assert_close(torch.cat(parts, 1), logits(made)[:1])
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("spec", [{"name": "hedgehog", "window": 4}, {"name": "hedgehog"}])
@pytest.mark.parametrize("loss", LOSSES)
def test_transfer_brings_it_nearer(loss: str, spec: dict[str, Any]) -> None:
    model = tiny().float()
    made = hosted(model, spec, [1])
    before = {name: value.clone() for name, value in made.state_dict().items()}
    apart = (logits(made) - logits(model)).square().mean()
    losses = transfer(made, model, [1], ROWS, steps=30, loss=loss, rate=1e-2)
    assert losses[-1] < losses[0]
    assert (logits(made) - logits(model)).square().mean() < apart
    changed = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert all("layers.1.self_attn.mechanism" in name for name in changed)
    if loss != "output":  # as published, the host's own weights stay
        assert {name.rsplit(".", 1)[1] for name in changed} == {"q_map", "k_map"} | (
            {"window_factor"} if "window" in spec else set()
        )
    assert all(parameter.requires_grad for parameter in made.parameters())


@torch.no_grad()
def test_the_published_losses_are_their_equations() -> None:
    model = tiny()
    made = hosted(model, {"name": "hedgehog", "window": 4}, [1])
    teacher = hosted(model)
    seen: list[torch.Tensor] = []
    softmax, learner = (m.model.stack.layers[1].self_attn.mechanism for m in (teacher, made))
    softmax.register_forward_hook(lambda module, args, result: seen.append(args[0]))
    teacher(torch.tensor(ROWS[:1]), use_cache=False)
    wanted, found = (m(seen[0], need_weights=True).weights for m in (softmax, learner))
    _, _, values = softmax.project(seen[0], seen[0])
    apart = (found - wanted) @ values.repeat_interleave(2, 1)
    entropy, n = 0.0, 30
    for h in range(8):
        for i in range(n):
            for j in range(i + 1):
                entropy -= float(wanted[0, h, i, j]) * float(found[0, h, i, j].log()) / (8 * n)
    with torch.enable_grad():
        for loss, value in (("heads", 1000 * float(apart.square().mean())), ("weights", entropy)):
            told = transfer(made, model, [1], ROWS[:1], steps=1, loss=loss, rate=1e-9)
            assert told[0] == pytest.approx(value, rel=1e-6)


def test_moh_keeps_its_host_whole_until_heads_are_off_and_learns_while_they_are() -> None:
    model = tiny()
    spec = case_spec({"name": "moh"}, 8, active=0.75)
    assert spec == {"name": "moh", "routing": "query-norm", "shared_heads": 4, "active_heads": 2}
    made = hosted(model, spec, [0, 1])
    assert (logits(made) - logits(model)).abs().max() > 0.1
    ids = torch.tensor(ROWS)
    out = made.train()(ids, labels=ids)
    assert out.aux_loss is not None  # the balance of heads is part of what healing learns from
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    routed = {name for name, _ in made.named_parameters()} - {name for name, _ in hosted(model).named_parameters()}
    assert routed == set()  # no router: the weights are those of the host


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        (["--to", "hedgehog", "--window", "16", "--transfer", "2", "--layers", "0-1"], "hedgehog in 2 layers, taught"),
        (["--to", "moh", "--active", "0.75", "--heal", "1k", "--layers", "1"], "moh in 1 layers, healed"),
    ],
)
def test_the_command_line_writes_a_folder_that_opens(
    arguments: list[str], title: str, halved: str, tmp_path: Path
) -> None:
    out = tmp_path / "made"
    assert run(halved, *arguments, *SMALL, "--out", str(out)) == 0
    rows = json.loads((out / "conversion.json").read_text())["rows"]
    assert any(title in row["title"] for row in rows)
    assert rows[1]["kl_bits"] > 0
    assert run("check", str(out)) == 0
    told = load_model(out).model.generate(torch.tensor([list(b"def at")]), max_new_tokens=20, do_sample=False)
    assert told.shape == (1, 26)


def test_shifts_are_written_as_the_class_they_were_and_stay_shifts_after_healing(halved: str, tmp_path: Path) -> None:
    out = tmp_path / "made"
    assert run(halved, "--to", "shiftadd", "--heal", "1k", *SMALL, "--out", str(out)) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    torch.testing.assert_close(weight.abs().log2(), weight.abs().log2().round(), rtol=0, atol=0)
    assert run("check", str(out)) == 0
    rows = json.loads((out / "conversion.json").read_text())["rows"]
    assert [row["title"] for row in rows][1:3] == ["shifts of 5 bits", "shifts of 5 bits, healed"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "gqa", "--window", "4"], "--window belongs to a mechanism"),
        (["--to", "softmax", "--window", "4"], "--window belongs to a mechanism with window"),
        (["--to", "hedgehog", "--window", "0"], "--window 0: want a number of tokens"),
        (["--to", "hedgehog[window=8]", "--window", "4"], "say the same: give one of them"),
        (["--to", "hedgehog", "--active", "0.5"], "--active belongs to a mechanism with active_heads"),
        (["--to", "moh", "--active", "0.5"], "of 8 heads 4 are always on; want a share from 0.625 to 1"),
        (["--to", "moh", "--active", "1.5"], "want a share from 0.625 to 1"),
        (["--to", "hedgehog", "--transfer-loss", "heads"], "give --transfer STEPS with it"),
        (["--to", "hedgehog", "--transfer", "1", "--transfer-loss", "kl"], "--transfer-loss 'kl': want one of"),
        (["--to", "moh", "--transfer", "1", "--transfer-loss", "heads"], "have nothing to train"),
        (["--to", "shiftadd", "--bits", "1"], "--bits 1: want 2 to 8"),
        (["--to", "shiftadd", "--budget-bytes", "99"], "leaves as it is: give --bits"),
        (["--to", "gqa", "--bits", "5"], "--bits belongs to --to shiftadd"),
    ],
)
def test_what_is_refused(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, *arguments, "--out", str(tmp_path / "out")) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
