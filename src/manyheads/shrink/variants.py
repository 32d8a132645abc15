"""Policies by name, with a budget each, as the command line writes them: 'snapkv[window_size=16]'.

The names are those of the exported policies in small letters, or any start of one that fits no other: 'streaming'.
Fields that a head profile can fill (gates, echo, induction, spans) are filled from one.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from manyheads import shrink
from manyheads.hosts.loading import BUNDLED, Loaded
from manyheads.runs.names import parse_name
from manyheads.shrink import policies
from manyheads.shrink.policy import Policy
from manyheads.shrink.template import ChatTemplate

BUDGETS = ("compression_ratio", "budget_tokens", "budget_bytes")
# Shares of the tokens that are kept, for curves.
SWEEP = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
# Names for curves: those that need no head profile, and those that do.
SWEPT = ("streaming", "snapkv", "h2o", "tova", "keynorm", "expected")
SWEPT_WITH_PROFILE = ("duo", "razor")
Budget = tuple[str, int | float]


@dataclass(frozen=True)
class Variant:
    """One policy with one budget. arguments: of its constructor, budget included, as a person would write them;
    filled: those that a head profile gives. protect: a chat template that it never drops."""

    name: str
    cls: type[Policy]
    arguments: Mapping[str, Any]
    budget: Budget | None
    filled: Mapping[str, Any] = field(default_factory=dict)
    # The budget went into what was filled.
    planned: bool = False
    protect: ChatTemplate | None = None

    @property
    def title(self) -> str:
        kept = [] if self.protect is None else ["template kept"]
        return ", ".join([self.name, *([budget_text(self.budget)] if self.budget else []), *kept])

    def build(self) -> Policy:
        given = {key: _resolved(value) for key, value in self.arguments.items()}
        budget = dict([self.budget]) if self.budget and not self.planned else {}
        kept = {} if self.protect is None else {"protect": self.protect}
        return self.cls(**{**self.filled, **given, **budget, **kept})

    def settings(self) -> dict[str, Any]:
        """Everything that the outcome depends on; an edited policy file gives new figures."""
        try:
            source = Path(inspect.getfile(self.cls)).read_bytes()
        except (OSError, TypeError):
            source = b""
        return {
            "policy": self.cls.__name__,
            "arguments": dict(self.arguments),
            "filled": dict(self.filled),
            "budget": list(self.budget or ()),
            "source": hashlib.sha256(source).hexdigest()[:16],
            **({} if self.protect is None else {"protect": self.protect.settings}),
        }

    def protecting(self, template: ChatTemplate) -> Variant:
        """The same with a chat template that is never dropped; itself where nothing is ever dropped."""
        return self if self.build().is_full else replace(self, protect=template)


def budget_text(budget: Budget) -> str:
    key, value = budget
    if key == "budget_tokens":
        return f"{value:,} tokens"
    if key == "budget_bytes":
        return f"{value:,} bytes"
    # Not "dropped": what a ratio counts is the policy's to say.
    return f"ratio {value:.4g}"


def known_policies() -> dict[str, type[Policy]]:
    """Exported policies by their names in small letters."""
    found = [getattr(policies, name) for name in policies.__all__]
    # What is made of other policies is written in Python.
    made = [cls for cls in found if isinstance(cls, type) and issubclass(cls, Policy) and "parts" not in vars(cls)]
    return {cls.__name__.lower(): cls for cls in made}


def find_policy(name: str) -> type[Policy]:
    known = known_policies()
    wanted = name.lower().replace("-", "").replace("_", "")
    fits = [wanted] if wanted in known else [key for key in known if wanted and key.startswith(wanted)]
    if len(fits) != 1:
        raise ValueError(f"no policy is called {name!r}; want one of {', '.join(sorted(known))}, or the start of one")
    return known[fits[0]]


def read_variants(texts: Sequence[str], budgets: Sequence[Budget], profile: Profiles) -> list[Variant]:
    """Every policy with every budget; where the text itself gives one, with that; full is full."""
    found: dict[str, Variant] = {}
    for text in texts:
        entry = parse_name(text)
        name, given = (entry, {}) if isinstance(entry, str) else (entry["name"], entry)
        arguments = {key: value for key, value in given.items() if key != "name"}
        cls = find_policy(name)
        own = [(key, arguments.pop(key)) for key in BUDGETS if key in arguments]
        _check_arguments(cls, arguments)
        if len(own) > 1:
            raise ValueError(f"{text}: one budget, please; got {', '.join(key for key, _ in own)}")
        wanted: list[Budget | None] = [*own] if own else [*budgets]
        if not wanted or (cls is policies.Full and not own):
            wanted = [None]
        for budget in wanted:
            variant = profile.filled(Variant(name + _inner(arguments), cls, arguments, budget))
            _ = variant.build()  # a wrong argument is said before anything runs
            found.setdefault(variant.title, variant)
    return list(found.values())


def _inner(arguments: Mapping[str, Any]) -> str:
    return f"[{','.join(f'{key}={value}' for key, value in arguments.items())}]" if arguments else ""


def _check_arguments(cls: Any, arguments: Mapping[str, Any]) -> None:
    known = [own.name for own in fields(cls) if own.init]
    unknown = [key for key in arguments if key not in known]
    if unknown:
        raise ValueError(f"{cls.__name__} has no argument {', '.join(unknown)}; it has {', '.join(known)}")


def _resolved(value: Any) -> Any:
    """What can only be written as a name, allocation=adakv, storage=quantised(bits=8) or base=snapkv, as the object of
    that name."""
    written = re.fullmatch(r"(\w+)(?:\((.*)\))?", value) if isinstance(value, str) else None
    named = {key.lower(): getattr(shrink, key) for key in shrink.__all__}
    found = named.get(written[1].lower()) if written else None
    if written is None or not isinstance(found, type):
        return value
    entry = parse_name(f"{written[1]}[{written[2] or ''}]")
    arguments = {key: own for key, own in entry.items() if key != "name"}
    _check_arguments(found, arguments)
    return found(**arguments)


# -- head profiles -----------------------------------------------------------------------------------------------------


class Profiles:
    """What is known of the model's heads: `manyheads heads MODEL --out FOLDER` writes it; the packaged model has one.

    A folder with no more than DuoAttention's full_attention_heads.tsv will do for gates."""

    def __init__(self, loaded: Loaded, folder: Path | None) -> None:
        self.loaded, self.folder = loaded, folder
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--heads {folder} is no folder; `{self._how(folder)}` makes one")
        own = BUNDLED / "heads"
        if folder is None and own.is_dir() and loaded.name == BUNDLED.name:
            self.folder = own
        # By the names that policies give them: tables, and the settings that each was measured with.
        self.tables: dict[str, Any] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        if self.folder is not None:
            self._read(self.folder)

    def offers(self, cls: type[Policy]) -> bool:
        """Whether the policy needs nothing that is not there."""
        return all(name in self.tables for name in _asked(cls) if name != "rules")

    def filled(self, variant: Variant) -> Variant:
        """With those fields that a profile can give and the text did not."""
        asked, given = _asked(variant.cls), variant.arguments
        if not asked or any(name in given for name in (*asked, "retrieval", "rule")):
            return variant
        if "rules" in asked:
            return self._planned(variant)
        missing = [name for name in asked if name not in self.tables]
        if missing:
            raise ValueError(
                f"{variant.name} needs a profile of the model's heads ({', '.join(missing)}): run "
                f"`{self._how(self.folder)}` and give that folder as --heads"
            )
        found = {name: self.tables[name] for name in asked}
        if "gates" in found:
            # Gates were learned for heads that see so much.
            found |= {key: own for key, own in self.settings["gates"].items() if key in ("sink_size", "recent_size")}
        return replace(variant, filled=found)

    def _planned(self, variant: Variant) -> Variant:
        """Spans of least influence within the share that the budget keeps: they are the budget themselves."""
        from manyheads.shrink.policies import plan_spans

        if "influence" not in self.tables:
            raise ValueError(
                f"{variant.name} needs the influence of the model's heads: run `{self._how(self.folder)}` and give "
                f"that folder as --heads, or write a rule: '{variant.name}[rule=[64,0.25]]'"
            )
        if variant.budget is None or variant.budget[0] != "compression_ratio":
            raise ValueError(f"{variant.name} plans its spans for a share of the cache: give --compression-ratio")
        settings, config = self.settings["influence"], self.loaded.config
        sinks = int(variant.arguments.get("sink_size", settings["sink_size"]))
        rules = plan_spans(
            # Measured as [spans, lengths, layers, heads]; the plan's order is layers, heads, spans, lengths.
            torch.tensor(self.tables["influence"], dtype=torch.float64).permute(2, 3, 0, 1).tolist(),
            [(float(span["alpha"]), float(span["beta"])) for span in settings["spans"]],
            settings["lengths"],
            1 - float(variant.budget[1]),
            sink_size=sinks,
            kv_heads=_kv_heads(config),
        )
        return replace(variant, filled={"rules": rules, "sink_size": sinks}, planned=True)

    def _how(self, folder: Path | None) -> str:
        name = "" if self.loaded.name == BUNDLED.name else f" {self.loaded.name}"
        return f"manyheads heads{name} --out {folder or 'FOLDER'}"

    def _read(self, folder: Path) -> None:
        from manyheads.heads.formats import CONFIG, GATES, read_duo
        from manyheads.heads.profile import JSON, SAFETENSORS, Profile

        if any((folder / name).is_file() for name in (SAFETENSORS, JSON)):
            profile = Profile.load(folder, self.loaded.model)
            self.tables = {name: values.tolist() for name, values in profile.scores.items()}
            self.settings = dict(profile.settings)
        duo = next((place for place in (folder, folder / "duo") if (place / GATES).is_file()), None)
        if "gates" not in self.tables and duo is not None:
            self.settings["gates"] = {}
            if (duo / CONFIG).is_file():
                pattern = read_duo(duo)
                self.tables["gates"] = pattern.gates.tolist()
                self.settings["gates"] = {"sink_size": pattern.sink_size, "recent_size": pattern.recent_size}
            else:
                self.tables["gates"] = policies.Duo.read_gates(duo / GATES)
            self._check_gates(folder)
        if not self.tables:
            raise ValueError(f"--heads {folder} holds no head profile; `{self._how(folder)}` writes one")

    def _check_gates(self, folder: Path) -> None:
        gates, config = self.tables["gates"], self.loaded.config
        if (len(gates), len(gates[0])) != (config.num_hidden_layers, _kv_heads(config)):
            raise ValueError(
                f"--heads {folder} is a head profile of another model: gates for {len(gates)} layers of "
                f"{len(gates[0])} KV heads, and {self.loaded.name} has {config.num_hidden_layers} of "
                f"{_kv_heads(config)}; measure this one with `{self._how(None)}`"
            )


def _asked(cls: type[Policy]) -> list[str]:
    """Fields that come from a profile."""
    return [own.name for own in fields(cls) if own.name in ("gates", "echo", "induction", "rules")]


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
