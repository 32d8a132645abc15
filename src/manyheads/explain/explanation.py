"""An explanation of one input: what the model says, where its heads look, which tokens count, as views and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manyheads.explain.encoded import encoded
from manyheads.explain.image_file import pictured
from manyheads.explain.sizes import choose, read, that_fit
from manyheads.hosts.loading import Loaded
from manyheads.hosts.patches import Patches, find_patches
from manyheads.hosts.sites import text_stack

if TYPE_CHECKING:
    from manyheads.explain.views import View

# Called with what is done and what share of the whole that is.
Progress = Callable[[str, float], None]
# Measuring faithfulness runs the model once per token.
FAITHFUL_TOKENS = 256
# Queries, keys and a plane of them are shown for inputs up to so many tokens.
VECTOR_TOKENS = 512
TARGETED = ("logit-flow", "relevance", "attention-gradient", "input-gradient")
UNTARGETED = ("raw-attention", "rollout", "value-norm")


@dataclass
class Explanation:
    """report: plain numbers, fit for JSON. views: what a page shows. note: the page's first lines."""

    title: str
    note: str
    report: dict[str, Any]
    views: list[View] = field(repr=False)

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Writes explain.html and explain.json, each whole or not at all."""
        from manyheads.explain.views import write_page
        from manyheads.runs.files import write_atomically

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        page = write_page(folder / "explain.html", self.views, title=self.title, note=self.note)
        data = folder / "explain.json"
        write_atomically(data, json.dumps(self.report, indent=1, ensure_ascii=False).encode())
        return page, data


def speaks(model: Any) -> bool:
    """Whether the model is a causal language model, which answers at its last token."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def explain_text(
    loaded: Loaded,
    text: str,
    *,
    methods: Sequence[str] | None = None,
    target: str | None = None,
    layers: Sequence[int] | None = None,
    heads: bool = True,
    page_mb: float = 48,
    progress: Progress = lambda what, share: None,
    thorough: bool = False,
) -> Explanation:
    """methods: names out of attributions.METHODS; None: some that the model can have. target: for a language model a
    text whose first token is explained, for a classifier the number of a class; None: what the model itself says.
    heads: score all heads by the detectors. thorough: with all samples and steps, however slow the model. ValueError
    for an empty text, one that is too long, an unknown target."""
    model = loaded.model
    inputs, tokens = encoded(loaded, text)
    progress(f"reading {len(tokens)} tokens", 0.0)
    output, took = read(model, inputs)
    answer = _answer(loaded, output)
    chosen = _target(loaded, target, answer)
    names = list(_known(methods or method_names(loaded, chosen is not None)))
    faithful, heads = chosen is not None and len(tokens) <= FAITHFUL_TOKENS, heads and speaks(model)
    sizes = choose(
        took, len(tokens), len(names), thorough=thorough, faithful=faithful, detectors=heads, causal=speaks(model)
    )
    if sizes.note:
        progress(sizes.note, 0.0)
    progress("attention of every head", 0.0)
    views, report = _attention_views(loaded, inputs, tokens, layers, page_mb)
    report = {"model": _identity(loaded), "text": text, "tokens": tokens, "answer": answer, "target": chosen, **report}
    if sizes.note:
        report["sizes"] = sizes.note
    progress("attributions", sizes.share(1))
    shown, report["attributions"] = _attributions(
        loaded, inputs, tokens, chosen, names, sizes.steps * faithful, sizes.ranked
    )
    views[:0] = shown
    if heads:
        progress("head detectors", sizes.share(2))
        table, report["heads"] = _detected(loaded, *sizes.samples)
        views.append(table)
    progress("done", 1.0)
    note = _note(loaded, tokens, answer, chosen) + (f" {sizes.note.capitalize()}." if sizes.note else "")
    return Explanation(f"{loaded.name}: what its heads do", note, report, views)


def explain_image(
    loaded: Loaded,
    path: str | Path,
    *,
    methods: Sequence[str] | None = None,
    target: str | None = None,
    layers: Sequence[int] | None = None,
    stage: int | None = None,
    page_mb: float = 48,
    progress: Progress = lambda what, share: None,
) -> Explanation:
    """The same of a picture, for a vision model with patches: maps over the image instead of coloured tokens. Of one
    that attends nowhere (ResNet, ConvNeXt), or whose layers see one grid, only maps. stage: Grad-CAM on this stage, and
    only that; of a model whose patches stand in one grid, on this layer."""
    from manyheads.explain.hierarchies import is_hierarchy, views_of
    from manyheads.explain.pictures import attends, maps_over, on_grids
    from manyheads.explain.views import Panel, read_store, view_heads, view_image, view_maps
    from manyheads.explain.views import view_model as picture_of_all

    image, inputs = pictured(loaded, path)
    with torch.no_grad():
        output = loaded.model(**inputs)
    answer = _answer(loaded, output)
    chosen = _target(loaded, target, answer)
    best = f"; the model's answer: {answer[0]['name']} ({worth(answer[0])})" if answer else ""
    report = {"model": _identity(loaded), "image": Path(path).name, "answer": answer, "target": chosen}
    if stage is not None or on_grids(loaded.model) or not attends(loaded.model):
        if layers is not None:
            why = "attends nowhere, or on grids only" if stage is None else "is explained by one --stage"
            raise ValueError(f"{loaded.name} {why}: it has no --layers to choose from")
        over = maps_over(loaded.model, inputs, chosen, methods, stage)
        found = {name: own.float().numpy() for name, own in over.items()}
        report |= {} if stage is None else {"stage": stage}
        report["maps"] = _maps_in_digits(found)
        progress("done", 1.0)
        note = f"{image.width} x {image.height} pixels{best}."
        return Explanation(
            f"{loaded.name}: what its maps see", note, report, [view_image(image, found, title="Pixels")]
        )
    progress("attention of every head", 0.2)
    if is_hierarchy(loaded.model):
        views, report["stages"], maps = views_of(loaded.model, inputs, image, methods, layers, page_mb, chosen)
        report["maps"] = _maps_in_digits(maps)
        progress("done", 1.0)
        note = f"{image.width} x {image.height} pixels, as the model gets them{best}."
        return Explanation(f"{loaded.name}: what its heads see", note, report, views)
    store = read_store(loaded.model, inputs, layers=layers, budget_mb=page_mb, kind="self")
    patches = find_patches(loaded.model, inputs["pixel_values"])
    tokens = _patches(patches)
    panel = Panel(store, tokens)
    progress("attributions", 0.5)
    values = _image_values(loaded, inputs, chosen, methods)
    grids = {name: patches.grid(own).float().numpy() for name, own in values.items()}
    views = [
        view_image(image, grids, title="Which patches count"),
        view_heads(panel),
        picture_of_all(panel),
        view_maps(store),
    ]
    report["maps"] = _maps_in_digits(grids)
    progress("done", 1.0)
    return Explanation(f"{loaded.name}: what its heads see", f"{store.n} tokens{best}.", report, views)


def _maps_in_digits(maps: Any) -> dict[str, list[list[float]]]:
    return {name: [[round(float(v), 6) for v in row] for row in own] for name, own in maps.items()}


def _patches(patches: Patches) -> list[str]:
    """Names of the tokens: row.column of the patches, and the numbers of those that are none."""
    before = ["[CLS]"] if patches.first == 1 else [f"[{i}]" for i in range(patches.first)]
    grid = [f"{row}.{column}" for row in range(patches.rows) for column in range(patches.columns)]
    return [*before, *grid, *(f"[{i}]" for i in range(patches.stop, patches.tokens))]


def _image_values(
    loaded: Loaded, inputs: dict[str, Tensor], target: int | None, methods: Sequence[str] | None
) -> dict[str, Tensor]:
    from manyheads.explain.attributions import METHODS

    names = methods or ((*UNTARGETED, "relevance", "grad-cam") if target is not None else UNTARGETED)
    values = {}
    for name in _known(names):
        method = METHODS[name](loaded.model, None)
        values[name] = _of_text(method.attribute(inputs, target if method.of_target else None))
    return values


def method_names(loaded: Loaded, targeted: bool) -> tuple[str, ...]:
    """Methods that the model can have: of some manyheads mechanisms there are weights, and nothing from inside; a
    logit is a sum over heads where one stack writes on."""
    from manyheads.hosts.inside import adds_values, is_open
    from manyheads.hosts.taps import sites

    own = sites(loaded.model)
    refused = set() if all(map(adds_values, own)) else {"logit-flow", "value-norm"}
    refused |= set() if all(map(is_open, own)) else {"relevance", "attention-gradient"}
    refused |= set() if speaks(loaded.model) else {"logit-flow"}
    names = (*TARGETED, *UNTARGETED) if targeted else UNTARGETED
    return tuple(name for name in names if name not in refused)


def _known(names: Sequence[str]) -> Sequence[str]:
    from manyheads.explain.attributions import METHODS

    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"--method {unknown[0]!r} is none of {', '.join(METHODS)}")
    return names


def _identity(loaded: Loaded) -> dict[str, Any]:
    config = loaded.config
    keys = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    known = {key: getattr(config, key, None) for key in keys}
    return {"name": loaded.name, **{key: value for key, value in known.items() if value is not None}}


def _answer(loaded: Loaded, output: Any) -> list[dict[str, Any]]:
    """The five likeliest next tokens or classes, or a regression's values; nothing for a model that only encodes."""
    from manyheads.explain.attributions.feed import said_of

    logits, speaking = getattr(output, "logits", None), bool(loaded.model.can_generate())
    # Logits of every token, or of every place of a picture, of a model that does not go on writing, are no one answer.
    if logits is None or not (logits.dim() == 2 or (logits.dim() == 3 and speaking)):
        return []
    last = logits[0, -1] if logits.dim() == 3 else logits[0]
    if not bool(torch.isfinite(last).all()):
        raise ValueError(f"{loaded.name} gives NaN or infinite logits for this input: its weights are damaged")
    top = said_of(loaded.model, last.float()).topk(min(5, last.numel()))
    what = "value" if getattr(loaded.model.config, "problem_type", None) == "regression" else "probability"
    names = getattr(loaded.model.config, "id2label", None) or {}
    found = []
    for share, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        name = loaded.tokens([index])[0] if speaking else str(names.get(index, index))
        found.append({"id": index, "name": name, what: round(share, 6)})
    return found


def worth(answer: dict[str, Any]) -> str:
    """How likely an answer is, or a regression's value."""
    return f"{answer['probability']:.1%}" if "probability" in answer else f"{answer['value']:.4g}"


def _target(loaded: Loaded, target: str | None, answer: list[dict[str, Any]]) -> int | None:
    if not answer:
        if target is not None:
            raise ValueError(f"{loaded.name} gives no logits, so there is no target to explain: leave --target out")
        return None
    if target is None:
        return int(answer[0]["id"])
    if loaded.model.can_generate():
        ids = loaded.encode(target)
        if not ids:
            raise ValueError("--target is empty: give the token that is to be explained")
        return ids[0]
    classes = int(loaded.model.config.num_labels)
    if not target.isdigit() or int(target) >= classes:
        raise ValueError(f"--target {target!r}: {loaded.name} has classes 0 to {classes - 1}")
    return int(target)


def _attention_views(
    loaded: Loaded, inputs: dict[str, Tensor], tokens: list[str], layers: Sequence[int] | None, page_mb: float
) -> tuple[list[View], dict[str, Any]]:
    from manyheads.explain.views import (
        Panel,
        read_store,
        view_embedding,
        view_flow,
        view_heads,
        view_maps,
        view_neurons,
    )
    from manyheads.explain.views import view_model as picture_of_all
    from manyheads.hosts.taps import AttentionCall, record

    stack = "encoder" if loaded.model.config.is_encoder_decoder else text_stack(loaded.model)
    where: dict[str, Any] = {"stack": stack, "kind": "self"}
    short = len(tokens) <= VECTOR_TOKENS
    recording: AbstractContextManager[Any] = record(loaded.model, layers=layers, **where) if short else nullcontext([])
    with recording as calls:
        store = read_store(loaded.model, inputs, layers=layers, budget_mb=page_mb * 0.6, **where)
    panel = Panel(store, tokens)
    # Taking the heads' mean of a store opens every matrix in it again: for long texts another run is cheaper.
    mean = store if short else read_store(loaded.model, inputs, layers=layers, budget_mb=8, mean=True, **where)
    views = [view_heads(panel), picture_of_all(panel), view_flow(mean, tokens), view_maps(store)]
    alike = len({getattr(getattr(call, "query", None), "shape", None) for call in calls}) == 1
    if short and alike:
        # Some mechanisms tell nothing from inside, and some score by more than queries and keys.
        if all(isinstance(call, AttentionCall) for call in calls):
            views.append(view_embedding(calls, tokens))
        if all(isinstance(call, AttentionCall) and call.shares for call in calls):
            views.insert(-1, view_neurons(that_fit(calls, page_mb), tokens, budget_mb=page_mb))
    report = {
        "layers": list(store.layers),
        "entropy": _rows(store.entropy),
        "distance": None if store.distance is None else _rows(store.distance),
        "kept": _rows(store.share),
    }
    return views, report


def _rows(grid: Any) -> list[list[float]]:
    return [[round(float(value), 4) for value in row] for row in grid]


def _attributions(
    loaded: Loaded,
    inputs: dict[str, Tensor],
    tokens: list[str],
    target: int | None,
    names: list[str],
    steps: int,
    ranked: int | None,
) -> tuple[list[View], dict[str, Any]]:
    """Values for every token, and how faithful each method is, in so many steps (0: that is not measured), with ranks
    over so many tokens."""
    from manyheads.explain.attributions import METHODS, compare_attributions
    from manyheads.explain.views import view_text

    found: dict[str, Any] = {}
    if target is not None and steps:
        compared = compare_attributions(loaded.model, inputs, target, names, steps=steps, sample=ranked)
        values = {name: own[0] for name, own in compared.attributions.items()}
        rows = {row.method: row for row in compared.rows}
        found["faithfulness"] = compared.to_dict()["rows"]
        labels = {name: f"{name} (deletion {rows[name].deletion:.2f})" for name in values}
    else:
        made = {name: METHODS[name](loaded.model, None) for name in names}
        asked = {name: target if own.of_target else None for name, own in made.items()}
        values = {name: _of_text(own.attribute(inputs, asked[name])) for name, own in made.items()}
        labels = {name: name for name in values}
    found["values"] = {name: [round(float(value), 6) for value in own] for name, own in values.items()}
    shown = {labels[name]: own.float().cpu().numpy() for name, own in values.items()}
    return [view_text(tokens, shown, title="Which tokens count")], found


def _of_text(found: Any) -> Tensor:
    """[n]: the one row; of several streams the encoder's."""
    if isinstance(found, dict):
        found = found.get("encoder", next(iter(found.values())))
    own: Tensor = found[0]
    return own


def _detected(loaded: Loaded, length: int, count: int) -> tuple[View, dict[str, Any]]:
    from manyheads.explain.detectors import detect, detector_notes
    from manyheads.explain.views import view_table

    table = detect(loaded, length=length, count=count)
    scores = {name: own.numpy() for name, own in table.scores.items()}
    return view_table(scores, notes=detector_notes(), title="Heads by what they do"), table.to_dict()


def _note(loaded: Loaded, tokens: list[str], answer: list[dict[str, Any]], target: int | None) -> str:
    if not answer:
        return f"{len(tokens)} tokens; {loaded.name} only encodes: attributions follow its attention, not an answer."
    best = answer[0]
    said = f"{len(tokens)} tokens; the model's answer: {best['name']!r} ({worth(best)})."
    if target == best["id"]:
        return said
    name = loaded.tokens([target])[0] if loaded.model.can_generate() and target is not None else str(target)
    return f"{said} Explained: {name!r}."
