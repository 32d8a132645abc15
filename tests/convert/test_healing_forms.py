"""Healing by adapters, from a teacher's expectations and from its relations: what is trained, losses in loops, and
runs that were stopped, of which every form goes on bit for bit."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.convert import loop as loop_module
from manyheads.convert.adapters import adapted, check_reached
from manyheads.convert.healing import Healing, heal
from manyheads.convert.hosted import hosted
from manyheads.convert.keeping import forget
from manyheads.convert.lessons import LESSONS, check_teacher, relation_heads, soft_loss
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.questions import Questions

TEXT = "def attend(query, key, value): return softmax(query @ key.T) @ value\n" * 40


def tiny(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 48, "vocab_size": 256, "max_position_embeddings": 256, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **more})).eval()


@pytest.fixture(scope="module")
def questions() -> Questions:
    return Questions(Loaded(tiny(), None, "tiny"), text=TEXT, seed=1)


class Killed(BaseException):
    pass


def stop_at(step: int) -> Any:
    def tell(done: int, total: int, text: str = "") -> None:
        if done == step:
            raise Killed

    return tell


def plan(form: str, steps: int = 6) -> Healing:
    return Healing(tokens=steps * 2 * 160, length=160, batch=2, form=form, rate=1e-2)


@pytest.mark.parametrize("form", list(LESSONS))
def test_a_stopped_run_goes_on_bit_for_bit(
    form: str, questions: Questions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose draws must be those of the whole run."""
    teacher = tiny(1)
    whole = heal(tiny(attention_dropout=0.2), questions, plan(form), teacher=teacher)
    monkeypatch.setattr(loop_module, "KEEP_EVERY", 0.0)
    keep = tmp_path / "kept"
    with pytest.raises(Killed):
        heal(tiny(attention_dropout=0.2), questions, plan(form), teacher=teacher, keep=keep, tell=stop_at(4))
    seen: list[int] = []
    fresh = tiny(attention_dropout=0.2)
    torch.rand(7)  # another process has drawn other numbers
    again = heal(
        fresh, questions, plan(form), teacher=teacher, keep=keep,
        tell=lambda done, total, text: seen.append(done),
    )  # fmt: skip
    assert seen == [4, 5, 6]
    assert not all(torch.equal(a, b) for a, b in zip(tiny().parameters(), again.parameters(), strict=True))
    for (name, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    # What has ended is not done again, and gives the same.
    ended = heal(tiny(attention_dropout=0.2), questions, plan(form), teacher=teacher, keep=keep, tell=stop_at(6))
    for (name, a), (_, b) in zip(whole.named_parameters(), ended.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    forget(keep)
    assert list(tmp_path.iterdir()) == []


def test_only_the_same_training_is_gone_on_from(
    questions: Questions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "KEEP_EVERY", 0.0)
    keep = tmp_path / "kept"
    other = Questions(questions.loaded, text=TEXT[::-1], seed=1)
    changed: list[tuple[Any, Questions, Healing, Any]] = [
        (tiny(3), questions, plan("distil"), tiny(1)),
        (tiny(), other, plan("distil"), tiny(1)),
        (tiny(), questions, plan("distil", steps=7), tiny(1)),
        (tiny(), questions, plan("distil"), tiny(4)),
    ]
    for model, text, training, teacher in changed:
        with pytest.raises(Killed):
            heal(tiny(), questions, plan("distil"), teacher=tiny(1), keep=keep, tell=stop_at(4))
        seen: list[int] = []
        heal(
            model, text, training, teacher=teacher, keep=keep, tell=lambda done, total, words, to=seen: to.append(done)
        )
        assert seen[0] == 1


def test_half_a_file_is_not_gone_on_from(questions: Questions, tmp_path: Path) -> None:
    (tmp_path / "kept.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    seen: list[int] = []
    heal(
        tiny(), questions, plan("full", 2), keep=tmp_path / "kept", tell=lambda done, total, text: seen.append(done)
    )  # fmt: skip
    assert seen == [1, 2]


def test_adapters_change_attention_by_a_low_rank_and_are_gone(questions: Questions) -> None:
    model = tiny()
    before = copy.deepcopy(model)
    healed = heal(model, questions, plan("lora", 3))
    assert healed is model
    for (name, a), (_, b) in zip(before.named_parameters(), healed.named_parameters(), strict=True):
        changed = b.detach() - a.detach()
        if "self_attn" in name:
            values = torch.linalg.svdvals(changed.double())
            assert values[7] > 1e-6
            assert values[8:].max() < 1e-6
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert b.requires_grad
    assert not any("lora" in name for name, _ in healed.named_modules())


def test_merged_adapters_compute_what_they_computed_beside() -> None:
    model, ids = tiny(), torch.arange(40)[None]
    before = model(ids).logits
    with adapted(model, 0):
        torch.testing.assert_close(model(ids).logits, before)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        beside = model(ids).logits.detach()
    assert (beside - before).abs().max() > 0.01
    torch.testing.assert_close(model(ids).logits, beside, rtol=1e-4, atol=1e-5)


def test_a_stop_takes_the_adapters_away() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Killed), adapted(model, 0):
        raise Killed
    assert list(model.state_dict()) == list(before)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_a_projection_that_is_read_without_being_called_is_told() -> None:
    model = tiny()
    ids = torch.arange(30)[None]
    with adapted(model, 0):
        layer = model.model.layers[1].self_attn.v_proj
        layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight)
        model(ids, labels=ids).loss.backward()
        with pytest.raises(ValueError, match=r"layers.1.self_attn.v_proj, which is read without"):
            check_reached(model)


def test_adapters_reach_another_mechanism(questions: Questions) -> None:
    model = hosted(tiny(), {"name": "hedgehog"}, (1,))
    before = copy.deepcopy(model)
    heal(model, questions, plan("lora", 2))
    for (name, a), (_, b) in zip(before.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b) == ("self_attn.mechanism" not in name or not name.endswith("_proj.weight")), name


def test_the_soft_loss_in_loops() -> None:
    own, other = (torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(2))
    total = 0.0
    for b in range(2):
        for i in range(3):
            p, q = (
                [math.exp(float(z) / 2) / sum(math.exp(float(y) / 2) for y in rows[b, i]) for z in rows[b, i]]
                for rows in (other, own)
            )
            total += 4 * sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    assert float(soft_loss(own, other)) == pytest.approx(total / 6, rel=1e-12)


def test_the_three_losses_of_a_teacher() -> None:
    model, teacher, ids = tiny(), tiny(1), torch.arange(60).view(2, 30)
    states = [each.model(ids).last_hidden_state for each in (model, teacher)]
    apart = 1 - torch.nn.functional.cosine_similarity(*states, -1).mean()
    own, other = model(ids, labels=ids), teacher(ids)
    soft = soft_loss(own.logits, other.logits)
    with LESSONS["distil"](model, teacher) as lesson:
        torch.testing.assert_close(lesson(ids), 5 * soft + 2 * own.loss + apart)
    narrow = tiny(2, hidden_size=16)
    out = narrow(ids, labels=ids)
    with LESSONS["distil"](narrow, teacher) as lesson:
        torch.testing.assert_close(lesson(ids), 5 * soft_loss(out.logits, other.logits) + 2 * out.loss)
    assert not narrow.lm_head._forward_pre_hooks


def test_relations_are_those_of_the_last_layers_and_leave_no_hooks(questions: Questions) -> None:
    """A student that is its teacher has nothing to learn; one of another width and depth does, and learns."""
    teacher, ids = tiny(1), torch.arange(60).view(2, 30)
    with LESSONS["relations"](copy.deepcopy(teacher), teacher) as lesson:
        torch.testing.assert_close(lesson(ids), torch.zeros(()))
    losses: list[float] = []
    narrow = tiny(2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    heal(narrow, questions, plan("relations", 12), teacher=teacher,
         tell=lambda done, total, text: losses.append(float(text.split()[-1])))  # fmt: skip
    assert losses[-1] < 0.8 * losses[0]
    assert not narrow.model.layers[0].self_attn.q_proj._forward_hooks
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_how_many_relation_heads() -> None:
    assert relation_heads([768, 768, 768, 384, 384, 384]) == 48
    assert relation_heads([256, 128, 128, 128, 64, 64]) == 8
    assert relation_heads([7, 14]) == 1


def test_a_teacher_of_another_tokenizer_is_refused_by_name() -> None:
    words = Loaded(tiny(vocab_size=300), None, "org/teacher")
    with pytest.raises(
        ValueError, match=r"--against org/teacher has another tokenizer than tiny \(300 and 256 tokens\)"
    ):
        check_teacher(Loaded(tiny(), None, "tiny"), words)
    check_teacher(Loaded(tiny(), None, "tiny"), Loaded(tiny(1, hidden_size=16), None, "same"))


def test_what_a_form_needs(questions: Questions) -> None:
    with pytest.raises(ValueError, match="--healing 'qlora': want one of full, lora, distil"):
        plan("qlora")
    for form in ("distil", "relations"):
        with pytest.raises(ValueError, match="learns from a teacher: give one"):
            heal(tiny(), questions, plan(form))


def test_a_packaged_model_heals_in_bfloat16() -> None:
    loaded = load_model(dtype="bfloat16")
    model = copy.deepcopy(loaded.model)
    words: list[str] = []
    text = Questions(loaded, text=TEXT, seed=1)
    for form in LESSONS:
        heal(
            model,
            text,
            replace(plan(form, 1), tokens=160, batch=1),
            teacher=loaded.model,
            tell=lambda done, total, said: words.append(said),
        )
    assert len(words) == 4
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
