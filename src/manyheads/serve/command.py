"""The command `manyheads serve`."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import uvicorn

    from .places import Places


def serve(
    model: Annotated[
        str | None, typer.Argument(help="A folder, hub name, .gguf file or smollm2; else the packaged byte model.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    reports: Annotated[Path | None, typer.Option(help="Folder whose reports can be browsed.")] = None,
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the link in the browser.")] = True,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Listen beyond this machine; what is sent is not encrypted.")
    ] = False,
) -> None:
    """Open a small web app on this machine: type a text, explain it, intervene and see the change, browse reports."""
    if not _local(host) and not allow_remote:
        raise ValueError(f"--host {host} can be reached from other machines: add --allow-remote if that is wanted")
    if reports is not None and not reports.is_dir():
        raise ValueError(f"--reports {reports} is no folder")
    from .guard import LOOPBACK, Session
    from .jobs import Jobs

    with _listen(host, port) as listener:
        typer.echo("loading the model ...", err=True)
        from manyheads.hosts.loading import load_any

        from .app import create_app
        from .places import Places

        port = int(listener.getsockname()[1])
        session, jobs, places = Session(f"manyheads-{port}"), Jobs(), Places()
        names = {*LOOPBACK, host} | ({socket.gethostname(), socket.getfqdn()} if allow_remote else set())
        app = create_app(
            load_any(model), session, jobs, reports=reports and reports.resolve(), names=names,
            any_address=allow_remote, places=places,
        )  # fmt: skip
        place = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        url = f"http://{f'[{place}]' if ':' in place else place}:{port}/?token={session.token}"
        typer.echo(f"{url}\nThe link opens once, in one browser. Ctrl-C ends.")
        _run(app, listener, places, url if browser else None)
    typer.echo("ended", err=True)
    if not jobs.close(3):
        # The model is in the middle of a step that cannot be broken off.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on {host} port {port} ({why}): choose another --port or --host") from error


def create_server(app: object, places: Places) -> uvicorn.Server:
    """The HTTP server of the app, whose connections are in these places."""
    import uvicorn

    from .places import MOST

    # No access log: it would hold the token.
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=places.protocol(), log_level="warning", access_log=False, server_header=False, ws="none", lifespan="off",
        limit_concurrency=MOST, timeout_graceful_shutdown=2,
    )  # fmt: skip
    return uvicorn.Server(config)


def _run(app: object, listener: socket.socket, places: Places, url: str | None) -> None:
    import threading
    import webbrowser

    # A browser of the terminal would use the link up.
    if url is not None and (sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        threading.Timer(0.5, webbrowser.open, [url]).start()
    with suppress(KeyboardInterrupt):  # by then the server has ended in good order
        create_server(app, places).run(sockets=[listener])
