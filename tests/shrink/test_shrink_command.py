"""`manyheads shrink` as a user types it: what it writes, what it repeats after a stop, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import held
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from manyheads.cli import main
from manyheads.heads.profile import Profile
from manyheads.hosts.fingerprint import fingerprint
from manyheads.hosts.loading import BUNDLED, Loaded, load_model
from manyheads.hosts.questions import held_out
from manyheads.shrink import H2O, AdaKV, Duo, Policy, Quantised, measure, plan, policies, release, run
from manyheads.shrink.command import choose_variants, in_chats
from manyheads.shrink.variants import Profiles, find_policy, known_policies, read_variants

GATES = "0.9\t0.1\n0.2\t0.8\n"
QUICK = ("--length", 192, "--trials", 1)


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
              "max_position_embeddings": 512, **changes}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps and windows, and pages that draw nothing: what is tested is what happens around them."""
    for name, value in {"TAIL": 8, "GREEDY": 4, "STEPS": 3}.items():
        monkeypatch.setattr(run, name, value)
    for name, value in {"WINDOWS": 2, "REPEATS": 1}.items():
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr("manyheads.runs.page._libraries", lambda: "")  # the charts' scripts take a second to bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small random model on disk that reads bytes."""
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    (tmp_path / "gates").mkdir()
    (tmp_path / "gates" / "full_attention_heads.tsv").write_text(GATES)
    return tmp_path / "gates"


def shrink(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["shrink", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def loaded() -> Loaded:
    return Loaded(llama(), None, "small")


# -- what it does ------------------------------------------------------------------------------------------------------


def test_full_and_shrunk_side_by_side(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, err = shrink(
        capsys, folder, "--policy", "streaming", "--policy", "full", "--budget-tokens", 32, *QUICK, "--out", out
    )
    assert code == 0
    assert "streaming, 32 tokens" in printed
    assert f"report: {out / 'report.html'}" in printed
    assert "[1/14]" in err
    assert "left" in err
    results = json.loads((out / "report.json").read_text())
    dense, short, full = results["summary"]
    assert [row["title"] for row in results["summary"]] == ["dense", "streaming, 32 tokens", "full"]
    for row in (dense, short, full):
        assert row["passkey_answers"] == row["needle_answers"] == 5
        assert row["recall_answers"] == 2
        assert row["bits_per_token"] > 0
    assert short["cache_bytes"] < 0.4 * dense["cache_bytes"]
    assert (full["kl_bits"] < 1e-6, full["greedy_agreement"], full["passkey"]) == (True, 1.0, dense["passkey"])
    assert short["kl_bits"] > 1e-3
    assert "<svg" not in (out / "report.html").read_text().split("<script")[0]
    assert results["experiment"]["lengths"] == [192]


def test_a_second_run_measures_nothing(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [folder, "--policy", "tova", "--budget-tokens", 16, "--tasks", "needle,perplexity", *QUICK, "--out", out]
    code, _, err = shrink(capsys, *command, "--json")
    assert (code, err.count("] ")) == (0, 5)
    cells = sorted((out / "cells").glob("*.json"))
    before = {path: path.read_bytes() for path in cells}
    code, printed, err = shrink(capsys, *command, "--json")
    assert (code, err) == (0, "")
    assert {path: path.read_bytes() for path in cells} == before
    assert json.loads(printed)["files"]["report"] == str(out / "report.html")
    cells[0].write_text("{ torn")
    cells[1].unlink()
    code, _, err = shrink(capsys, *command, "--json")
    assert code == 0
    assert "cannot be read" in err
    assert err.count("] ") == 2
    # Another budget shares the dense cells.
    command[4] = 24
    code, _, err = shrink(capsys, *command, "--json")
    assert err.count("] ") == 3


def test_an_interrupted_run_goes_on(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = [folder, "--policy", "keynorm", "--budget-tokens", 16, "--tasks", "passkey", *QUICK, "--out", out]
    measured, whole = [], run.Study.measure

    def stopped_at_two(study: run.Study, cell: Any) -> dict[str, Any]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(cell.title)
        return whole(study, cell)

    monkeypatch.setattr(run.Study, "measure", stopped_at_two)
    code, _, err = shrink(capsys, *command)
    assert code == 130
    assert "2 of 3 cells finished and kept" in err
    assert not (out / "report.json").exists()
    monkeypatch.setattr(run.Study, "measure", whole)
    code, _, err = shrink(capsys, *command)
    assert code == 0
    assert [line for line in err.splitlines() if line.startswith("[")] == [err.splitlines()[0]]
    assert err.startswith("[3/3] cost")


def test_without_memory_a_cell_fails_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = [folder, "--policy", "h2o", "--budget-tokens", 16, "--tasks", "passkey,perplexity", *QUICK, "--out", out]

    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    whole = run.measure_text
    monkeypatch.setattr(run, "measure_text", full)
    code, printed, err = shrink(capsys, *command)
    assert code == 0
    assert "can't allocate memory" in printed
    assert "failed" in err
    cells = json.loads((out / "report.json").read_text())["cells"]
    assert [cell["status"] for cell in cells] == ["done", "done", "failed", "failed", "done"]
    assert "can&#x27;t allocate memory" in (out / "report.html").read_text()
    monkeypatch.setattr(run, "measure_text", whole)
    code, _, err = shrink(capsys, *command)
    assert err == ""
    code, _, err = shrink(capsys, *command, "--retry-failed")
    assert err.count("] ") == 2
    cells = json.loads((out / "report.json").read_text())["cells"]
    assert {cell["status"] for cell in cells} == {"done"}


def test_a_sweep_draws_a_curve(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    code, printed, _ = shrink(
        capsys, folder, "--sweep", "--policy", "keynorm", "--policy", "tova", "--tasks", "perplexity", *QUICK, "--json",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    rows = json.loads(printed)["summary"][1:]
    assert [row["title"] for row in rows] == [
        f"{name}, ratio {ratio}" for name in ("keynorm", "tova") for ratio in (0.5, 0.75, 0.875, 0.9375)
    ]
    held = [row["cache_bytes"] for row in rows if row["policy"] == "keynorm"]
    assert held == sorted(set(held), reverse=True)


def test_what_a_sweep_tries_and_what_runs_without_a_policy(gates: Path) -> None:
    for profiles, more in ((Profiles(loaded(), None), []), (Profiles(loaded(), gates), ["duo"])):
        swept = choose_variants(None, [], profiles, sweep=True)
        names = ["streaming", "snapkv", "h2o", "tova", "keynorm", "expected", *more]
        assert [variant.name for variant in swept] == [name for name in names for _ in range(4)]
        assert [variant.budget for variant in swept[:4]] == [
            ("compression_ratio", 1 - share) for share in (1 / 2, 1 / 4, 1 / 8, 1 / 16)
        ]
        plain = choose_variants(None, [], profiles, sweep=False)
        assert [variant.title for variant in plain] == [
            "streaming, ratio 0.5", "duo, ratio 0.5" if more else "snapkv, ratio 0.5"
        ]  # fmt: skip


def test_the_packaged_model_keeps_its_keys_where_it_may(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, printed, _ = shrink(
        capsys, "--policy", "streaming", "--budget-tokens", 128, "--tasks", "passkey", "--length", 256, "--json",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    dense, short = json.loads(printed)["summary"]
    assert dense["passkey"] >= 0.9
    assert short["passkey"] < 0.7


# -- policies by name --------------------------------------------------------------------------------------------------


def test_every_exported_policy_has_a_name() -> None:
    exported = [getattr(policies, name) for name in policies.__all__]
    classes = [cls for cls in exported if isinstance(cls, type) and issubclass(cls, Policy)]
    classes.remove(policies.Composed)
    assert sorted(known_policies().values(), key=str) == sorted(classes, key=str)
    for short in ("full", "streaming", "snapkv", "h2o", "tova", "keynorm", "duo", "expected", "key-norm", "SnapKV"):
        assert find_policy(short) in classes
    with pytest.raises(ValueError, match="no policy is called 'snap-kv2'"):
        find_policy("snap-kv2")
    with pytest.raises(ValueError, match="no policy is called 't'"):
        find_policy("t")  # fits two


def test_arguments_and_budgets(gates: Path) -> None:
    profiles = Profiles(loaded(), gates)
    texts = [
        "h2o[recent_size=4,allocation=adakv]",
        "full",
        "snapkv[budget_tokens=40,window_size=8]",
        "duo[sink_size=2]",
    ]
    found = read_variants(texts, [("budget_tokens", 64), ("budget_tokens", 128)], profiles)
    assert [variant.title for variant in found] == [
        "h2o[recent_size=4,allocation=adakv], 64 tokens",
        "h2o[recent_size=4,allocation=adakv], 128 tokens",
        "full",
        "snapkv[window_size=8], 40 tokens",
        "duo[sink_size=2], 64 tokens",
        "duo[sink_size=2], 128 tokens",
    ]
    built = found[0].build()
    assert isinstance(built, H2O)
    assert (built.recent_size, built.allocation, built.budget_tokens) == (4, AdaKV(), 64)
    (stored,) = read_variants(["full[storage=quantised(bits=8)]"], [("budget_tokens", 64)], profiles)
    assert stored.title == "full[storage=quantised(bits=8)]"
    assert stored.build().storage == Quantised(bits=8)
    (ruled,) = read_variants(["moa[rule=[8,0.25]]"], [], profiles)
    assert ruled.build().rule == [8, 0.25]  # type: ignore[attr-defined]


def test_gates_come_from_the_profile(tmp_path: Path, gates: Path) -> None:
    own = loaded()
    (variant,) = read_variants(["duo"], [("compression_ratio", 0.5)], Profiles(own, gates))
    policy = variant.build()
    assert isinstance(policy, Duo)
    assert policy.full.tolist() == [[True, False], [False, True]]
    (gates / "config.json").write_text('{"sink_size": 4, "recent_size": 12}')
    (variant,) = read_variants(["duo"], [("compression_ratio", 0.5)], Profiles(own, gates))
    assert (variant.build().sink_size, variant.build().recent_size) == (4, 12)  # type: ignore[attr-defined]
    profile = Profile(fingerprint(own.model, "small"))
    profile.add("gates", torch.tensor([[0.1, 0.9], [0.8, 0.2]]), {"sink_size": 2, "recent_size": 6})
    profile.save(tmp_path / "profile")
    (variant,) = read_variants(["duo[sink_size=1]"], [("compression_ratio", 0.5)], Profiles(own, tmp_path / "profile"))
    policy = variant.build()
    assert isinstance(policy, Duo)
    assert policy.full.tolist() == [[False, True], [True, False]]
    assert (policy.sink_size, policy.recent_size) == (1, 6)


def test_spans_are_planned_for_the_ratio(tmp_path: Path) -> None:
    own = loaded()
    profile = Profile(fingerprint(own.model, "small"))
    losses = torch.tensor([3.0, 1.0])[:, None, None, None] * torch.tensor([[5.0, 5.0, 1.0, 1.0]] * 2)
    spans = [{"alpha": 16, "beta": 0.0}, {"alpha": 64, "beta": 0.0}]
    settings = {"spans": spans, "lengths": [128], "sink_size": 4}
    profile.add("influence", losses, settings)
    profile.save(tmp_path / "profile")
    (variant,) = read_variants(["moa"], [("compression_ratio", 0.6)], Profiles(own, tmp_path / "profile"))
    # 0.4 of 128 tokens lets half of the heads have the long span: those that lose most without it.
    assert variant.build().rules == [[(64.0, 0.0), (16.0, 0.0)]] * 2  # type: ignore[attr-defined]
    assert variant.title == "moa, ratio 0.6"


# -- a chat template ---------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture
def chatting(tmp_path: Path) -> Path:
    """The same model with the packaged bytes for tokens, two more that begin and end a turn, and a template."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = CHATML
    llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "chatting")
    tokenizer.save_pretrained(tmp_path / "chatting")
    return tmp_path / "chatting"


def test_texts_as_turns_of_which_nothing_is_dropped(
    capsys: pytest.CaptureFixture[str], chatting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every prompt that the command measures on, with few entries for each head: which places are left."""
    left: dict[bool, list[list[str]]] = {False: [], True: []}
    tokenizer = AutoTokenizer.from_pretrained(chatting)

    def follow(model: Any, policy: Policy | None, prefix: torch.Tensor, *rest: Any) -> int:
        if policy is not None:
            cache = policy.make_cache(model)
            model(prefix, past_key_values=cache)
            text = [tokenizer.decode([token]) for token in prefix[0].tolist()]
            left[policy.protect is not None] += [
                [text[at] for at in slots if at < 14 or at >= len(text) - 18]
                for slots in held(cache.layers[0]).values()
            ]
            release(model)
        return 0

    monkeypatch.setattr(measure, "follow", follow)
    text = tmp_path / "text.txt"
    text.write_text(held_out()[:20_000])
    command = [chatting, "--policy", "keynorm", "--budget-tokens", 48, "--chat", "open", "--chat", "protected"]
    command += ["--text", text]
    code, printed, _ = shrink(capsys, *command, "--tasks", "passkey", *QUICK, "--out", tmp_path / "out", "--json")
    assert code == 0
    titles = [row["title"] for row in json.loads(printed)["summary"]]
    assert titles == ["dense", "keynorm, 48 tokens", "keynorm, 48 tokens, template kept"]
    before, behind = ["<|start|>", *"user\n"], ["<|end|>", "\n", "<|start|>", *"assistant\n"]
    for open_, kept in zip(left[False], left[True], strict=True):
        assert kept[: len(before)] == before
        assert kept[-len(behind) :] == behind
        assert open_[: len(before)] != before or open_[-len(behind) :] != behind
    assert left[True]


def test_policies_that_drop_nothing_stay_one_row(chatting: Path) -> None:
    own = load_model(chatting)
    variants = read_variants(["full", "tidal[budget_tokens=16]", "tova"], [("budget_tokens", 64)], Profiles(own, None))
    titles = [variant.title for variant in in_chats(own, variants, ("protected", "open"))]
    assert titles == ["full", "tidal, 16 tokens", "tova, 64 tokens, template kept", "tova, 64 tokens"]


def test_a_model_without_a_chat_template(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    for model, name in ((folder, folder), (None, "byte_llama")):
        given = [] if model is None else [model]
        code, _, err = shrink(capsys, *given, "--chat", "protected", *QUICK, "--out", tmp_path / "out")
        assert code == 2
        assert f"--chat protected: {name} has no chat template: take a chat model" in " ".join(err.split())


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "streaming", "--budget-tokens", 4], "below the 5 that it always keeps"),
        (["--policy", "streaming", "--budget-bytes", 100], "it always keeps 5"),
        (["--compression-ratio", 1.5], "from 0 to below 1; got 1.5"),
        (["--compression-ratio", -0.1], "from 0 to below 1; got -0.1"),
        (["--budget-tokens", 64, "--compression-ratio", 0.5], "budgets of two kinds"),
        (["--policy", "snapkv[budget_tokens=64,compression_ratio=0.5]"], "one budget, please"),
        (["--policy", "full[budget_tokens=64]"], "takes no budget"),
        (["--policy", "sanpkv"], "no policy is called 'sanpkv'"),
        (["--policy", "snapkv[window=3]"], "SnapKV has no argument window; it has"),
        (["--policy", "tova[storage=quantised(bits=3)]"], "bits is 4 or 8"),
        (["--policy", "tova[storage=quantised(bit=3)]"], "Quantised has no argument bit"),
        (["--policy", "snapkv[window_size=0]"], "window_size must be a whole number"),
        (["--policy", "tidal", "--compression-ratio", 0.5], "keeps everything"),
        (["--policy", "duo"], "run `manyheads heads"),
        (["--policy", "razor"], "needs a profile of the model's heads"),
        (["--policy", "moa"], "or write a rule"),
        (["--heads", "nowhere"], "is no folder"),
        (["--tasks", "needle,nedle"], "want some of passkey, needle, recall, perplexity; got nedle"),
        (["--length", 20], "want at least 128 tokens"),
        (["--length", 511], "knows 512 positions"),
        (["--trials", 0], "want 1 to 1000"),
        (["--ask", "before"], "want after or within"),
        (["--chat", "closed"], "want open or protected"),
        (["--dtype", "int8"], "want float32 or bfloat16 or float16"),
        (["--device", "abacus"], "want cpu, auto, or cuda"),
        (["--text", "nowhere.txt"], "cannot be read"),
        (["--polcy", "duo"], "No such option"),
    ],
)
def test_bad_arguments_end_with_two(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, arguments: list[Any], words: str
) -> None:
    code, printed, err = shrink(capsys, folder, *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert words in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert printed == ""


def test_bad_files_end_with_two(capsys: pytest.CaptureFixture[str], folder: Path, gates: Path, tmp_path: Path) -> None:
    names = ("empty.txt", "short.txt", "binary.txt", "file")
    empty, short, binary, file = (tmp_path / name for name in names)
    empty.write_text("  \n")
    short.write_text("few words")
    binary.write_bytes(b"\xff\xfe\x00")
    file.write_text("")
    other = tmp_path / "other"
    other.mkdir()
    (other / "full_attention_heads.tsv").write_text("0.1\t0.2\t0.3\n" * 5)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "heads.safetensors").write_bytes(b"no tensors")
    (gates / "full_attention_heads.tsv").write_text("0.1\tmany\n")
    foreign = Profile(fingerprint(llama(num_hidden_layers=3), "foreign"))
    foreign.add("gates", torch.rand(3, 2), {})
    foreign.save(tmp_path / "foreign")
    results = tmp_path / "results"
    results.mkdir()
    (results / "experiment.json").write_text('{"schema": 99, "manyheads": "7.0"}')
    cases: list[tuple[list[Any], str]] = [
        (["--text", empty], "is empty"),
        (["--text", short, "--tasks", "perplexity", *QUICK], "has 9 tokens"),
        (["--text", binary], "is not UTF-8"),
        (["--heads", other], "head profile of another model: gates for 5 layers of 3"),
        (["--heads", torn], "is not a head profile that can be read"),
        (["--heads", gates], "is not a table of gates"),
        (["--heads", tmp_path / "foreign"], "is a head profile of another model (foreign)"),
        (["--heads", results], "holds no head profile"),
        (["--out", file], "is a file"),
        (["--out", results, *QUICK], "written by manyheads 7.0"),
    ]
    for arguments, words in cases:
        code, printed, err = shrink(capsys, folder, "--out", tmp_path / "out", *arguments)
        assert (code, printed) == (2, ""), arguments
        assert words in err, arguments
        assert "Traceback" not in err


def test_models_that_cannot_be_shrunk(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    BertLMHeadModel(BertConfig(**sizes)).save_pretrained(tmp_path / "encoder")
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    DeepseekV3ForCausalLM(
        DeepseekV3Config(**sizes, **latent, first_k_dense_replace=1, n_routed_experts=8, num_key_value_heads=2)
    ).save_pretrained(tmp_path / "latent")
    (tmp_path / "bare").mkdir()
    llama().save_pretrained(tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"\x00" * 64)
    llama().save_pretrained(tmp_path / "other")
    save_file({"w": torch.zeros(2)}, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    cases = [
        ("encoder", "is not a causal language model"),
        ("latent", "caches latents"),
        ("bare", "has no config.json"),
        ("missing", "does not exist"),
        ("torn", "damaged"),
    ]
    for name, words in cases:
        code, _, err = shrink(capsys, tmp_path / name, "--policy", "tova", *QUICK, "--out", tmp_path / "out")
        assert code == 2, name
        assert words in err, name
        assert "Traceback" not in err


def test_what_the_model_has_no_positions_for_is_refused(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """The model knows 512 positions: a longer text has none, and a larger budget would never drop anything."""
    for arguments, message in (
        (["--length", "600"], "--length 600: .* knows 512 positions, and 3 more are decoded; give at most 509"),
        (["--budget-tokens", "513"], "--budget-tokens 513: .* knows 512 positions, so nothing would ever be dropped"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["shrink", str(folder), "--out", str(tmp_path / "out"), "--policy", "streaming", *arguments])
        assert ended.value.code == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "out").exists()
