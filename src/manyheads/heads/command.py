"""The command `manyheads heads`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads.runs.files import check_folder
from manyheads.runs.given import read_text

if TYPE_CHECKING:
    from manyheads.runs.sizes import Speed

MEASURES = ("retrieval", "echo", "induction", "sink", "local", "gates", "influence")
ON_REQUEST = ("previous", "duplicate")
_SHORTEST = 64
LENGTH, STEPS = 512, 120
# Choices of tokens and steps for models on which these take longer than ROOM seconds.
CHOICES = ((512, 120), (512, 60), (512, 40), (256, 60), (256, 40), (256, 30), (128, 40), (128, 20))
ROOM = 240.0


def heads(
    model: Annotated[
        str | None, typer.Argument(help="A folder, hub name, .gguf file or smollm2; else the packaged byte model.")
    ] = None,
    measure: Annotated[
        str, typer.Option(help=f"What to measure, separated by commas; also {' and '.join(ON_REQUEST)}.")
    ] = ",".join(MEASURES),
    text: Annotated[
        Path | None, typer.Option(help="A text file for sink and local mass; Python's own sources without it.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help=f"Tokens of the longest input; {LENGTH}, or fewer on a large model.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help=f"Steps that learn the gates; {STEPS}, or fewer on a large model.")
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help=f"{LENGTH} tokens and {STEPS} steps, however long a large model takes.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Which synthetic inputs.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the profile; one that is there is continued.")] = Path("heads"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure what every head does. Stopped runs go on where they were."""
    wanted = parse_measures(measure)
    content = None if text is None else read_text(text, what="--text")
    check_folder(out)
    study = Study(model, out, length=length, steps=steps, seed=seed, text=content, where=str(text), thorough=thorough)
    study.run(wanted)
    if as_json:
        files = {name: str(path) for name, path in study.files().items()}
        told = {"sizes": study.note} if study.note else {}
        return typer.echo(json.dumps({"files": files, **told, **study.profile.as_dict()}, indent=2))
    print_table(study.profile, wanted)
    return typer.echo("\n" + "\n".join(f"{name}: {path}" for name, path in study.files().items()))


def parse_measures(text: str) -> list[str]:
    known = (*MEASURES, *ON_REQUEST)
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    strange = [name for name in wanted if name not in known]
    if strange or not wanted:
        raise ValueError(f"--measure {text!r}: want some of {', '.join(known)}; got {', '.join(strange) or 'none'}")
    return [name for name in known if name in wanted]


class Study:
    """The measurements of one model in one folder: what is there already stays, what is missing is measured.

    length, steps: None: LENGTH and STEPS, or fewer that `run` chooses where the model is slow; thorough: those."""

    def __init__(
        self,
        model: str | None,
        out: Path,
        *,
        length: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        text: str | None = None,
        where: str = "the text",
        progress: Any = None,
        thorough: bool = False,
    ):
        from manyheads.heads.profile import Profile
        from manyheads.hosts.families import layer_plans
        from manyheads.hosts.fingerprint import fingerprint
        from manyheads.hosts.loading import load_model
        from manyheads.hosts.probes import Inputs
        from manyheads.runs.steps import Progress

        self.out, self.seed, self.note = out, seed, ""
        self._free = (length is None and not thorough, steps is None and not thorough)
        self.steps = STEPS if steps is None else steps
        self.loaded = load_model(model)
        layer_plans(self.loaded.model)
        self.length = _fitting(length, self.loaded.config, self.loaded.name)
        self.inputs = Inputs(self.loaded, seed=seed, text=text, where=where)
        self.text = "" if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]
        self.progress = progress or Progress()
        own = fingerprint(self.loaded.model, self.loaded.name)
        self.profile = Profile(own)
        if any((out / name).exists() for name in ("heads.safetensors", "heads.json")):
            held = Profile.load(out)
            held.check(own, out)
            self.profile = Profile(own, held.scores, held.settings)

    def files(self) -> dict[str, Path]:
        named = {
            "profile": "heads.safetensors",
            "JSON": "heads.json",
            "DuoAttention pattern": "duo",
            "Retrieval_Head scores": "retrieval_head.json",
        }
        return {name: self.out / file for name, file in named.items() if (self.out / file).exists()}

    def run(self, wanted: list[str]) -> None:
        from manyheads.heads.scores import REPEATED, TEXTUAL

        self._choose(wanted)
        self._group([name for name in wanted if name == "retrieval"], self._retrieval)
        self._group([name for name in wanted if name in REPEATED], self._repeats)
        self._group([name for name in wanted if name in TEXTUAL], self._on_text)
        self._group([name for name in wanted if name == "influence"], self._influence)
        self._group([name for name in wanted if name == "gates"], self._gates)

    def _choose(self, wanted: list[str]) -> None:
        """Tokens and steps that fit into some minutes, where they were not asked for; of a run in the same folder, the
        same again."""
        from manyheads.runs.sizes import Speed, chosen_note, first_within, keep_sizes, kept_sizes

        if not any(self._free):
            return
        facts = {"command": "heads", "model": asdict(self.profile.model) | {"name": ""}, "whole": self._sizes(),
                 "fewer": list(self._free)}  # fmt: skip
        held = kept_sizes(self.out, facts)
        if held is None:
            speed = Speed.of(self.loaded.model)
            options = self._choices()
            length, steps = first_within(options, lambda own: seconds(speed, wanted, *own), ROOM)
            takes = seconds(speed, wanted, length, steps)
            whole = (length, steps) == options[0]
            note = "" if whole else chosen_note(f"{length:,} tokens and {steps} steps of the gates", takes)
            held = {"length": length, "steps": steps, "note": note}
            keep_sizes(self.out, facts, held)
        self.length, self.steps, self.note = held["length"], held["steps"], held["note"]
        if self.note:
            self._note(self.note)

    def _sizes(self) -> dict[str, int]:
        return {"length": self.length, "steps": self.steps}

    def _choices(self) -> list[tuple[int, int]]:
        """Everything first; what was asked for by hand stays."""
        least = [(length if self._free[0] else self.length, steps if self._free[1] else self.steps)
                 for length, steps in CHOICES if not self._free[0] or length <= self.length]  # fmt: skip
        return list(dict.fromkeys([(self.length, self.steps), *least]))

    def _group(self, names: list[str], run: Callable[[list[str], int, dict[str, Any]], None]) -> None:
        """Measures that come from one run over the model; skipped where all are there with the same settings."""
        from manyheads.runs.memory import within_memory

        if not names:
            return
        settings = self.settings(names[0])
        if all(self.profile.settings.get(name, {}).get("asked") == settings for name in names):
            self.progress.note(f"{', '.join(names)}: already in {self.out}")
            return
        within_memory(lambda length: run(names, length, {"asked": settings, "length": length}), self.length, self._note)

    def settings(self, name: str) -> dict[str, Any]:
        """What a figure depends on, besides the model."""
        asked: dict[str, Any] = {"length": self.length, "seed": self.seed}
        if name == "gates":
            return asked | {"steps": self.steps}
        return asked | {"text": self.text} if name in ("sink", "local", *ON_REQUEST) else asked

    def _note(self, text: str) -> None:
        self.progress.note(text)

    # -- the measures ----------------------------------------------------------------------------------------------

    def _retrieval(self, names: list[str], length: int, settings: dict[str, Any]) -> None:
        from manyheads.heads.formats import write_retrieval
        from manyheads.heads.retrieval import DEPTHS, retrieval

        lengths = [length // 2, length * 3 // 4, length]
        work = [float(n) for n in lengths for _ in DEPTHS]
        with self.progress.measure("retrieval", work) as tell:
            scores, trials = retrieval(self.inputs, lengths=lengths, tell=tell)
        found = scores.shape[-1]
        path = self.out / "retrieval_head.json"
        if found:
            write_retrieval(path, scores)
        else:
            path.unlink(missing_ok=True)
            self._note(f"retrieval: none of {trials} needles was found, so that every score is 0")
        mean = scores.mean(-1) if found else scores.new_zeros(scores.shape[:2])
        own = {"lengths": lengths, "depths": list(DEPTHS), "trials": trials, "found": found}
        self._keep({"retrieval": mean}, settings | own)

    def _repeats(self, names: list[str], length: int, settings: dict[str, Any]) -> None:
        from manyheads.heads.scores import on_repeats

        with self.progress.measure("echo, induction") as tell:
            found = on_repeats(self.inputs, length=length, tell=tell)
        self._keep(found, settings)

    def _on_text(self, names: list[str], length: int, settings: dict[str, Any]) -> None:
        from manyheads.heads.scores import SINKS, on_text

        recent = length // 8
        with self.progress.measure("sink, local, previous, duplicate") as tell:
            found = on_text(self.inputs, length=length, recent=recent, tell=tell)
        self._keep(found, settings | {"sink_size": SINKS, "recent_size": recent})

    def _influence(self, names: list[str], length: int, settings: dict[str, Any]) -> None:
        from manyheads.heads.influence import COUNT, default_spans, influence

        spans, lengths, (sink, _) = default_spans(length), [length // 2, length], sizes(length)
        work = [float(n) for n in lengths for _ in range(COUNT)]
        with self.progress.measure("influence", work) as tell:
            found = influence(self.inputs, spans=spans, lengths=lengths, sink_size=sink, tell=tell)
        own = {"spans": [asdict(span) for span in spans], "lengths": lengths, "sink_size": sink}
        self._keep({"influence": found}, settings | own)

    def _gates(self, names: list[str], length: int, settings: dict[str, Any]) -> None:
        from manyheads.heads.formats import DuoPattern, write_duo
        from manyheads.heads.gates import GateSettings, learn_gates

        sink, recent = sizes(length)
        own = GateSettings(length=length, sink_size=sink, recent_size=recent, steps=self.steps, seed=self.seed)
        work = [float(own.tokens(step)) for step in range(own.steps)]
        with self.progress.measure("gates", work) as tell:
            gates = learn_gates(self.inputs, own, checkpoint=self.out / "gates.partial.safetensors", tell=tell)
        config = {
            "model_name": self.loaded.name,
            "dataset_format": "multiple_passkey",
            "supervision": "distill",
            "lr": own.lr,
            "num_steps": own.steps,
            "batch_size": own.rows,
            "max_length": own.length,
            "reg_weight": own.reg,
            "initial_value": 1.0,
            "seed": own.seed,
        }
        write_duo(self.out / "duo", DuoPattern(gates, sink, recent, config))
        self._keep({"gates": gates}, settings | asdict(own))

    def _keep(self, found: dict[str, Any], settings: dict[str, Any]) -> None:
        for name, values in found.items():
            self.profile.add(name, values, settings)
        self.profile.save(self.out)


def seconds(speed: Speed, wanted: list[str], length: int, steps: int) -> float:
    """What the measures take, about: passes, and where there is a way back as much again and half of that."""
    from manyheads.heads.retrieval import DEPTHS

    parts = [length // 2, length * 3 // 4, length]
    found = 0.0
    if "retrieval" in wanted:
        found += len(DEPTHS) * sum(speed.read(n) + speed.decoded(10) for n in parts)
    for some in (("echo", "induction"), ("sink", "local", *ON_REQUEST)):
        found += 4 * speed.read(length) if set(some) & set(wanted) else 0
    if "influence" in wanted:
        found += 4 * 3 * (speed.read(length) + speed.read(length // 2))
    if "gates" in wanted:
        found += steps * (2.5 * speed.read(length * 13 // 16, 2)) + min(2 * steps, 48) * speed.read(length * 3 // 4)
    return found


def sizes(length: int) -> tuple[int, int]:
    """Sinks and recent tokens of a streaming head: DuoAttention's 64 and 256, less where inputs are short."""
    return min(64, length // 32), min(256, length // 8)


def _fitting(length: int | None, config: Any, name: str) -> int:
    most = getattr(config, "max_position_embeddings", None) or length or LENGTH
    if length is None:
        return LENGTH if most >= LENGTH else max(_SHORTEST, most)
    if not _SHORTEST <= length <= most:
        raise ValueError(f"--length {length}: {name} can be measured with {_SHORTEST} to {most} tokens")
    return length


def print_table(profile: Any, wanted: list[str], count: int = 5) -> None:
    """The best heads of every measure, as layer.head; gates as layer.KV head."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    own = profile.model
    size = f"{own.layers} layers of {own.heads} query heads on {own.kv_heads} KV heads"
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    columns = []
    for name in wanted:
        table.add_column(f"{name} (KV)" if name == "gates" else name, no_wrap=True)
        columns.append([f"{layer}.{head}  {value:.3g}" for layer, head, value in profile.top(name, count)])
    for row in range(count):
        table.add_row(*[column[row] if row < len(column) else "" for column in columns])
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print(f"top heads of {own.name}, as layer.head from 0: {size}", markup=False)
    console.print(table)
