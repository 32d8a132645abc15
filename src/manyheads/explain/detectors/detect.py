"""`detect`: any detectors of any model in one call, as one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from manyheads.explain.detectors import patterns
from manyheads.explain.detectors.extreme import Dormant, ResidualPeak, ValueDrain
from manyheads.explain.detectors.importance import Importance, Loss
from manyheads.explain.detectors.maps import Maps
from manyheads.explain.detectors.massive import LAMBDA, Massive
from manyheads.explain.detectors.patterns import Distance, Entropy, Mass, SpectralGap, StableRank, Visual
from manyheads.explain.detectors.reading import Measure, read
from manyheads.explain.detectors.subject import Samples, Subject
from manyheads.explain.detectors.table import Detector, HeadTable
from manyheads.heads import Inputs, retrieval
from manyheads.hosts.loading import Loaded

_SHARE = 0.5
_MASSES = {
    "previous": patterns.previous,
    "next": patterns.following,
    "duplicate": patterns.duplicate,
    "echo": patterns.echo,
    "induction": patterns.induction,
    "sink": patterns.sink,
    "local": patterns.local,
}
_LISTED = (
    Detector("previous", "attention on the token before", "1906.04341", _SHARE),
    Detector("next", "attention on the token after (models that see ahead)", "1906.04341", _SHARE),
    Detector("duplicate", "attention on equal tokens of the text", "2211.00593", _SHARE),
    Detector("echo", "attention on earlier copies of the token", "2407.15891", _SHARE),
    Detector("induction", "attention on what followed earlier copies of the token", "2209.11895", _SHARE),
    Detector("retrieval", "looks at the needle's token that the model then says", "2404.15574", 0.1),
    Detector("sink", "attention on the first tokens (on special tokens, in encoders)", "2309.17453", _SHARE),
    Detector("local", "attention on the last tokens (on near ones, in encoders)", "2309.17453"),
    Detector("distance", "mean distance to what is attended to, in tokens or patches", "2010.11929"),
    Detector("entropy", "mean entropy of attention, in nats", "1906.04341"),
    Detector("rank", "stable rank of the attention matrix", "2003.00152"),
    Detector("spectral-gap", "one less the size of attention's second eigenvalue: 1 spreads at once", "2311.13541"),
    Detector("dormant", "attention on the first token", "2410.13835", _SHARE),
    Detector("switch", "greatest less smallest attention on the first token, over samples", "2410.13835", _SHARE),
    Detector("value-drain", "how much smaller the first token's value is: 1 is nothing left", "2410.13835", _SHARE),
    Detector("residual-peak", "how many times larger the first token's residual is", "2410.13835", 5.0),
    Detector("massive-query", "greatest channel of the queries to the mean", "2502.01563", LAMBDA),
    Detector("massive-key", "greatest channel of the keys to the mean", "2502.01563", LAMBDA),
    Detector("visual", "attention on the image's tokens", "2412.18108", _SHARE),
    Detector("visual-concentration", "how concentrated that attention is, 0 to 1", "2412.18108"),
    Detector("gate", "size of the loss' slope by a gate on the head", "1905.10650"),
    Detector("ablation", "growth of the loss with the head's output at zero", "1905.10650"),
    Detector("mean-ablation", "growth of the loss with the head's output at its mean", "2211.00593"),
    Detector("pruning", "when greedy pruning takes the head: 0 first, 1 last", "1905.10650"),
    Detector("maps-copy", "share of tokens that the head's parameters map to themselves", "2412.11965", 0.15),
)
DETECTORS = {detector.name: detector for detector in _LISTED}
# What one pass per sample tells, of any model.
QUICK = (
    "previous",
    "duplicate",
    "echo",
    "induction",
    "sink",
    "local",
    "distance",
    "entropy",
    "rank",
    "dormant",
    "switch",
)
_KINDS = {"echo": "repeats", "induction": "repeats"} | dict.fromkeys(
    ("dormant", "switch", "value-drain", "residual-peak"), "domains"
)
_HAYSTACK = 128
_IMPORTANCE = ("gate", "ablation", "mean-ablation", "pruning")


def detect(
    model: nn.Module | Loaded,
    names: Sequence[str] | None = None,
    inputs: Any = None,
    text: str | None = None,
    *,
    length: int = 256,
    count: int = 4,
    seed: int = 0,
    stack: str | None = None,
    loss: Loss | None = None,
    image_span: Sequence[int] | None = None,
) -> HeadTable:
    """Scores [layers, heads] of the named detectors (`DETECTORS`; `QUICK` without names).

    inputs: ids [b, n], pixels or a mapping of the model's inputs; text: a string. Without both, samples are synthetic,
    `count` of `length` tokens. loss: (output, inputs) -> number, for importance. stack: whose heads, where there are
    several. retrieval hides its own needles always. ValueError names a detector that makes no sense for the model.
    """
    subject = Subject(model, stack)
    wanted = _wanted(names, subject, inputs)
    samples = Samples(subject, inputs=inputs, text=text, length=length, count=count, seed=seed, image_span=image_span)
    found = _read(subject, samples, [name for name in wanted if name not in (*_IMPORTANCE, "retrieval", "maps-copy")])
    if "retrieval" in wanted:
        found["retrieval"] = _retrieval(subject, samples)
    if "maps-copy" in wanted:
        found["maps-copy"] = Maps.of(model, subject.stack).copying()
    if set(wanted) & set(_IMPORTANCE):
        found |= _importance(Importance(subject, samples.of("text"), loss), wanted)
    first = next(iter(found.values()))
    table = HeadTable(subject.name, subject.stack, *first.shape)
    for name in wanted:
        table.add(DETECTORS[name], found[name], _settings(name, samples, text, inputs))
    return table


def _wanted(names: Sequence[str] | None, subject: Subject, inputs: Any) -> list[str]:
    if names is None:
        tokenless = subject.pictures or (subject.bare and inputs is not None)
        return [name for name in QUICK if not (tokenless and name in ("duplicate", "echo", "induction"))]
    given = [names] if isinstance(names, str) else list(names)
    strange = [name for name in given if name not in DETECTORS]
    if strange or not given:
        raise ValueError(f"there is no detector {', '.join(strange) or 'given'}; there are {', '.join(DETECTORS)}")
    return list(dict.fromkeys(given))


def _read(subject: Subject, samples: Samples, names: Sequence[str]) -> dict[str, Tensor]:
    """One pass per sample for all detectors that read it."""
    plan: dict[Any, list[Measure]] = {}
    made: list[Measure] = []
    for kind in ("text", "repeats", "domains"):
        own = [name for name in names if _KINDS.get(name, "text") == kind]
        measures = _measures(own, subject)
        made += measures
        for sample in samples.of(kind) if measures else ():
            plan.setdefault(sample, []).extend(measures)
    read(subject, plan.items())
    return {name: values for measure in made for name, values in measure.scores().items()}


def _measures(names: Sequence[str], subject: Subject) -> list[Measure]:
    made: dict[str, Callable[[], Measure]] = {
        "distance": lambda: Distance(subject),
        "entropy": Entropy,
        "rank": StableRank,
        "spectral-gap": SpectralGap,
        "dormant": Dormant,
        "switch": Dormant,
        "value-drain": ValueDrain,
        "residual-peak": ResidualPeak,
        "massive-query": lambda: Massive("query"),
        "massive-key": lambda: Massive("key"),
        "visual": Visual,
        "visual-concentration": Visual,
    }
    rules = {name: _MASSES[name] for name in names if name in _MASSES}
    measures: list[Measure] = [Mass(rules)] if rules else []
    twins = {"switch": "dormant", "visual-concentration": "visual"}
    once = dict.fromkeys(twins.get(name, name) for name in names if name in made)
    return measures + [made[name]() for name in once]


def _retrieval(subject: Subject, samples: Samples) -> Tensor:
    if subject.loaded is None or not subject.generates:
        raise ValueError(
            f"retrieval: {subject.name} must write an answer: give a Loaded (load_model) of a causal language model"
        )
    scores, _ = retrieval(Inputs(subject.loaded, seed=samples.seed), lengths=(_haystack(samples),))
    return scores.mean(-1) if scores.shape[-1] else scores.sum(-1)


def _haystack(samples: Samples) -> int:
    """Tokens that a hidden key is told in: not fewer than it takes with its question."""
    return max(samples.length, _HAYSTACK)


def _importance(importance: Importance, names: Sequence[str]) -> dict[str, Tensor]:
    found = {}
    if "gate" in names:
        found["gate"] = importance.gradient()
    for name, instead in (("ablation", "zero"), ("mean-ablation", "mean")):
        if name in names:
            found[name] = importance.ablation(instead)  # type: ignore[arg-type]
    if "pruning" in names:
        heads = max(len(own) for own in importance.means())
        found["pruning"] = importance.prune(at_once=0.1 if importance.subject.layers * heads > 64 else 0.0).ranks(
            importance.subject.layers, heads
        )
    return found


def _settings(name: str, samples: Samples, text: str | None, inputs: Any) -> dict[str, Any]:
    if name == "maps-copy":
        return {"on": "parameters"}
    if name == "retrieval":
        return {"on": "needles", "length": _haystack(samples), "seed": samples.seed}
    if inputs is not None:
        return {"on": "inputs", "rows": len(samples.own)}
    own = "text" if text is not None else f"synthetic {_KINDS.get(name, 'text')}"
    return {"on": own, "length": samples.length, "count": samples.count, "seed": samples.seed}


def detector_notes() -> dict[str, str]:
    """name -> what a score means, with its source: the notes of a table's columns."""
    return {name: f"{own.what} (arXiv {own.source})" if own.source else own.what for name, own in DETECTORS.items()}
