"""`manyheads steer` as users type it: both sides of a prompt, sweeps, the page, and what it refuses."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import prompt, tiny
from torch.testing import assert_close

from manyheads.cli import main
from manyheads.hosts.loading import load_model
from manyheads.hosts.taps import record
from manyheads.steer import boost, load_offsets, save_offsets
from manyheads.steer.asked import parse, parse_sweep
from manyheads.steer.measuring import cost, followed, kl_bits, look
from manyheads.steer.method import Prompt, method, methods
from manyheads.steer.prompting import kind_of, text_prompt
from manyheads.steer.report import headline
from manyheads.tasks.scenes import held_out, pictures

KEYS = "\nThe pass key is 11111. Remember it.\nx = 1\n\nThe pass key is 77777. Remember it.\ny = 2\n"
QUESTION = KEYS + "\nWhat is the pass key? The pass key is "


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    with pytest.raises(SystemExit) as stopped:
        main(["steer", *arguments, "--json"])
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    return json.loads(said.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["steer", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_marked_words_decide_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path), "--new", "5", "--wanted", "1", "--sweep", "1,1000")
    report = told(capsys, "--with", "boost[factor=1000]", "--text", QUESTION, "--span", "11111", *out)
    assert (report["answers"]["without"], report["answers"]["with"]) == ("77777", "11111")
    assert report["wanted"]["with"] > report["wanted"]["without"]
    shares = report["attention"]["text"]
    assert all(given > plain for plain, given in zip(shares["without"], shares["with"], strict=True))
    neutral, strong = report["sweep"]["points"]
    assert neutral["kl_bits"] == neutral["lost"] == 0
    assert not neutral["changed"]
    assert strong["kl_bits"] == pytest.approx(report["next"]["kl_bits"])
    assert strong["changed"]
    assert json.loads((tmp_path / "steer.json").read_text())["answers"] == report["answers"]
    page = (tmp_path / "steer.html").read_text()
    assert all(words in page for words in ("77777", "11111", "On the marked words", "Effect against damage"))
    assert len(headline(report)) == 5


def test_list_names_every_intervention(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in told(capsys, "list")}
    assert set(rows) == {own.name for own in methods()}
    assert rows["boost"]["arguments"] == {"span": "text", "factor": 3.0, "heads": None}
    assert rows["juice"]["needs"] == ["heads"]
    assert rows["boost"]["source"] == "arXiv 2506.13734"
    assert {row["name"] for row in told(capsys, "list", "--kind", "language")} <= set(rows)
    main_list = refused(capsys, "list", "--kind", "poetry")
    assert "want one of language" in main_list


NEEDS: dict[str, dict[str, Any]] = {
    "calibrate": {"alpha": 2.0},
    "juice": {"heads": "0.1,2.3"},
    "perturb": {"heads": "0.1"},
    "scaled": {"heads": "0.1"},
    "redistribute": {"sink_dims": "0", "threshold": 0.6, "least": 0.0, "centric": 0.0, "layers": "0,1,2"},
}


@pytest.mark.parametrize("name", [own.name for own in methods("language")])
def test_declared_interventions_are_the_model_itself_at_their_neutral_setting(name: str, tmp_path: Path) -> None:
    model, tokens = tiny("llama"), prompt(1, 12)
    model.set_attn_implementation("sdpa")
    chosen = method(name)
    own = Prompt({"input_ids": tokens}, {"text": [3, 4, 5, 7], "text1": [3, 4, 5], "text2": [7]})
    given: dict[str, Any] = NEEDS.get(name, {}) | dict(chosen.neutral)
    if "file" in chosen.arguments:
        width = 16 if name == "focus" else 8
        given["file"] = str(save_offsets({(1, 2): torch.randn(width)}, tmp_path / "own.safetensors"))
    with torch.no_grad():
        wanted = model(tokens).logits
        with chosen.open(model, own, **given):
            assert_close(model(tokens).logits, wanted, atol=0, rtol=0)
        if chosen.strength is not None:
            strong = {**given, chosen.strength: STRONG.get(name, 0.7)}
            with suppress(KeyError), chosen.open(model, own, **strong):
                assert float((model(tokens).logits - wanted).abs().max()) > 1e-6
                raise KeyError("inside")
        assert_close(model(tokens).logits, wanted, atol=0, rtol=0)


STRONG = {"buckets": 3.0, "calibrate": 0.0, "focus_icl": 3}


def test_arguments_are_read_in_their_own_types() -> None:
    chosen, given = parse("boost[factor=5,heads=3.10,4.2, span=text1]")
    assert (chosen.name, given) == ("boost", {"factor": 5.0, "heads": "3.10,4.2", "span": "text1"})
    assert parse("buckets[count=4]")[1] == {"count": 4}
    assert parse("calibrate")[1] == {}
    assert parse_sweep(chosen, "0.5,1") == ("factor", [0.5, 1.0])
    assert parse_sweep(method("buckets"), "count=2,3") == ("count", [2, 3])
    with pytest.raises(ValueError, match="two values or more"):
        parse_sweep(chosen, "factor=1")
    with pytest.raises(ValueError, match="no strength of its own"):
        parse_sweep(method("position_invariant"), "1,2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --with NAME"),
        (["--with", "bost", "--text", "x"], "did you mean 'boost'"),
        (["--with", "boost[facto=2]", "--text", "x"], "did you mean 'factor'"),
        (["--with", "boost[factor=two]", "--text", "x"], "factor=two: want a number"),
        (["--with", "boost[factor]", "--text", "x"], "'factor' is no argument"),
        (["--with", "boost[factor=1,factor=2]", "--text", "x"], "'factor' is there twice"),
        (["--with", "buckets[count=2.5]", "--text", "x"], "want a whole number"),
        (["--with", "juice", "--text", "x"], "juice needs heads"),
        (["--with", "boost"], "one of --text and --file; got none"),
        (["--with", "boost", "--text", "x", "--sweep", "facto=1,2"], "no argument 'facto' to sweep over"),
        (["--with", "boost", "--text", " "], "the text is empty"),
        (["--with", "boost", "--text", "x"], "no span 'text'; it has none (mark some of its words: --span WORDS)"),
        (["--with", "boost", "--text", "a b a", "--span", "a"], "'a' occurs 2 times"),
        (["--with", "boost", "--text", "a", "--span", "b"], "'b' occurs 0 times"),
        (["--with", "boost", "--text", "a", "--chat"], "has no chat template"),
        (["--with", "juice[heads=1]", "--text", "x"], "'1' is no LAYER.HEAD"),
        (["--with", "juice[heads=1.1,1.1]", "--text", "x"], "1.1 is there twice"),
        (["--with", "juice[heads=99.1]", "--text", "x"], "no such layers"),
        (["--with", "juice[heads=1.99]", "--text", "x"], "heads 0 to 7; got [99]"),
        (["--with", "steer[file=none.safetensors]", "--text", "x"], "cannot be read"),
        (["--with", "position_invariant", "--text", "one two", "--span", "one"], "1 documents are marked"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *arguments, "--out", str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_shares_are_those_of_the_edited_weights() -> None:
    """The last row's attention of every layer, edited by hand."""
    model, tokens = tiny("llama", num_hidden_layers=1).double(), prompt(1, 9)
    own = Prompt({"input_ids": tokens}, {"text": [2, 3], "text1": [2, 3]})
    with torch.no_grad(), record(model) as calls:
        model(tokens)
    row = calls[0].weights()[0, :, -1]
    edited = row.clone()
    edited[1, [2, 3]] *= 4.0
    edited[1] /= edited[1].sum()
    before = look(model, own, nullcontext)
    after = look(model, own, lambda: boost(model, [2, 3], 4.0, heads=[(0, 1)]), before.sinks)
    assert before.shares["text"] == pytest.approx([float(row[:, [2, 3]].sum(-1).mean())])
    assert after.shares["text"] == pytest.approx([float(edited[:, [2, 3]].sum(-1).mean())])
    columns = calls[0].weights()[0].sum(1) / torch.arange(9, 0, -1)
    assert after.shares["sinks"] == pytest.approx([float((edited * (columns > 5 / 9)).sum(-1).mean())])


def test_marks_find_their_tokens_whatever_stands_before_them() -> None:
    loaded = load_model()
    own = text_prompt(loaded, "näive words", ["words"])
    assert loaded.decode([int(own.inputs["input_ids"][0, i]) for i in own.places("text")]) == "words"
    assert own.marked() == [own.places("text1")]
    assert kind_of(loaded.model) == "language"
    more = followed(own, [5, 6])
    assert more["input_ids"].shape == more["attention_mask"].shape == (1, 14)
    assert int(more["attention_mask"].sum()) == 14


def test_kl_is_in_bits() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    wanted = 0.5 * math.log2(2.0) + 0.25 * math.log2(0.5)
    assert kl_bits(p.log(), q.log()) == pytest.approx(wanted, abs=1e-6)


def test_cost_says_how_much_longer_a_token_takes() -> None:
    """The same work on both sides costs the same; a sleep in every pass shows."""
    import time

    model, own = tiny("llama"), Prompt({"input_ids": prompt(1, 6)})

    class Slow:
        def __enter__(self) -> None:
            self.hook = model.register_forward_pre_hook(lambda *_: time.sleep(0.05))

        def __exit__(self, *_: object) -> None:
            self.hook.remove()

    found = cost(model, own, Slow, [4, 5])
    assert found["token_ms"]["with"] > found["token_ms"]["without"] + 30
    assert found["token_ratio"] > 1.5


def test_offsets_are_kept_in_a_file(tmp_path: Path) -> None:
    offsets = {(1, 2): torch.randn(8), (0, 10): torch.randn(8)}
    found = load_offsets(save_offsets(offsets, tmp_path / "own.safetensors"))
    assert found.keys() == offsets.keys()
    for place, vector in offsets.items():
        assert_close(found[place], vector, atol=0, rtol=0)
    (tmp_path / "bad").write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_offsets(tmp_path / "bad")


def test_a_question_about_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the packaged model that reads pictures: places of picture and words, and a neutral point that is neutral."""
    scenes = held_out(1, kind="exists", seed=3)
    pictures(scenes.pixels)[0].save(tmp_path / "scene.png")
    asked = ("--image", str(tmp_path / "scene.png"), "--text", "Is there a 3?", "--span", "a 3", "--new", "3")
    with_ = ("--with", "vision_heads[scale=3]", "--sweep", "scale=1,3", "--out", str(tmp_path / "made"))
    report = told(capsys, "vlm", *with_, *asked)
    assert report["model"]["kind"] == "vision-language"
    spans = report["prompt"]["spans"]
    assert [report["prompt"]["tokens"][place] for place in spans["text"]] == list("a 3")
    assert spans["image"] == list(range(spans["image"][0], spans["image"][-1] + 1))
    assert set(report["attention"]) == {"image", "text", "sinks"}
    assert report["next"]["kl_bits"] > 0
    assert report["sweep"]["points"][0]["kl_bits"] == 0


def test_what_is_refused_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(held_out(1, seed=3).pixels)[0].save(tmp_path / "scene.png")
    image = ("--image", str(tmp_path / "scene.png"), "--text", "Is there a 3?", "--out", str(tmp_path / "made"))
    cases = [
        (["--with", "vision_heads", *image], "no vision tower"),
        (["vlm", "--with", "vision_heads", "--text", "Is there a 3?"], "give --image"),
        (["vlm", "--with", "agla", *image, "--image", "other.png"], "--image is given 2 times"),
        (["vlm", "--with", "buckets", *image], "buckets takes language models; vlm is a vision-language model"),
        (["vlm", "--with", "vision_heads", "--image", "none.png", "--text", "x"], "none.png"),
        (["vlm", "--with", "vision_heads", "--chat", *image], "--chat goes with text alone"),
        (["vlm", "--with", "control[box=0,0,2,1]", *image], "does not lie in the picture"),
        (["vlm", "--with", "causal_maps[vision=odd]", *image], "no map 'odd'"),
    ]
    for arguments, message in cases:
        assert message in refused(capsys, *arguments)
    assert not (tmp_path / "made").exists()
