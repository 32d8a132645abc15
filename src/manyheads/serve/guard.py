"""What stands before every route: who asks, from where, how much, and the headers of every answer."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

MOST_BODY = 1_000_000
BODY_SECONDS = 30.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
READS = ("GET", "HEAD")
POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": POLICY,
}
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class Session:
    """One link, good for one browser: its token is exchanged for a cookie, and never taken again."""

    cookie_name: str = "manyheads"
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    cookie: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    used: bool = False

    def exchange(self, token: str) -> str | None:
        """The Set-Cookie header for the right token, once."""
        if self.used or not same(token, self.token):
            return None
        self.used = True
        return f"{self.cookie_name}={self.cookie}; Path=/; HttpOnly; SameSite=Strict"

    def knows(self, header: str) -> bool:
        try:
            found = SimpleCookie(header).get(self.cookie_name)
        except CookieError:
            return False
        return found is not None and same(found.value, self.cookie)


def same(given: str, secret: str) -> bool:
    """In a time that does not tell how much of it was right."""
    return secrets.compare_digest(given.encode("utf-8", "surrogateescape"), secret.encode())


class Guard:
    """An ASGI app around another. Refuses, in this order: foreign Host (DNS rebinding), no session, posts from another
    origin, bodies above 1 MB (counted as they come in). names: host names beside addresses that may be asked for; any:
    also every address in digits, which no name can be rebound to. admitted: told of each client who has a session."""

    def __init__(self, app: Any, session: Session, names: Iterable[str] = LOOPBACK, any_address: bool = False,
                 admitted: Callable[[Any], None] = lambda client: None):  # fmt: skip
        self.app, self.session, self.admitted = app, session, admitted
        self.names, self.any_address = {name.lower() for name in names}, any_address

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets: the server closes the connection
        answer = _with_headers(send)
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            # One that comes twice is as good as a wrong one.
            key, own = name.decode("latin-1").lower(), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {own}" if key in headers else own
        try:
            cookie = self._admit(scope, headers)
            self.admitted(scope.get("client"))
            if cookie is not None:
                await _redirect(answer, cookie)
                return
            body = await _body(headers, receive) if scope["method"] not in READS else b""
        except Refused as refused:
            await reply(answer, refused.status, refused.message)
            return
        await self.app(scope, _replay(body, receive), answer)

    def _admit(self, scope: Any, headers: dict[str, str]) -> str | None:
        """The cookie that a request with the right token gets, or None for one that has a session."""
        host = headers.get("host", "")
        if not self._at_home(host):
            raise Refused(421, "this host name is not served here; open the address that the terminal shows")
        if not self.session.knows(headers.get("cookie", "")):
            token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if scope["method"] == "GET" and scope["path"] == "/" and (cookie := self.session.exchange(token)):
                return cookie
            raise Refused(
                401,
                "no session: open the link that the terminal shows; it opens once, in one browser; "
                "start `manyheads serve` again for a new one",
            )
        if scope["method"] not in READS and headers.get("origin") not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, "requests that change something must come from this app's own page")
        return None

    def _at_home(self, host: str) -> bool:
        parts = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::\d{1,5})?", host.lower())
        if parts is None:
            return False
        name = parts[1] or parts[2]
        if name in self.names:
            return True
        if not self.any_address:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


async def _body(headers: dict[str, str], receive: Receive) -> bytes:
    """The whole body; refused as soon as it is too much, whatever length was announced."""
    announced = headers.get("content-length", "0")
    if not announced.isdigit():
        raise Refused(400, "the content-length is no number")
    if len(announced) > 12 or int(announced) > MOST_BODY:
        raise Refused(413, f"the request is larger than {MOST_BODY:,} bytes")
    found = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise Refused(400, "the request broke off")
                found += message.get("body", b"")
                if len(found) > MOST_BODY:
                    raise Refused(413, f"the request is larger than {MOST_BODY:,} bytes")
                if not message.get("more_body"):
                    return bytes(found)
    except TimeoutError:
        raise Refused(408, f"the request took longer than {BODY_SECONDS:.0f} s to come in") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message["headers"]}
            more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in given]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return sending


async def reply(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # What is left of a refused request is not read: the connection ends.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _redirect(send: Send, cookie: str) -> None:
    """To the app without the token, which thereby stays out of the history."""
    headers = [(b"location", b"/"), (b"set-cookie", cookie.encode()), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 303, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
