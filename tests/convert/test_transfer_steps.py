"""Attention transfer, step by step: what a step computes, and runs that were stopped, which go on bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.cli import main
from manyheads.convert import hosted, imitation, transfer
from manyheads.convert import loop as loop_module
from manyheads.convert.damage import Judge
from manyheads.convert.keeping import forget

ROWS = [list(range(1, 13)), list(range(13, 1, -1)), list(range(2, 18))]
SMALL = ["--windows", "1", "--keys", "1", "--length", "128", "--calibrate", "256"]


def tiny() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
        "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


class Killed(BaseException):
    pass


def stop_at(step: int) -> Any:
    def tell(done: int, total: int, text: str = "") -> None:
        if done == step:
            raise Killed

    return tell


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.state_dict().items()}


# shaw begins with tables that are drawn, routing-transformer moves buffers in training, nats draws in every pass.
@pytest.mark.parametrize(
    ("spec", "loss"),
    [
        ({"name": "hedgehog", "window": 4}, "heads"),
        ({"name": "hedgehog"}, "weights"),
        ({"name": "shaw"}, "output"),
        ({"name": "routing-transformer", "window": 8}, "output"),
        ({"name": "nats", "window": 8}, "output"),
    ],
)
def test_a_stopped_transfer_goes_on_bit_for_bit(
    spec: dict[str, Any], loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> Any:
        model = tiny()
        torch.seed()  # another process draws other numbers
        return hosted(model, spec, [0, 2])

    def learnt(**more: Any) -> tuple[Any, list[float]]:
        model = made()
        losses = transfer(model, tiny(), [0, 2], ROWS, steps=6, loss=loss, **more)
        return weights(model), losses

    whole, losses = learnt()
    monkeypatch.setattr(loop_module, "KEEP_EVERY", 0.0)
    keep = tmp_path / "kept"
    with pytest.raises(Killed):
        learnt(keep=keep, tell=stop_at(4))
    again, rest = learnt(keep=keep)
    assert rest == losses[3:]
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert any(not torch.equal(value, whole[name]) for name, value in weights(made()).items())
    # What has ended is not done again, and gives the same.
    ended, none = learnt(keep=keep, tell=stop_at(1))
    assert none == []
    torch.testing.assert_close(ended, whole, rtol=0, atol=0)
    forget(keep)
    assert list(tmp_path.iterdir()) == []


def test_only_the_same_transfer_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "KEEP_EVERY", 0.0)
    keep, spec = tmp_path / "kept", {"name": "hedgehog", "window": 4}
    changed: list[tuple[dict[str, Any], list[int], Any, dict[str, Any]]] = [
        ({"name": "hedgehog", "window": 8}, [0, 2], ROWS, {}),  # of the same weights
        (spec, [0, 1], ROWS, {}),
        (spec, [0, 2], ROWS[:2], {}),
        (spec, [0, 2], ROWS, {"steps": 4}),
        (spec, [0, 2], ROWS, {"loss": "heads"}),
        (spec, [0, 2], ROWS, {"rate": 1e-4}),
    ]
    for other, layers, rows, more in changed:
        with pytest.raises(Killed):
            transfer(hosted(tiny(), spec, [0, 2]), tiny(), [0, 2], ROWS, steps=3, keep=keep, tell=stop_at(3))
        steps = transfer(hosted(tiny(), other, layers), tiny(), layers, rows, **{"steps": 3, **more}, keep=keep)
        assert len(steps) == more.get("steps", 3), (other, layers, more)


def test_projections_that_stay_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses and weights with fewer products: queries, keys and values are those of the host's own pass."""

    def learnt() -> tuple[Any, list[float], int]:
        made = hosted(tiny(), {"name": "hedgehog", "window": 4}, [0, 2])
        with torch.no_grad():
            made.model.stack.layers[2].self_attn.mechanism.k_proj.weight += 0.1  # no longer the host's
        with FlopCounterMode(display=False) as counted:
            losses = transfer(made, tiny(), [0, 2], ROWS[:2], steps=2, loss="heads")
        assert "forward" not in vars(made.model.stack.layers[0].self_attn.mechanism.q_proj)
        return weights(made), losses, counted.get_total_flops()

    fast, losses, few = learnt()
    monkeypatch.setattr(imitation, "same_projections", lambda *given: ())
    slow, wanted, many = learnt()
    assert losses == wanted
    torch.testing.assert_close(fast, slow, rtol=0, atol=0)
    # Two rows of 12 tokens: q, k and v of the first layer, q and v of the second.
    assert many - few == 2 * 12 * 2 * 32 * ((32 + 16 + 16) + (32 + 16))


def test_what_is_trained_is_not_taken_from_the_host() -> None:
    made, host = hosted(tiny(), {"name": "hedgehog"}, [0]), hosted(tiny())
    learner, teacher = (model.model.stack.layers[0].self_attn.mechanism for model in (made, host))
    assert imitation.same_projections(learner, teacher, []) == ("q_proj", "k_proj", "v_proj")
    assert imitation.same_projections(learner, teacher, [learner.k_proj.weight]) == ("q_proj", "v_proj")
    learner.v_proj = torch.nn.Sequential(learner.v_proj)
    assert imitation.same_projections(learner, teacher, []) == ("q_proj", "k_proj")


def test_a_command_that_is_killed_after_the_transfer_does_not_learn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    learn, measure = imitation._learn, Judge.measure

    def counted(*given: Any) -> float:
        steps.append(given[-1])
        return learn(*given)

    figures: list[dict[str, Any]] = []

    def cheap(self: Judge, model: Any, tell: Any = None) -> dict[str, Any]:
        figures.append(figures[0] if figures else measure(self, model))
        return figures[0]

    def killed(self: Judge, model: Any, tell: Any = None) -> dict[str, Any]:
        if steps:
            raise KeyboardInterrupt
        return cheap(self, model)

    monkeypatch.setattr(imitation, "_learn", counted)
    monkeypatch.setattr(Judge, "measure", killed)
    asked = ["convert", "--to", "hedgehog", "--layers", "3", "--transfer", "2", *SMALL, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(asked)
    assert steps == [0, 1]
    monkeypatch.setattr(Judge, "measure", cheap)
    with pytest.raises(SystemExit) as end:
        main(asked)
    assert not end.value.code
    assert steps == [0, 1]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_step_is_one_pass_up_to_the_last_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the host: no logits, nothing behind the last attention, no gradients; and one pass of each learner, which
    ends before heads are joined where only heads are compared."""
    passes: list[str] = []
    begin = imitation.hosted

    def watched(model: Any) -> Any:
        teacher = begin(model)
        for i, layer in enumerate(teacher.model.stack.layers):
            for part in ("self_attn", "mlp"):
                layer.get_submodule(part).register_forward_hook(
                    lambda module, args, out, at=f"{part} {i}": passes.append(at)
                )
        teacher.lm_head.register_forward_hook(lambda module, args, out: passes.append("logits"))
        return teacher

    monkeypatch.setattr(imitation, "hosted", watched)
    made = hosted(tiny(), {"name": "hedgehog", "window": 4}, [0, 1])
    for i in (0, 1):
        mechanism = made.model.stack.layers[i].self_attn.mechanism
        mechanism.k_proj.register_forward_hook(lambda module, args, out, at=f"learner {i}": passes.append(at))
        mechanism.o_proj.register_forward_hook(lambda module, args, out: passes.append("joined"))
    transfer(made, tiny(), [0, 1], ROWS, steps=1, loss="heads")
    assert passes == ["self_attn 0", "mlp 0", "learner 0", "learner 1"]


@pytest.mark.parametrize("loss", ["output", "heads", "weights"])
def test_what_the_host_gave_is_held_for_rows_that_come_back(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses and weights to the bit, and a pass of the host for each row that is new or has no room."""
    passes: list[int] = []
    see = imitation._seen

    def counted(*given: Any) -> Any:
        passes.append(1)
        return see(*given)

    monkeypatch.setattr(imitation, "_seen", counted)
    # A row of 16 tokens in two layers: x, the output and the heads of 32; where projections stay, q of 32, k, v of 16.
    row = 16 * (3 * 32 + (64 if loss != "output" else 0)) * 2 * 4
    found, counts = [], []
    for remember in (0, row, imitation.REMEMBERED):
        made = hosted(tiny(), {"name": "hedgehog", "window": 4}, [0, 2])
        given = [list(range(start, start + 16)) for start in (1, 20, 40)]
        losses = transfer(made, tiny(), [0, 2], given, steps=8, loss=loss, remember=remember)
        found.append((losses, weights(made)))
        counts.append(len(passes))
        passes.clear()
    # Nothing is held in steps after which no row comes back.
    assert counts == [8, 6, 3]
    for losses, made in found[1:]:
        assert losses == found[0][0]
        torch.testing.assert_close(made, found[0][1], rtol=0, atol=0)
