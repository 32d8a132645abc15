"""The command `manyheads shrink`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads.runs.options import Scheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manyheads.hosts.loading import Loaded
    from manyheads.shrink.plan import Plan
    from manyheads.shrink.variants import Budget, Profiles, Variant

TASKS = ("passkey", "needle", "recall", "perplexity")
LENGTHS, SWEPT_LENGTHS = (512, 1024, 2048), (1024,)
DTYPES = ("float32", "bfloat16", "float16")
ASKS = ("after", "within")
CHATS = ("open", "protected")
_SHORTEST = 128
# Seconds that a run may take for each of its caches, the dense one too, unless told otherwise.
ROOM = 80.0


def shrink(
    model: Annotated[
        str | None, typer.Argument(help="A folder, hub name, .gguf file or smollm2; else the packaged byte model.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="streaming, snapkv, duo, ...; with arguments: 'snapkv\\[window_size=16]'. May be repeated."),
    ] = None,
    budget_tokens: Annotated[
        list[int] | None, typer.Option(help="Entries per KV head, on average; may be repeated.")
    ] = None,
    budget_bytes: Annotated[list[int] | None, typer.Option(help="Bytes of the cache; may be repeated.")] = None,
    compression_ratio: Annotated[
        list[float] | None,
        typer.Option(help="Share that is dropped, 0 to 1; of the heads for duo. 0.5 without a budget."),
    ] = None,
    heads: Annotated[
        Path | None, typer.Option(help="A head profile: the folder that `manyheads heads MODEL` wrote.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file; held-out Python sources without it.")] = None,
    tasks: Annotated[str, typer.Option(help="What to measure, separated by commas.")] = ",".join(TASKS),
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a trial; may be repeated.")] = None,
    trials: Annotated[
        int | None, typer.Option(help="Trials for every length and depth; 2, or 1 on a large model.")
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="All lengths, trials and depths, however long a large model takes.")
    ] = False,
    ask: Annotated[
        str, typer.Option(help="Questions come 'after' the prompt, or are 'within' it and known to the policy.")
    ] = "after",
    chat: Annotated[
        list[str] | None,
        typer.Option(
            help="Texts as turns of the model's chat template, which policies may drop ('open') or may not "
            "('protected'); both if repeated."
        ),
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Several policies at 1/2, 1/4, 1/8 and 1/16.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder for results; one that is there is continued.")] = Path("shrunk"),
    scheduler: Scheduler = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run stored failures again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Shrink a model's KV cache, and tell what that saves and what it costs. Stopped runs go on where they were."""
    from manyheads.runs.files import check_folder
    from manyheads.runs.given import read_text

    wanted = parse_tasks(tasks)
    budgets = read_budgets(budget_tokens, budget_bytes, compression_ratio)
    chats = tuple(dict.fromkeys(chat or []))
    words = [("--ask", ask, ASKS), ("--dtype", dtype, DTYPES), *(("--chat", own, CHATS) for own in chats)]
    for name, value, known in words:
        if value not in known:
            raise ValueError(f"{name} {value!r}: want {' or '.join(known)}")
    if trials is not None and not 1 <= trials <= 1000:
        raise ValueError(f"--trials {trials}: want 1 to 1000")
    check_folder(out)
    content = None if text is None else read_text(text, what="--text")
    loaded = load(model, device, dtype)

    from manyheads.hosts.questions import Questions
    from manyheads.shrink import plan
    from manyheads.shrink.run import Study, check_positions, run_study
    from manyheads.shrink.variants import Profiles

    turn = check_chat(loaded, chats)
    variants = in_chats(loaded, choose_variants(policy, budgets, Profiles(loaded, heads), sweep), chats)
    whole = plan.Sizes(
        parse_lengths(length, loaded, SWEPT_LENGTHS if sweep else LENGTHS),
        trials or 2, plan.DEPTHS, plan.WINDOWS, plan.REPEATS,
    )  # fmt: skip
    asked = plan.Plan(variants, wanted, whole, ask, chat=turn is not None)
    check_positions(loaded, asked)
    if not thorough and not (length and trials):
        asked = within_time(loaded, asked, out, lengths=not length, trials=trials is None)
    questions = Questions(loaded, text=content, where=f"--text {text}", turn=turn)
    results = run_study(Study(loaded, asked, questions), out, retry_failed=retry_failed, scheduler=scheduler)
    tell(results, out, as_json)


def within_time(loaded: Loaded, asked: Plan, out: Path, *, lengths: bool, trials: bool) -> Plan:
    """The plan with what fits into some minutes on this machine, or what an earlier run in the folder chose.

    lengths, trials: whether these may be fewer than in the plan."""
    from manyheads.hosts.fingerprint import fingerprint
    from manyheads.runs.sizes import Speed, chosen_note, first_within, keep_sizes, kept_sizes
    from manyheads.shrink.plan import Sizes, choices

    parameter = next(loaded.model.parameters())
    facts = {
        "command": "shrink", "model": asdict(fingerprint(loaded.model, "")), "dtype": str(parameter.dtype),
        "device": parameter.device.type, "whole": asdict(asked.sizes), "fewer": [lengths, trials],
    }  # fmt: skip
    held = kept_sizes(out, facts)
    if held is None:
        speed = Speed.of(loaded.model)
        options = [replace(asked, sizes=own) for own in choices(asked.sizes, lengths=lengths, trials=trials)]
        chosen = first_within(options, lambda own: own.total(speed), ROOM * (1 + len(asked.variants)))
        note = "" if chosen is options[0] else chosen_note(str(chosen.sizes), chosen.total(speed))
        held = {**asdict(chosen.sizes), "note": note}
        keep_sizes(out, facts, held)
    note = held["note"]
    made: dict[str, Any] = {key: tuple(own) if isinstance(own, list) else own for key, own in held.items()}
    del made["note"]
    sizes = Sizes(**made)
    if note:
        typer.echo(note, err=True)
    return replace(asked, sizes=sizes, note=note)


def tell(results: dict[str, Any], out: Path, as_json: bool) -> None:
    from manyheads.runs.results import done
    from manyheads.shrink.summary import print_summary, summarise

    if as_json:
        files = {"report": str(out / "report.html"), "results": str(out / "report.json")}
        typer.echo(json.dumps({"files": files, "summary": summarise(results)}, indent=2))
    else:
        print_summary(results)
        typer.echo(f"\nreport: {out / 'report.html'}")
    if not any(done(cell) for cell in results["cells"]):
        raise typer.Exit(1)


def load(name: str | None, device: str, dtype: str) -> Loaded:
    """The model in eval mode on its device, with nothing said about it but errors."""
    import torch

    from manyheads.hosts.loading import load_model

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda") or (device.startswith("cuda") and not torch.cuda.is_available()):
        raise ValueError(f"--device {device}: want cpu, auto, or cuda where there is one")
    loaded = load_model(name, dtype=dtype)
    loaded.model.to(device)
    return loaded


def choose_variants(names: list[str] | None, budgets: list[Budget], profiles: Profiles, sweep: bool) -> list[Variant]:
    from manyheads.shrink.variants import SWEEP, SWEPT, SWEPT_WITH_PROFILE, find_policy, read_variants

    if sweep:
        chosen = names or [
            *SWEPT, *(name for name in SWEPT_WITH_PROFILE if profiles.offers(find_policy(name)))
        ]  # fmt: skip
        budgets = budgets or [("compression_ratio", 1 - share) for share in SWEEP]
    else:
        chosen = names or ["streaming", "duo" if profiles.offers(find_policy("duo")) else "snapkv"]
        budgets = budgets or [("compression_ratio", 0.5)]
    return read_variants(chosen, budgets, profiles)


def check_chat(loaded: Loaded, chats: Sequence[str]) -> tuple[list[int], list[int]] | None:
    """What the model's chat template puts around texts, where they are to be turns of it."""
    from manyheads.hosts.turns import asked_turn

    if not chats:
        return None
    try:
        return asked_turn(loaded)
    except ValueError as error:
        raise ValueError(f"--chat {chats[0]}: {error}") from error


def in_chats(loaded: Loaded, variants: list[Variant], chats: Sequence[str]) -> list[Variant]:
    """Each variant as asked: its template open, protected, or one after the other."""
    from manyheads.shrink.template import ChatTemplate

    if "protected" not in chats:
        return variants
    template = ChatTemplate.of(loaded.tokenizer)
    ways = [[own.protecting(template) if chat == "protected" else own for chat in chats] for own in variants]
    return list({own.title: own for both in ways for own in both}.values())


def read_budgets(tokens: list[int] | None, size: list[int] | None, ratios: list[float] | None) -> list[Budget]:
    given: dict[str, list[Any]] = {"budget_tokens": tokens or [], "budget_bytes": size or [],
                                   "compression_ratio": ratios or []}  # fmt: skip
    kinds = [key for key, values in given.items() if values]
    if len(kinds) > 1:
        names = " and ".join("--" + key.replace("_", "-") for key in kinds)
        raise ValueError(f"{names} are budgets of two kinds: give one kind; it may be repeated")
    return [(key, value) for key in kinds for value in dict.fromkeys(given[key])]


def parse_tasks(text: str) -> tuple[str, ...]:
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    strange = [name for name in wanted if name not in TASKS]
    if strange or not wanted:
        raise ValueError(f"--tasks {text!r}: want some of {', '.join(TASKS)}; got {', '.join(strange) or 'none'}")
    return tuple(name for name in TASKS if name in wanted)


def parse_lengths(given: list[int] | None, loaded: Loaded, default: tuple[int, ...]) -> tuple[int, ...]:
    """Those that were asked for; by default those that the model knows positions for."""
    most = getattr(loaded.config, "max_position_embeddings", None) or max(default) + _SHORTEST
    if not given:
        return tuple(n for n in default if n + _SHORTEST <= most) or (max(_SHORTEST, most - _SHORTEST),)
    if min(given) < _SHORTEST:
        raise ValueError(f"--length {min(given)}: want at least {_SHORTEST} tokens")
    return tuple(sorted(set(given)))
