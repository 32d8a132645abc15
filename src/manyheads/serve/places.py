"""Connections: how long one may take to say what it wants, and whose place goes first when there are too many.

The server underneath counts every connection that is open, and refuses whoever comes next. So anyone who opens enough
of them and says nothing shuts the app's owner out. Here a request's head has a time limit, strangers make room for
those who come after them, and a connection that has shown the session keeps its place.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
MOST_STRANGERS, MOST = 128, 384
Client = tuple[str, int]


@dataclass
class Places:
    """strangers: connections that have not shown the session, oldest first."""

    head_seconds: float = HEAD_SECONDS
    most_strangers: int = MOST_STRANGERS
    strangers: dict[_Connection, None] = field(default_factory=dict)

    def admit(self, client: Client | None) -> None:
        """A request from this client has shown the session: its connection keeps its place."""
        for connection in [own for own in self.strangers if own.client == client]:
            self.leave(connection)

    def protocol(self) -> type[H11Protocol]:
        """What the server makes for each connection."""
        places = self

        class Connection(_Connection):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(places, *args, **kwargs)

        return Connection

    def enter(self, connection: _Connection) -> None:
        self.strangers[connection] = None
        while len(self.strangers) > self.most_strangers:
            oldest = next(iter(self.strangers))
            del self.strangers[oldest]
            oldest.transport.abort()

    def leave(self, connection: _Connection) -> None:
        self.strangers.pop(connection, None)


class _Connection(H11Protocol):
    def __init__(self, places: Places, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.places = places
        self.late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.places.enter(self)
        self._wait()

    def data_received(self, data: bytes) -> None:
        before = self.scope
        super().data_received(data)
        if self.scope is not before:  # a head has come in whole; what it is followed by has limits of its own
            self._stop()
        elif self._idle():
            self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._idle() and self.conn.trailing_data[0]:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self.places.leave(self)
        super().connection_lost(exc)

    def _idle(self) -> bool:
        """No answer is under way."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def _wait(self) -> None:
        """From its first byte on, a head has so many seconds, in however many pieces it comes."""
        if self.late is None:
            self.late = self.loop.call_later(self.places.head_seconds, self.transport.abort)

    def _stop(self) -> None:
        if self.late is not None:
            self.late.cancel()
            self.late = None
