"""The app on a real port, in a thread, with a client that has opened its link."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from manyheads.hosts.loading import Loaded
from manyheads.serve.app import create_app
from manyheads.serve.command import _listen, create_server
from manyheads.serve.guard import Session
from manyheads.serve.jobs import Jobs
from manyheads.serve.places import Places


@dataclass
class Served:
    port: int
    session: Session
    jobs: Jobs

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stranger(self) -> httpx.Client:
        # Nothing is encrypted here, and to read the list of certificates takes longer than most requests.
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, verify=False)

    def client(self) -> httpx.Client:
        """One with the session's cookie and the app's own origin."""
        found = self.stranger()
        found.cookies.set(self.session.cookie_name, self.session.cookie)
        found.headers["origin"] = self.url
        return found


@contextmanager
def serving(loaded: Loaded, **options: Any) -> Iterator[Served]:
    session, jobs, places = Session(), Jobs(), options.pop("places", None) or Places()
    listener = _listen("127.0.0.1", 0)
    app = create_app(loaded, session, jobs, places=places, **options)
    server = create_server(app, places)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Served(listener.getsockname()[1], session, jobs)
    finally:
        server.should_exit = True
        thread.join(10)
        assert jobs.close(30)
        listener.close()


def ended(client: httpx.Client, answer: httpx.Response, seconds: float = 60) -> dict[str, Any]:
    """The job that an answer began, when it has ended."""
    assert answer.status_code == 202, answer.text
    job, stop = answer.json(), time.monotonic() + seconds
    while job["state"] in ("waiting", "running"):
        assert time.monotonic() < stop, job
        time.sleep(0.02)
        job = client.get(f"/api/jobs/{job['id']}").json()
    return dict(job)
