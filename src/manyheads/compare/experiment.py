"""What a comparison runs: names, settings and budgets, checked before anything is computed.

An experiment is a preset with changes on top. `preset: quick` (or standard, or full) names the preset; every section
that is given changes single settings of it, lists replace the preset's. A task that the preset has a recipe for takes
model and training settings from that recipe, unless its entry says otherwise.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from manyheads.compare.hybrid import common_patterns, deepened
from manyheads.near import suggest
from manyheads.registry import create_attention, mechanism_class
from manyheads.runs.given import MOST_YAML, parse_yaml, read_text, shown
from manyheads.tasks import create_task, list_tasks, task_group

PRESETS = ("quick", "standard", "full")
Kind = Literal["quality", "speed", "memory", "decode"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_NESTED = ("model", "training", "speed", "memory", "decode")

Whole = Annotated[int, Field(ge=1, le=1 << 24)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Lengths = Annotated[tuple[Whole, ...], Field(min_length=1)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("seeds", "sections", "learning_rates", "beyond", check_fields=False)
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """What is given twice would be counted as two, and their spread as none."""
        return tuple(dict.fromkeys(values))


class Heads(Settings):
    """hidden_size is cut into equal heads, as most mechanisms want it."""

    hidden_size: Whole = 128
    heads: Whole = 4

    @model_validator(mode="after")
    def _divides(self) -> Heads:
        if self.hidden_size % self.heads:
            near = [h for h in range(1, 65) if self.hidden_size % h == 0]
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by heads {self.heads}; heads can be one of {near}"
            )
        return self


class Model(Heads):
    """The model around the mechanism. intermediate_size: of the MLP, 0 for none. short_conv: width of a causal
    depthwise convolution before the projections, 0 for none. positions: "boxes" where the task has them. by_kind: what
    each kind of token has of its own, where the task has several ("mlp", "adapter", "embedding", "positions").
    adapter_size: of adapters before each mixer and MLP, 0 for none."""

    layers: Whole = 2
    intermediate_size: Annotated[int, Field(ge=0)] = 0
    short_conv: Annotated[int, Field(ge=0, le=64)] = 0
    positions: Literal["learned", "rotary", "boxes", "none"] = "learned"
    by_kind: tuple[Literal["mlp", "adapter", "embedding", "positions"], ...] = ()
    adapter_size: Annotated[int, Field(ge=0)] = 0


class Training(Settings):
    """One budget for every mechanism. seconds: a limit per cell on top of the steps. eval_every: steps between the
    points of the learning curve. warmup: fraction of the steps. stop_at: accuracy at which training ends early. beyond:
    at how many times the trained length the trained model is scored too."""

    learning_rates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (3e-3,)
    steps: Whole = 400
    seconds: Positive | None = None
    batch_size: Whole = 64
    eval_every: Whole = 50
    warmup: Fraction = 0.1
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    clip: Positive = 1.0
    router_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    stop_at: Fraction | None = 0.99
    beyond: tuple[Annotated[int, Field(ge=2, le=64)], ...] = ()


class Speed(Heads):
    """limit_seconds: a mechanism whose pass takes longer is not measured at larger lengths. turns: how often all
    mechanisms are gone through, so that what slows the machine down for a while falls on none of them alone and shows
    as scatter. repeats: passes in one turn, of which the median counts."""

    lengths: Lengths = (256, 512, 1024, 2048, 4096)
    batch: Whole = 1
    turns: Whole = 3
    repeats: Whole = 5
    limit_seconds: Positive = 5.0


class Memory(Heads):
    lengths: Lengths = (512, 1024, 2048, 4096)
    batch: Whole = 1
    limit_seconds: Positive = 120.0


class Decode(Heads):
    """tokens: steps that are timed at each context. limit_seconds: on filling the state. turns: as in speed."""

    contexts: Lengths = (256, 1024, 4096)
    batch: Whole = 1
    turns: Whole = 3
    tokens: Whole = 16
    limit_seconds: Positive = 30.0


def label_of(name: str, args: Mapping[str, Any]) -> str:
    """'moba[block=64]': the name with the arguments that differ from the defaults."""
    inner = ",".join(f"{key}={_brief(value)}" for key, value in sorted(args.items()))
    return f"{name}[{inner}]" if inner else name


def _brief(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)


class Entry(Settings):
    """A name with arguments of its own: in an experiment file a bare name, or a mapping with `name`."""

    name: str
    args: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: Any) -> Any:
        return _gathered(given, set(cls.model_fields))

    @property
    def label(self) -> str:
        return label_of(self.name, self.args)


def _gathered(given: Any, fields: set[str]) -> Any:
    """A name, or a mapping with some of the fields and any arguments, as {**fields, "args": arguments}."""
    if isinstance(given, str):
        return {"name": given}
    if not isinstance(given, Mapping):
        raise ValueError(f"want a name, or a mapping with 'name' and arguments; got {given!r}")
    if "args" in given:
        return given
    own = {key: value for key, value in given.items() if key in fields}
    return own | {"args": {str(key): value for key, value in given.items() if key not in fields}}


class MechanismEntry(Entry):
    """`heads` among its arguments replaces the model's, for mechanisms that have one head.

    layers: of a hybrid, which has neither name nor arguments itself, one entry per layer from below; in a file a list
    of entries. A model with more layers begins again with the first, and has a multiple of them.
    """

    name: str = ""
    layers: tuple[MechanismEntry, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: Any) -> Any:
        if isinstance(given, list | tuple):
            return {"layers": list(given), "args": {}}
        # Beside a name, `layers` is an argument that some mechanisms have.
        return _gathered(given, {"name"} if isinstance(given, Mapping) and given.get("name") else {"name", "layers"})

    @property
    def label(self) -> str:
        return ",".join(layer.label for layer in self.layers) or super().label

    @property
    def each(self) -> tuple[MechanismEntry, ...]:
        """The layers of a hybrid, or the mechanism alone."""
        return self.layers or (self,)

    @model_validator(mode="after")
    def _exists(self) -> MechanismEntry:
        if self.layers:
            self._check_layers()
            return self
        if "causal" in self.args:
            raise ValueError(f"{self.name}: 'causal' follows from the task and the section; leave it out")
        cls = mechanism_class(self.name)
        if self.args:  # a small instance: names and values of arguments are wrong before hours of work, not after
            example = {k: v for k, v in cls.card.example.items() if k in ("dim", "heads")}
            causal = min(cls.card.patterns, key=lambda p: (not p.causal, p)).causal
            create_attention(self.name, **{"dim": 64, "heads": 4, "causal": causal, **example, **self.args})
        return self

    def _check_layers(self) -> None:
        if self.args or len(self.layers) < 2 or any(layer.layers for layer in self.layers):
            raise ValueError(
                f"{self.label}: want a hybrid as a list of two or more mechanisms, each with its own arguments, none "
                "of them a list again"
            )
        common_patterns([layer.name for layer in self.layers])


class TaskEntry(Entry):
    """A task, its arguments, and where it wants other model or training settings than the rest."""

    model: Model = Model()
    training: Training = Training()

    @model_validator(mode="after")
    def _exists(self) -> TaskEntry:
        task = create_task(self.name, **self.args)
        for times in self.training.beyond:
            task.longer(times)
        if self.training.beyond and self.model.positions == "learned" and "max_length" in task.model_settings():
            raise ValueError(
                f"{self.name}: beyond={list(self.training.beyond)}, but its model learns a position for each place of "
                "the trained length and has none beyond; want positions of none or rotary"
            )
        return self


class Experiment(Settings):
    """A whole comparison with every setting filled in. processes: over which a quality cell spreads its sequence, as
    `torchrun` starts them."""

    preset: Literal["quick", "standard", "full"] = "quick"
    mechanisms: Annotated[tuple[MechanismEntry, ...], Field(min_length=1)]
    tasks: tuple[TaskEntry, ...] = ()
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...], Field(min_length=1)] = (0,)
    sections: Annotated[tuple[Kind, ...], Field(min_length=1)] = KINDS
    speed: Speed = Speed()
    memory: Memory = Memory()
    decode: Decode = Decode()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    processes: Annotated[int, Field(ge=1, le=64)] = 1

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        named = [(entry.label, "") for entry in self.mechanisms]
        sized = [(entry.label, entry.model.model_dump_json()) for entry in self.tasks]  # one task at several widths
        for what, labels in (("mechanism", named), ("task", sized)):
            twice = sorted(label for (label, _), count in Counter(labels).items() if count > 1)
            if twice:
                raise ValueError(f"the {what} {twice[0]} is there twice; leave one out, or give them other arguments")
        for task in self.tasks:
            for entry in self.mechanisms:
                deepened([layer.model_dump() for layer in entry.each], task.model.layers)
        if "quality" in self.sections and not self.tasks:
            raise ValueError(f"the quality section needs a task; want some of {list_tasks()}, or no 'quality'")
        others = [kind for kind in self.sections if kind != "quality"]
        if self.processes > 1 and others:
            raise ValueError(
                f"processes={self.processes} train the cells of quality, and {', '.join(others)} are measured in one: "
                "want quality as the only section"
            )
        return self


def create_experiment(changes: Mapping[str, Any] | None = None, *, where: str = "experiment") -> Experiment:
    """The preset named in `changes` (quick by default) with the changes made. where: named in errors."""
    if not isinstance(changes, Mapping | None):
        raise ValueError(f"{where}: want a mapping with keys such as 'mechanisms' and 'tasks', got {changes!r}")
    changes = dict(changes or {})
    try:
        return Experiment.model_validate(_resolve(dict(changes), where))
    except ValidationError as error:
        lines = dict.fromkeys(_lines(error, changes))
        raise ValueError("\n".join(f"{where}: {line}" for line in lines)) from None


def read_experiment(path: str | Path) -> dict[str, Any]:
    """The changes in a YAML file, not yet checked; `create_experiment` does that."""
    content = parse_yaml(read_text(path, most=MOST_YAML, what="--experiment"), f"--experiment {path}")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: want a mapping with keys such as 'mechanisms' and 'tasks', got {shown(content)}")
    return content


def preset(name: str) -> dict[str, Any]:
    """A preset as it stands in its file: an experiment file with `recipes` for tasks beside, and `arguments` for
    mechanisms that are asked for by name and are not in its list."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{suggest(str(name), PRESETS)}; want one of {list(PRESETS)}")
    text = files("manyheads.compare").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _resolve(changes: dict[str, Any], where: str) -> dict[str, Any]:
    """Preset, changes and recipes in one mapping, as `Experiment` wants it."""
    name = changes.get("preset", "quick")
    try:
        base = preset(name)
    except ValueError as error:
        raise ValueError(f"{where}: preset: {error}") from None
    recipes = base.pop("recipes")
    base.pop("arguments", None)
    shared = {key: _over({}, changes.pop(key, {})) for key in ("model", "training")}
    whole = base | {"preset": name}
    for key, value in changes.items():
        whole[key] = _over(whole.get(key, {}), value) if key in _NESTED else value
    tasks, cycle = whole.get("tasks", []), _cycle(whole.get("mechanisms"))
    if isinstance(tasks, Sequence) and not isinstance(tasks, str):
        named = [one for task in tasks for one in (task_group(task) if isinstance(task, str) else [task])]
        whole["tasks"] = [_task(entry, recipes, shared, cycle) for entry in named]
    return whole


def _cycle(mechanisms: Any) -> int:
    """How many layers a model must have a multiple of, so that every hybrid comes out even in it."""
    entries = mechanisms if isinstance(mechanisms, list | tuple) else []
    return math.lcm(*(len(entry) for entry in entries if isinstance(entry, list | tuple) and entry))


def _over(base: Any, change: Any) -> Any:
    return {**base, **change} if isinstance(base, Mapping) and isinstance(change, Mapping) else change


def _task(entry: Any, recipes: Mapping[str, Any], shared: Mapping[str, Any], cycle: int = 1) -> Any:
    """A task entry on top of the experiment's shared settings, on top of the preset's recipe for it, whose model is as
    much deeper for all as a hybrid's `cycle` of layers wants it."""
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping):
        return entry
    name = entry.get("name")
    recipe = recipes.get(name, {}) if isinstance(name, str) else {}
    task = {**recipe, **entry}
    model = recipe.get("model", {})
    deep = {"layers": cycle * math.ceil(model.get("layers", Model().layers) / cycle)} if cycle > 1 else {}
    for key, beneath in (("model", model | deep), ("training", recipe.get("training", {}))):
        task[key] = _over(beneath, shared[key])
        if key in entry:
            task[key] = _over(task[key], entry[key])
    return task


def _lines(error: ValidationError, changes: Mapping[str, Any]) -> Iterable[str]:
    """What is wrong, one line each: the key, what was given, what is wanted."""
    for found in error.errors(include_url=False):
        place = ".".join(str(part) for part in _as_given(found["loc"], changes))
        if found["type"] == "too_short" and found["input"]:
            continue  # its entries are wrong, each with a line of its own
        if found["type"] == "extra_forbidden":
            known = _known_keys(found["loc"])
            key = str(found["loc"][-1])
            yield f"unknown key {place!r}{suggest(key, known)}; known keys are {known}"
        elif found["type"] == "value_error":
            yield f"{place + ': ' if place else ''}{found['ctx']['error']}"
        else:
            given = json.dumps(found["input"], default=str)
            short = given if len(given) <= 120 else given[:117] + "..."
            got = "" if found["type"] == "missing" else f"; got {short}"
            yield f"{place}: {found['msg'][:1].lower()}{found['msg'][1:]}{got}"


def _as_given(location: Sequence[int | str], changes: Mapping[str, Any]) -> Sequence[int | str]:
    """Settings that all tasks share are named where they were written, and not once per task."""
    section = location[2] if len(location) > 2 and location[0] == "tasks" else None
    if section not in ("model", "training"):
        return location
    shared = changes.get(str(section), {})
    written = not isinstance(shared, Mapping) or (bool(shared) and set(location[3:4]) <= set(shared))
    return location[2:] if written else location


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """The keys known beside the last part of a location in Experiment."""
    at: Any = Experiment
    for part in location[:-1]:
        if isinstance(part, str) and part in at.model_fields:
            found = at.model_fields[part].annotation
            while get_args(found):
                found = get_args(found)[0]
            at = found
    keys = [key for key in at.model_fields if key != "args"]
    return [*keys, "model", "training"] if at is Experiment else keys
