"""What a command line asks: which method with which settings, on which models and texts, and who teaches."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from manyheads.convert.adapters import check_peft
from manyheads.convert.cases import case_spec, default_loss
from manyheads.convert.damage import Sizes
from manyheads.convert.healing import FORMS, Healing
from manyheads.convert.layout import cache_numbers
from manyheads.convert.lessons import check_teacher
from manyheads.convert.method import Method
from manyheads.convert.methods import METHODS, Distilled, Hosted
from manyheads.convert.pictures import Thinned, classifies_images, prune_images
from manyheads.convert.ranks import Ranks
from manyheads.convert.run import Conversion, Plan, run_conversion
from manyheads.convert.saving import check_target
from manyheads.convert.streamed import Change, Cutting, Pooling, read_scores, stream
from manyheads.convert.sweep import run_sweep
from manyheads.hosts.loading import Loaded, anywhere, find_model, load_model
from manyheads.hosts.questions import Questions, library_text
from manyheads.registry import list_attentions
from manyheads.runs.given import read_text
from manyheads.runs.names import parse_name

# Options of a mechanism that a method has too.
_ALSO = {"distil": ("transfer",), "bam": ("active",)}
_UNITS = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
# The share of a text that is measured on; the rest is for calibration and healing.
_MEASURED = 0.2
# Rows of a step of the relations that --transfer counts.
_ROWS = 8


@dataclass(frozen=True)
class Asked:
    """own: each method's settings, by its name. knobs: each method's knob as it was typed. beside: the options of a
    mechanism. training: heal, healing, lr, against. dtype: of the files that are written. None is what was not
    given."""

    to: str
    own: Mapping[str, Mapping[str, Any]]
    knobs: Mapping[str, str | None]
    beside: Mapping[str, Any]
    training: Mapping[str, Any]
    sizes: Sizes
    budget_bytes: int | None = None
    calibrate: int = 8192
    max_damage: float | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        _check_training(self.to, **self.training)
        _check_strangers(self)

    @property
    def spec(self) -> dict[str, Any] | None:
        """The mechanism that `to` names, None where it is a method."""
        if self.to in METHODS:
            return None
        named = parse_name(self.to)
        return {"name": named} if isinstance(named, str) else named

    @property
    def values(self) -> tuple[int, ...] | None:
        typed = self.knobs.get(self.to)
        if typed is None:
            return None
        values = parse_counts(METHODS[self.to].knob, typed)
        if self.budget_bytes is not None:
            raise ValueError(f"{METHODS[self.to].knob} and --budget-bytes both say how far to go: give one of them")
        return values


def run_asked(
    asked: Asked, models: Sequence[str], text: Path | None, out: Path, *, write: bool, scheduler: str | None = None
) -> dict[str, Any]:
    """Loads, converts, measures and writes what was asked for; returns the record. scheduler: address of a Dask
    scheduler, whose workers take a value each."""
    check_target(out, *models, asked.training["against"], text, weights=write)
    if models and classifies_images(where := find_model(models[0])):
        if scheduler is not None:
            raise ValueError(f"--scheduler does not go with {models[0]}, which is an image classifier: leave it out")
        return prune_images(where, str(models[0]), _thinned(asked, str(models[0]), text), out, write=write)
    if scheduler is not None and (write or len(asked.values or ()) < 2):
        raise ValueError(
            "--scheduler spreads the values of a sweep over workers, and this is one conversion: give several values, "
            "such as --kv-heads 4,2,1, and --dry-run"
        )
    made = conversion_of(asked, models, text)
    # Processes that were launched together share out the rows of every step, and have no folder to each.
    if not write and len(made.plan.values) > 1 and Ranks.here().world == 1:
        return run_sweep(made, out, scheduler=scheduler, again=_again(asked, models, text))
    return run_conversion(made, out, write=write)


def _again(asked: Asked, models: Sequence[str], text: Path | None) -> Callable[[], Conversion]:
    """`conversion_of` from any folder."""
    named = [anywhere(name) for name in models]
    against = asked.training["against"]
    training = {**asked.training, "against": None if against is None else anywhere(against)}
    return partial(conversion_of, replace(asked, training=training), named, None if text is None else text.resolve())


def conversion_of(asked: Asked, models: Sequence[str], text: Path | None) -> Conversion:
    """What was asked for, loaded and checked."""
    values = asked.values
    loaded = first = load_model(models[0] if models else None, dtype=asked.dtype or "float32")
    healing = _healing(loaded, asked, asked.training["heal"], asked.training["healing"] or "full")
    teacher = _teacher(loaded, asked.training["against"], asked.dtype or "float32")
    method = _method(asked, loaded)
    if isinstance(method, Distilled):
        if teacher is not None and asked.budget_bytes is None:
            values = values or (loaded.config.num_hidden_layers,)
        method, loaded = _distilling(method, loaded, teacher, asked, healing)
    if asked.budget_bytes is None and method.usual is not None:
        values = values or (method.usual,)
    values = values or (_within(method, loaded, asked.budget_bytes),)
    measured, trained = _texts(loaded, text)
    plan = Plan(values, asked.sizes, asked.calibrate, healing, asked.max_damage, asked.dtype)
    by = None if teacher is None else teacher.model
    return Conversion(loaded, method, plan, measured, trained, by, [] if first is loaded else [first.model])


def stream_asked(
    asked: Asked, models: Sequence[str], scores: Path | None, strange: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """Converts one file of weights at a time; returns the record. strange: further options, which do not go with it."""
    check_target(out, *models, scores)
    own = {f"--{key.replace('_', '-')}": value for key, value in asked.own.get(asked.to, {}).items() if key != "align"}
    beside = {f"--{key}": value for key, value in {**asked.beside, **asked.training}.items()}
    whole = {"--budget-bytes": asked.budget_bytes, "--max-damage": asked.max_damage, "--dtype": asked.dtype}
    for name, value in {**own, **beside, **whole, **strange}.items():
        if value is not None:
            raise ValueError(f"{name} takes the whole model, and --stream holds one file of it at a time")
    values = asked.values or ()
    change: Change | None = None
    if len(values) == 1 and asked.to == "gqa" and scores is None:
        change = Pooling(values[0], asked.own["gqa"]["align"] or "mean")
    elif len(values) == 1 and asked.to == "prune" and scores is not None:
        change = Cutting(values[0], read_scores(scores))
    elif asked.to == "prune":
        raise ValueError("--stream --to prune cuts by scores that are given: --heads N and --scores FILE")
    if change is None:
        raise ValueError("--stream takes --to gqa with --kv-heads N, or --to prune with --heads N and --scores FILE")
    return stream(Path(find_model(models[0] if models else None)), out, change)


def _check_training(to: str, heal: str | None, healing: str | None, lr: float | None, against: str | None) -> None:
    """ValueError for options that do not go together, before anything is loaded."""
    if healing is not None and healing not in FORMS:
        raise ValueError(f"--healing {healing!r}: want one of {', '.join(FORMS)}")
    if healing is not None and heal is None:
        raise ValueError(f"--healing {healing} says how, and --heal TOKENS how long: give both")
    if against is not None and healing != "distil" and to != "distil":
        raise ValueError(f"--against {against} is a teacher, for --healing distil or --to distil: give one of them")
    if lr is not None and not 0 < lr < 1:
        raise ValueError(f"--lr {lr}: want a number between 0 and 1")
    if healing == "lora":
        check_peft()


def _check_strangers(asked: Asked) -> None:
    """ValueError for options of another method or mechanism than was asked for, and for one that there is not."""
    to, beside = asked.to, asked.beside
    for other, settings in asked.own.items():
        strange = [f"--{key.replace('_', '-')}" for key, value in settings.items() if value is not None]
        strange += [METHODS[other].knob] if asked.knobs.get(other) is not None else []
        if other != to and strange:
            raise ValueError(f"{strange[0]} belongs to --to {other}, and --to {to} was given")
    if not 0 <= (beside["transfer"] or 0) <= 10**7:
        raise ValueError(f"--transfer {beside['transfer']}: want a number of steps, 0 or more")
    spec = asked.spec
    if spec is None:
        for name, value in beside.items():
            if value is not None and name not in _ALSO.get(to, ()):
                raise ValueError(f"--{name} belongs to a mechanism, and --to {to} was given")
    elif spec["name"] not in list_attentions():
        raise ValueError(f"--to {to!r}: want {', '.join(METHODS)}, or a mechanism (`manyheads list`)")
    if beside["transfer-loss"] is not None and not beside["transfer"]:
        raise ValueError("--transfer-loss says what is learnt: give --transfer STEPS with it")


def _thinned(asked: Asked, name: str, text: Path | None) -> Thinned:
    """How an image classifier is pruned; ValueError for what is asked of it besides."""
    own, values = asked.own["prune"], asked.values if asked.to == "prune" else None
    if asked.to != "prune":
        raise ValueError(f"{name} is an image classifier, and --to {asked.to} takes a language model: want --to prune")
    if own["by"] not in (None, "dimap"):
        raise ValueError(f"--by {own['by']} asks for text, and {name} is an image classifier: want --by dimap")
    strange = {"--uniform/--global": own["uniform"], "--budget-bytes": asked.budget_bytes, "--text": text}
    strange |= {f"--{key}": value for key, value in asked.training.items()}
    for option, value in strange.items():
        if value is not None:
            raise ValueError(f"{option} does not go with {name}, which is an image classifier: leave it out")
    sparsity, heads = own["sparsity"], values
    if sparsity is not None and heads is not None:
        raise ValueError("--heads takes heads out and --sparsity sets single weights to zero: give one of them")
    if heads is not None and len(heads) > 1:
        raise ValueError(f"--heads {','.join(map(str, heads))}: an image classifier takes one number at a time")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"--sparsity {sparsity}: want a share of the weights from 0 up to, but not, 1")
    if heads is None:
        return Thinned(0.5 if sparsity is None else sparsity, None, asked.max_damage, asked.dtype)
    return Thinned(None, heads[0], asked.max_damage, asked.dtype)


def _method(asked: Asked, loaded: Loaded) -> Method:
    spec, beside = asked.spec, asked.beside
    if spec is None:
        given = dict(asked.own[asked.to])
        if given.pop("sparsity", None) is not None or given.get("by") == "dimap":
            raise ValueError(
                f"--sparsity and --by dimap are for image classifiers such as Swin, and {loaded.name} is a "
                f"{type(loaded.model).__name__}: give --heads, and --by importance"
            )
        if asked.to == "bam" and beside["active"] is not None:
            given["active"] = _whole("--active", beside["active"])
        return METHODS[asked.to](**{key: value for key, value in given.items() if value is not None})
    heads, count = loaded.config.num_attention_heads, loaded.config.num_hidden_layers
    spec = case_spec(spec, heads, window=beside["window"], active=beside["active"])
    loss = beside["transfer-loss"] or default_loss(spec)
    return Hosted(spec, parse_layers(beside["layers"], count), beside["transfer"] or 0, loss)


def _whole(name: str, value: float) -> int:
    if value != int(value):
        raise ValueError(f"{name} {value}: want a whole number")
    return int(value)


def parse_layers(text: str | None, count: int) -> tuple[int, ...]:
    """'4-6,9' -> 4, 5, 6, 9."""
    if text is None:
        return tuple(range(count))
    if not re.fullmatch(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*", text):
        raise ValueError(f"--layers {text!r}: want layers such as 4-20, or 0,2,4")
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    if not found:
        raise ValueError(f"--layers {text!r}: no layer lies in it; want layers such as 4-20")
    return tuple(sorted(found))


def parse_counts(name: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise ValueError(f"{name} {text!r}: want a number, or several such as 4,2,1 with --dry-run")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def parse_tokens(text: str) -> int:
    """'200k' -> 200000."""
    match = re.fullmatch(r"(\d{1,12})([kMG]?)", text)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"--heal {text!r}: want a number of tokens such as 200k or 1M")
    return int(match[1]) * _UNITS[match[2]]


def _within(method: Method, loaded: Loaded, size: int | None) -> int:
    """The knob's value for so many bytes of cache per token; for half of what the model has, without them."""
    whole = cache_numbers(loaded.model)
    each = next(loaded.model.parameters()).element_size()
    return method.within(loaded.model, whole // 2 if size is None else size // each)


def _healing(loaded: Loaded, asked: Asked, tokens: str | None, form: str) -> Healing | None:
    if tokens is None:
        return None
    size, lr = sum(p.numel() for p in loaded.model.parameters()), asked.training["lr"]
    rate = lr if lr is not None else 1e-3 if size < 1e7 else 1e-4
    return Healing(parse_tokens(tokens), rate, asked.sizes.length, form=form)


def _teacher(loaded: Loaded, against: str | None, dtype: str) -> Loaded | None:
    if against is None:
        return None
    teacher = load_model(against, dtype=dtype)
    check_teacher(loaded, teacher)
    return teacher


def _distilling(
    method: Distilled, loaded: Loaded, teacher: Loaded | None, asked: Asked, healing: Healing | None
) -> tuple[Distilled, Loaded]:
    """The method with its lesson, and the source that the student is measured against: the teacher."""
    steps = asked.beside["transfer"]
    teaching = _healing(loaded, asked, str(steps * asked.sizes.length * _ROWS) if steps else None, "relations")
    if teaching is None and healing is None:
        raise ValueError("--to distil: nothing would teach the student; give --transfer STEPS or --heal TOKENS")
    if teacher is None:
        return replace(method, teaching=teaching), loaded
    return replace(method, teaching=teaching, start=loaded.model), teacher


def _texts(loaded: Loaded, path: Path | None) -> tuple[Questions, Questions]:
    """Questions on what is measured, and on what may be learnt from."""
    if path is None:
        return Questions(loaded), Questions(loaded, text=library_text(), where="the library", seed=1)
    content = read_text(path, what="--text")
    cut = round(len(content) * (1 - _MEASURED))
    where = f"--text {path}"
    return Questions(loaded, text=content[cut:], where=where), Questions(
        loaded, text=content[:cut], where=where, seed=1
    )
