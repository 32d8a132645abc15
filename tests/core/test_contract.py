"""The shell, the state and the registry, beyond what the conformance suite holds every mechanism to."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch.testing import assert_close

import manyheads
from manyheads import Card, Family, Rotary, SoftmaxAttention, State, create_attention, list_attentions, register
from manyheads.catalogue.facts import description
from manyheads.functional.grouped import MASK_ROWS, attend_masked, masked_softmax
from manyheads.functional.rotary import rotate
from manyheads.softmax import changed_stages


def softmax(**config: Any) -> SoftmaxAttention:
    torch.manual_seed(0)
    module = create_attention("softmax", 16, 4, **config).double().eval()
    assert isinstance(module, SoftmaxAttention)
    return module


# -- bad input: what was given, what is wanted, what to do ---------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: create_attention("sofmax", 16, 4), ["sofmax", "softmax", "manyheads list"]),
        (lambda: create_attention("softmax", 16, 4, casual=True), ["casual", "causal"]),
        (lambda: create_attention("softmax", 16, 3), ["dim=16", "heads=3", "[1, 2, 4, 8, 16]"]),
        (lambda: create_attention("softmax", 16, 4, kv_heads=3), ["heads=4", "kv_heads=3"]),
        (lambda: create_attention("softmax", 0, 4), ["dim=0"]),
        (lambda: create_attention("softmax", 16, 16, rotary=Rotary()), ["two features", "head_dim=1"]),
        (lambda: Rotary(fraction=1.5), ["fraction=1.5"]),
        (lambda: softmax()(torch.zeros(2, 0, 16).double()), ["empty sequence", "(2, 0, 16)"]),
        (lambda: softmax()(torch.zeros(2, 3, 8).double()), ["(2, 3, 8)", "[batch, n, 16]"]),
        (lambda: softmax()(torch.zeros(2, 3, 16, dtype=torch.long)), ["torch.int64", "floating point"]),
        (lambda: softmax()(torch.zeros(2, 3, 16), torch.zeros(1, 5, 16)), ["context", "(1, 5, 16)", "[2, m >= 1, 16]"]),
        (lambda: softmax()(torch.zeros(2, 3, 16), mask=torch.ones(2, 3)), ["torch.float32", "True = may attend"]),
        (lambda: softmax()(torch.zeros(2, 3, 16), mask=torch.ones(2, 4).bool()), ["(2, 4)", "[2, 3]", "[2, 4, 3, 3]"]),
        (lambda: softmax()(torch.zeros(2, 3, 16), positions=torch.zeros(2)), ["positions", "integers"]),
        (lambda: softmax(causal=True)(torch.zeros(2, 3, 16), state=State("gqa", 2)), ["belongs to gqa", "init_state"]),
        (lambda: softmax(causal=True)(torch.zeros(2, 3, 16), state=State("softmax", 5)), ["batch 5", "batch 2"]),
        (lambda: softmax()(torch.zeros(2, 3, 16), state=State("softmax", 2)), ["causal=False", "causal=True"]),
        (lambda: softmax().init_state(2), ["cannot decode", "causal=False"]),
        (lambda: softmax()(torch.zeros(2, 3, 4, 16)), ["cannot be called grid", "noncausal-self"]),
        (lambda: list_attentions(pattern="casual-self"), ["casual-self", "causal-self"]),
        (lambda: list_attentions(family="liner"), ["liner", "linear"]),
    ],
)
def test_errors_say_what_to_do(call: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


def test_a_missing_and_an_unexpected_context_are_named() -> None:
    class CrossOnly(SoftmaxAttention):
        card = Card(
            name="cross-only",
            title="t",
            reference="r",
            family=Family.CROSS,
            patterns={"noncausal-cross"},
            time="n m",
            state="m",
        )

    class SelfOnly(SoftmaxAttention):
        card = Card(
            name="self-only",
            title="t",
            reference="r",
            family=Family.PLAIN,
            patterns={"noncausal-self"},
            time="n^2",
            state="n",
        )

    x = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="context is missing"):
        CrossOnly(8, 2)(x)
    with pytest.raises(ValueError, match="context was not expected"):
        SelfOnly(8, 2)(x, x)
    with pytest.raises(ValueError, match="causal=True"):
        SelfOnly(8, 2, causal=True)


# -- the state -----------------------------------------------------------------------------------------------------


def test_the_state_does_not_grow_by_concatenation() -> None:
    state = State("any", 1)
    places = set()
    for _ in range(200):
        state.append("keys", torch.zeros(1, 2, 1, 4)).data_ptr()
        buffer = state.grown["keys"].data
        assert buffer is not None
        places.add(buffer.data_ptr())
        state.advance(1)
    assert len(places) < 20  # a new place per token would be a concatenation


def test_capacity_is_taken_once() -> None:
    module = softmax(causal=True)
    state = module.init_state(1, capacity=64)
    sizes = set()
    with torch.no_grad():
        for _ in range(64):
            module(torch.randn(1, 1, 16).double(), state=state)
            sizes.add(state.nbytes)
    assert sizes == {2 * 64 * 16 * 8}


def test_a_window_bounds_the_state() -> None:
    state = State("any", 1)
    for t in range(1000):
        rows = state.append("keys", torch.full((1, 1, 1, 1), float(t)))
        assert rows.flatten().tolist() == [float(s) for s in range(max(0, t - 7), t + 1)]
        state.advance(1, span=8)
    assert state.nbytes <= 4 * 24
    with pytest.raises(ValueError, match="dropped"):
        state.truncate(500)


def test_a_long_pass_gives_its_memory_back_behind_a_window() -> None:
    state = State("any", 1, capacity=32)
    state.append("keys", torch.zeros(1, 1, 5000, 1))
    state.advance(5000, span=8)
    rows = state.append("keys", torch.ones(1, 1, 1, 1))
    assert rows.flatten().tolist() == [0.0] * 7 + [1.0]
    assert state.nbytes == 4 * 32


def test_gradients_flow_through_a_state() -> None:
    module = softmax(causal=True)
    x = torch.randn(1, 6, 16).double().requires_grad_()
    state = module.init_state(1)
    parts = torch.cat([module(x[:, t : t + 2], state=state).output for t in (0, 2, 4)], 1)
    (found,) = torch.autograd.grad(parts.square().sum(), x)
    (wanted,) = torch.autograd.grad(module(x).output.square().sum(), x)
    assert_close(found, wanted)


def test_padding_that_starts_late_is_remembered() -> None:
    module = softmax(causal=True)
    x = torch.randn(2, 7, 16).double()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4] = False
    with torch.no_grad():
        wanted = module(x, mask=mask).output
        state = module.init_state(2)
        parts = [module(x[:, :3], state=state), module(x[:, 3:5], mask=mask[:, 3:5], state=state)]
        parts += [module(x[:, t : t + 1], state=state) for t in (5, 6)]
    assert_close(torch.cat([p.output for p in parts], 1), wanted)


@pytest.mark.parametrize("name", ["softmax", "mswa", "moba"])
def test_padding_and_positions_that_start_together_in_a_later_pass(name: str) -> None:
    torch.manual_seed(0)
    more = {"mswa": {"window": 4}, "moba": {"block": 3, "top_k": 2}}.get(name, {})
    module = create_attention(name, 16, 4, causal=True, rotary=Rotary(), **more).double().eval()
    x = torch.randn(2, 30, 16).double()
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 20] = False
    positions = mask.cumsum(1) - 1
    with torch.no_grad():
        wanted = module(x, mask=mask, positions=positions).output
        state = module.init_state(2)
        parts = [module(x[:, :20], state=state).output]
        parts += [
            module(x[:, s], mask=mask[:, s], positions=positions[:, s], state=state).output
            for s in (slice(20, 25), slice(25, 26), slice(26, 30))
        ]
    gap = torch.where(mask[..., None], torch.cat(parts, 1) - wanted, 0.0)
    assert_close(gap, torch.zeros_like(gap))


def test_a_state_can_be_copied() -> None:
    module = softmax(causal=True)
    x = torch.randn(1, 4, 16).double()
    with torch.no_grad():
        state = module.init_state(1)
        module(x[:, :2], state=state)
        saved = copy.deepcopy(state)
        first = module(x[:, 2:], state=state).output
        assert_close(module(x[:, 2:], state=saved).output, first)


def test_another_context_in_the_same_state_is_refused() -> None:
    module = softmax(causal=True)
    x = torch.randn(1, 1, 16).double()
    state = module.init_state(1)
    with torch.no_grad():
        module(x, torch.randn(1, 5, 16).double(), state=state)
        with pytest.raises(ValueError, match="new state for a new context"):
            module(x, torch.randn(1, 6, 16).double(), state=state)


# -- the shell -----------------------------------------------------------------------------------------------------


def test_the_plain_shell_holds_no_score_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the score matrix was made")

    monkeypatch.setattr(SoftmaxAttention, "normalise", refuse)
    x = torch.randn(1, 8, 16).double()
    softmax(causal=True)(x)
    with pytest.raises(AssertionError, match="score matrix"):
        softmax(causal=True)(x, need_weights=True)


def test_long_masked_passes_are_cut_into_rows() -> None:
    n = MASK_ROWS + 37
    module = softmax(causal=True, kv_heads=2)
    x = torch.randn(2, n, 16).double()
    mask = torch.arange(n)[None] >= torch.tensor([[0], [100]])
    with torch.no_grad():
        assert_close(module(x, mask=mask).output, module(x, mask=mask, need_weights=True).output)


@pytest.mark.parametrize("heads_in_mask", [1, 6])
def test_grouped_masked_attention(heads_in_mask: int) -> None:
    q, k, v = torch.randn(2, 6, 5, 4).double(), torch.randn(2, 2, 7, 4).double(), torch.randn(2, 2, 7, 4).double()
    allowed = torch.rand(2, heads_in_mask, 5, 7) < 0.5
    wide_k, wide_v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    wanted = masked_softmax(q @ wide_k.transpose(-1, -2) * 0.3, allowed) @ wide_v
    assert_close(attend_masked(q, k, v, allowed, scale=0.3), wanted)


def test_changed_stages_are_read_off_the_class() -> None:
    class Louder(SoftmaxAttention):
        card = Card(
            name="louder", title="t", reference="r", family=Family.PLAIN, patterns={"causal-self"}, time="n", state="n"
        )

        def score(self, q: Any, k: Any, where: Any) -> Any:
            return 2 * super().score(q, k, where)

    assert changed_stages(Louder) == ["score"]
    assert Louder.eager
    assert changed_stages(manyheads.mechanism_class("softmax")) == []


def test_rotary_against_complex_numbers() -> None:
    x, positions = torch.randn(2, 3, 5, 8).double(), torch.tensor([[0, 1, 2, 7, 30]])
    angle = positions[:, None, :, None] * 500.0 ** -(torch.arange(0, 8, 2).double() / 8)
    turn = torch.polar(torch.ones_like(angle), angle)
    wanted = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(-2)
    assert_close(rotate(x, positions, Rotary(base=500.0, interleaved=True)), wanted)
    halves = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    wanted_halves = torch.cat([wanted[..., 0::2], wanted[..., 1::2]], -1)
    assert_close(rotate(halves, positions, Rotary(base=500.0)), wanted_halves)


def test_partial_rotary_leaves_the_rest() -> None:
    x = torch.randn(1, 1, 4, 8)
    turned = rotate(x, torch.arange(4)[None], Rotary(fraction=0.5))
    assert_close(turned[..., 4:], x[..., 4:])
    assert not turned[:, :, 1:, :4].equal(x[:, :, 1:, :4])


def test_float16_scores_are_normalised_in_float32() -> None:
    scores = torch.full((1, 1, 1, 70000), 0.0, dtype=torch.float16)
    assert float(masked_softmax(scores, None).double().sum()) == pytest.approx(1.0, rel=0.1)


# -- registry, config, import --------------------------------------------------------------------------------------


def test_config_is_what_was_given() -> None:
    module = create_attention("gqa", 16, 4, kv_heads=2, rotary=Rotary(base=100.0))
    plain = {"base": 100.0, "fraction": 1.0, "interleaved": False, "angles": None, "amplitude": 1.0}
    assert module.config["rotary"] == plain
    again = create_attention("gqa", **json.loads(json.dumps(module.config)))
    assert again.config == module.config


def test_two_mechanisms_of_one_name_are_refused() -> None:
    softmax_card = manyheads.card("softmax")

    class Impostor(SoftmaxAttention):
        card = softmax_card

    with pytest.raises(ValueError, match="two mechanisms are named 'softmax'"):
        register(Impostor)


def test_card_names_are_checked() -> None:
    with pytest.raises(ValueError, match="My_Attention"):
        Card(name="My_Attention", title="", reference="", family=Family.PLAIN, patterns={"pool"}, time="", state="")


def test_each_file_under_mechanisms_is_one_paper() -> None:
    root = Path(manyheads.__file__).parent / "mechanisms"
    files = {p for p in root.rglob("*.py") if p.name != "__init__.py"}
    classes = [manyheads.mechanism_class(name) for name in list_attentions()]
    own = [c for c in classes if c.__module__.startswith("manyheads.")]
    papers: dict[str, set[str]] = {}
    for cls in own:
        papers.setdefault(cls.__module__, set()).add(cls.card.reference)
    assert len(papers) == len(files)
    assert {module: found for module, found in papers.items() if len(found) > 1} == {}
    for cls in own:
        assert cls.__bases__[0] in (SoftmaxAttention, manyheads.Mechanism), f"{cls} subclasses another mechanism"
        assert cls.card.family.value == cls.__module__.split(".")[2]


TOLD = """
import sys, manyheads
names = manyheads.list_attentions()
made = manyheads.create_attention("theirs", 8, 2, causal=True)
from manyheads.tasks import create_task, list_tasks
assert list_tasks()
create_task("digits-grid")  # the digits are read when they are first drawn from
heavy = ["transformers", "accelerate", "altair", "sklearn", "pydantic", "yaml", "typer", "rich", "scipy", "pandas"]
print("theirs" in names, made.card.name, [name for name in heavy if name in sys.modules])
"""


def test_another_package_adds_its_own_and_nothing_heavier_than_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "from manyheads import Card, SoftmaxAttention\n"
        "class Theirs(SoftmaxAttention):\n"
        "    card = Card(name='theirs', title='t', reference='r', family='plain', patterns={'causal-self'},"
        " time='n^2', state='n')\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[manyheads.mechanisms]\ntheirs = theirs:Theirs\n")
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    told = os.environ | {"PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", TOLD], env=told, capture_output=True, text=True)
    assert run.stdout.strip() == "True theirs []", run.stdout + run.stderr


def test_a_card_is_typed_as_it_is_documented() -> None:
    """The pages write names; a type checker of a user's own code goes by these."""
    assert get_type_hints(Card)["family"] is str
    assert json.loads(json.dumps(description("softmax")))["family"] == Family("plain") == "plain"
