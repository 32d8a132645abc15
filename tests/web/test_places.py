"""Connections that say nothing, and who is let in beside them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest
from serving import Served, serving

from manyheads.hosts.loading import Loaded, load_model
from manyheads.serve.places import MOST_STRANGERS, Places

HALF = b"GET /api/model HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model()


@pytest.fixture(scope="module")
def served(loaded: Loaded) -> Iterator[Served]:
    with serving(loaded) as running:
        yield running


@contextmanager
def open_half(served: Served, count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        held = []
        for _ in range(count):
            held.append(stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=10)))
            held[-1].sendall(HALF)
        yield held


def ended(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_half_open_connections_do_not_shut_the_owner_out(served: Served) -> None:
    with open_half(served, 400), served.client() as client:
        assert client.get("/api/model").status_code == 200
    with open_half(served, 400), served.stranger() as opening:
        assert opening.get("/", params={"token": served.session.token}).status_code == 303


def test_the_owners_connection_is_kept_while_strangers_come(served: Served) -> None:
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
    with served.client() as client:
        client._transport = httpx.HTTPTransport(limits=limits)
        first = client.get("/api/model").extensions["network_stream"].get_extra_info("client_addr")
        with open_half(served, MOST_STRANGERS + 50) as held:
            again = client.get("/api/model")
            assert again.status_code == 200
            assert again.extensions["network_stream"].get_extra_info("client_addr") == first
            assert ended(held[0], 5)
            assert not ended(held[-1], 0.1)


@pytest.mark.parametrize("pieces", [b"", b"G", HALF], ids=["silent", "one byte", "half a head"])
def test_a_head_has_a_time_limit(loaded: Loaded, pieces: bytes) -> None:
    with serving(loaded, places=Places(head_seconds=0.5)) as served:
        slow, begun = socket.create_connection(("127.0.0.1", served.port)), time.monotonic()
        with slow:
            slow.sendall(pieces)
            while time.monotonic() - begun < 5 and not ended(slow, 0.1):
                with suppress(ConnectionError):
                    slow.sendall(b"x" if pieces else b"")  # a byte now and then does not buy time
        assert 0.3 < time.monotonic() - begun < 3


def test_the_second_head_of_a_connection_has_one_too(loaded: Loaded) -> None:
    with serving(loaded, places=Places(head_seconds=0.5)) as served:
        cookie = f"Cookie: {served.session.cookie_name}={served.session.cookie}\r\n".encode()
        with socket.create_connection(("127.0.0.1", served.port)) as slow:
            slow.sendall(HALF + cookie + b"\r\n")
            time.sleep(0.2)
            assert slow.recv(1 << 16).startswith(b"HTTP/1.1 200")
            slow.sendall(HALF)
            assert ended(slow, 3)


def test_what_takes_longer_than_a_head_may_goes_on(loaded: Loaded) -> None:
    """The limit ends with the head: bodies have one of their own."""
    with serving(loaded, places=Places(head_seconds=0.3)) as served, served.client() as client:

        def body() -> Iterator[bytes]:
            yield b'{"text": '
            time.sleep(0.8)
            yield b'"Words."}'

        headers = {"content-type": "application/json"}
        assert client.post("/api/tokens", content=body(), headers=headers).status_code == 200
