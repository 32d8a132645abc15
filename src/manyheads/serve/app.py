"""The routes of the app. Every one of them stands behind the guard."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import Request

from manyheads.explain.attributions import METHODS
from manyheads.explain.encoded import encoded
from manyheads.explain.explanation import UNTARGETED, _answer, explain_text, method_names
from manyheads.explain.views.figures import view_text
from manyheads.explain.views.page import page, safe_json, script, style
from manyheads.hosts.inside import is_open
from manyheads.hosts.loading import Loaded, reads_text
from manyheads.hosts.sites import choose, text_stack

from .change import KINDS, MEASURES, Change, intervene
from .guard import LOOPBACK, Guard, Session
from .jobs import Full, Job, Jobs, Tell, Work, said
from .places import Places
from .reports import list_reports, open_report
from .steering import MOST_IMAGE, MOST_NEW, MOST_STEPS, kind_or_none, steer_facts, steer_run

PAGE_MB = 16
MOST_TEXT = 200_000
# A page of ours or a report runs its own scripts in a corner of its own: no cookie, no network, no way to the app.
FRAMED = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'{more}; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
)


def _worded(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: type some words")
    return text


def _among(names: Iterable[str]) -> Callable[[str], str]:
    choice = tuple(names)

    def check(name: str) -> str:
        if name not in choice:
            raise ValueError(f"want one of {', '.join(choice)}")
        return name

    return check


Method = Annotated[str, AfterValidator(_among(METHODS))]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Text(Strict):
    text: Annotated[str, Field(min_length=1, max_length=MOST_TEXT), AfterValidator(_worded)]


class ExplainRequest(Text):
    target: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    methods: Annotated[list[Method], Field(min_length=1, max_length=32)] | None = None
    layers: Annotated[list[Annotated[int, Field(ge=0, lt=4096)]], Field(min_length=1, max_length=1024)] | None = None
    heads: bool = True


Place = Annotated[list[Annotated[int, Field(ge=0, lt=2**20)]], Field(min_length=2, max_length=2)]


class ChangeRequest(Text):
    kind: Annotated[str, AfterValidator(_among(KINDS))]
    factor: Annotated[float, Field(ge=-1000, le=1000, strict=False)]
    span: Place | None = None
    heads: Annotated[list[Place], Field(max_length=4096)] | None = None
    target: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    measure: Annotated[str, AfterValidator(_among(MEASURES))] = "leave-one-out"

    def change(self) -> Change:
        heads = [(layer, head) for layer, head in self.heads or []]
        return Change(self.kind, self.factor, (self.span[0], self.span[1]) if self.span else None, heads or None)


Argument = Annotated[str, Field(max_length=2_000)]
Mark = Annotated[str, Field(min_length=1, max_length=2_000)]


class SteerRequest(Text):
    name: Annotated[str, Field(min_length=1, max_length=100)]
    arguments: Annotated[dict[Annotated[str, Field(max_length=100)], Argument], Field(max_length=16)]
    marks: Annotated[list[Mark], Field(max_length=16)] = []
    image: Annotated[str, Field(max_length=4 * MOST_IMAGE // 3 + 4)] | None = None
    new: Annotated[int, Field(ge=1, le=MOST_NEW)] = 16
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 20
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


def create_app(
    loaded: Loaded,
    session: Session,
    jobs: Jobs,
    *,
    reports: Path | None = None,
    names: Iterable[str] = LOOPBACK,
    any_address: bool = False,
    places: Places | None = None,
) -> Guard:
    """places: the connections of the server that runs it. ValueError for a model that reads no text, has no attention,
    or gives NaN."""
    if Path(loaded.name).exists():
        loaded = replace(loaded, name=Path(loaded.name).resolve().name)  # where it lies is nobody's business
    facts = {**_facts(loaded), "reports": reports is not None}
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _pages(app, facts)
    _model_routes(app, loaded, jobs, facts)
    _steer_route(app, loaded, jobs)
    _job_routes(app, jobs)
    _report_routes(app, reports)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(AnyHTTPException, _refused)
    app.add_exception_handler(Exception, _failed)
    return Guard(app, session, names, any_address, **({"admitted": places.admit} if places else {}))


def _facts(loaded: Loaded) -> dict[str, Any]:
    """What the app shows of the model; found by one short run, so that a model that cannot be shown is told at once."""
    model = loaded.model
    if kind_or_none(model) == "diffusion":
        return _drawing_facts(loaded)
    if loaded.model.config.is_encoder_decoder:
        raise ValueError(f"{loaded.name} has an encoder and a decoder; serve shows models with one of them")
    own = choose(model, None, text_stack(model), "self")
    heads: Any = getattr(loaded.config, "num_attention_heads", None) or own[0].module.heads
    if not reads_text(model):
        raise ValueError(f"{loaded.name} reads no text: give a language model, or use `manyheads explain --image`")
    inputs, _ = encoded(loaded, "a")
    with torch.no_grad():
        answers = bool(_answer(loaded, model(**inputs)))
    # Some mechanisms tell what they do inside, and let it be changed.
    open_inside, default = answers and all(map(is_open, own)), method_names(loaded, answers)
    return {
        "name": loaded.name,
        "layers": 1 + max(site.layer for site in own),
        "heads": int(heads),
        "positions": getattr(loaded.config, "max_position_embeddings", None),
        "methods": [{"name": name, "chosen": name in default} for name in METHODS if answers or name in UNTARGETED],
        "measures": list(MEASURES),
        "answers": answers,
        "kinds": [kind.told() for kind in KINDS.values()] if open_inside else [],
        "steer": steer_facts(loaded) if open_inside else None,
        "begin": "" if kind_or_none(model) == "vision-language" else BEGIN,
    }


BEGIN = "import os\nThe pass key is 40718. Remember it.\nx = 1\nWhat is the pass key? The pass key is "


def _drawing_facts(loaded: Loaded) -> dict[str, Any]:
    """Of a model that draws: its words are read by `explain`, here it is steered."""
    own = choose(loaded.model, kind="self")
    words = loaded.model.config.words
    return {
        "name": loaded.name,
        "layers": len(own),
        "heads": int(loaded.model.config.num_attention_heads),
        "positions": loaded.model.config.max_words,
        "methods": [],
        "measures": [],
        "answers": False,
        "kinds": [],
        "steer": steer_facts(loaded),
        "begin": "",
        "words": words[1:],
    }


def _pages(app: FastAPI, facts: dict[str, Any]) -> None:
    """The app's one page, with its style and script in it and a policy that knows them by their hashes."""
    static = files("manyheads.serve") / "static"
    look = style() + static.joinpath("app.css").read_text(encoding="utf-8")
    run = script(()) + "\n" + static.joinpath("app.js").read_text(encoding="utf-8")
    shell = static.joinpath("app.html").read_text(encoding="utf-8")
    parts = {"title": html.escape(facts["name"]), "facts": safe_json(facts), "style": look, "script": run}
    for name, part in parts.items():
        shell = shell.replace(f"<!--{name}-->", part)
    policy = (
        f"default-src 'none'; script-src '{_hash(run)}'; style-src '{_hash(look)}'; connect-src 'self'; img-src data:; "
        "frame-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )

    @app.get("/")
    async def home() -> HTMLResponse:
        return HTMLResponse(shell, headers={"content-security-policy": policy})


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _started(jobs: Jobs, work: Work) -> JSONResponse:
    try:
        job = jobs.submit(work)
    except Full:
        raise HTTPException(503, "too much is waiting for the model already; try again soon") from None
    return JSONResponse(job.told(), 202)


def _steer_route(app: FastAPI, loaded: Loaded, jobs: Jobs) -> None:
    @app.post("/api/steer")
    async def steer(given: SteerRequest) -> JSONResponse:
        def work(tell: Tell) -> tuple[dict[str, Any], None]:
            asked = given.model_dump()
            name, arguments, text = (asked.pop(key) for key in ("name", "arguments", "text"))
            return steer_run(loaded, name, arguments, text, tell=tell, **asked), None

        return _started(jobs, work)


def _model_routes(app: FastAPI, loaded: Loaded, jobs: Jobs, facts: dict[str, Any]) -> None:
    # Tokenizers cannot be used by two threads at once: the model's thread has the other one.
    apart, lock = replace(loaded, tokenizer=copy.deepcopy(loaded.tokenizer)), threading.Lock()

    def start(work: Work) -> JSONResponse:
        return _started(jobs, work)

    @app.get("/api/model")
    async def model() -> dict[str, Any]:
        return facts

    @app.post("/api/tokens")
    def tokens(given: Text) -> dict[str, Any]:
        with lock:
            try:
                if "words" in facts:
                    ids, _ = loaded.model.encode([given.text])
                    return {"tokens": [loaded.model.config.words[i] for i in ids[0].tolist()]}
                return {"tokens": encoded(apart, given.text)[1]}
            except ValueError as error:
                raise HTTPException(422, said(error)) from None

    @app.post("/api/explain")
    async def explain(given: ExplainRequest) -> JSONResponse:
        def work(tell: Tell) -> tuple[dict[str, Any], str]:
            found = explain_text(loaded, page_mb=PAGE_MB, progress=tell, **given.model_dump())
            return {"note": found.note}, page(found.views, title=found.title, note=found.note)

        return start(work)

    @app.post("/api/intervene")
    async def change(given: ChangeRequest) -> JSONResponse:
        def work(tell: Tell) -> tuple[dict[str, Any], str]:
            told, values = intervene(
                loaded, given.text, given.change(), target=given.target, measure=given.measure, progress=tell
            )
            shown = {name: own.float().cpu().numpy() for name, own in values.items()}
            _, words = encoded(loaded, given.text)
            title = f"Which tokens count for {told['target']!r}: {given.measure}"
            return told, page([view_text(words, shown)], title=title)

        return start(work)


def _job_routes(app: FastAPI, jobs: Jobs) -> None:
    def wanted(name: str) -> Job:
        job = jobs.get(name)
        if job is None:
            raise HTTPException(404, "there is no such job; only the last ones are kept")
        return job

    @app.get("/api/jobs/{name}")
    async def state(name: str) -> dict[str, Any]:
        job = wanted(name)
        return {**job.told(), "ahead": jobs.ahead(job)}

    @app.post("/api/jobs/{name}/cancel")
    async def cancel(name: str) -> dict[str, Any]:
        job = wanted(name)
        jobs.cancel(job)
        return job.told()

    @app.get("/pages/{name}")
    async def shown(name: str) -> Response:
        job = wanted(name)
        if job.page is None:
            raise HTTPException(404, "this job has no page yet")
        return Response(job.page, headers=_framed())


def _framed(more: str = "") -> dict[str, str]:
    return {"content-security-policy": FRAMED.format(more=more), "content-type": "text/html; charset=utf-8"}


def _report_routes(app: FastAPI, root: Path | None) -> None:
    @app.get("/api/reports")
    def listed() -> list[dict[str, Any]]:
        return [] if root is None else [report.told() for report in list_reports(root)]

    @app.get("/reports/{name:path}")
    def report(name: str) -> Response:
        try:
            if root is None:
                raise FileNotFoundError(name)
            file = open_report(root, name)
        except OSError:
            raise HTTPException(404, "there is no such report") from None
        # Charts of comparisons compile their expressions.
        return StreamingResponse(_chunks(file), headers=_framed(" 'unsafe-eval'"))


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(2**18):
            yield chunk


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """What is wrong with which field; never what was given."""
    assert isinstance(error, RequestValidationError)
    told = []
    for one in error.errors()[:5]:
        place = ".".join(str(part) for part in one["loc"] if part != "body")
        told.append(f"{place or 'request'}: {one['msg'].removeprefix('Value error, ')}"[:300])
    return JSONResponse({"error": "; ".join(told)}, 422)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AnyHTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=dict(error.headers or {}))


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": "something failed here; the terminal shows what"}, 500)
