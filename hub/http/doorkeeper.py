"""Connections under a limit: who says nothing makes room for those who do.

uvicorn waits for ever for the first request of a connection, and for the rest of a request's head. Here a connection
that waits for a head is closed after a while, and at once, the oldest first, when there are too many; one that is being
answered is never closed for another. Only when all are being answered does a new one get 503.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: 73\r\n\r\n"
    b'{"error": {"code": "hub_unavailable", "message": "too many connections"}}'
)


def guarded(*, max_connections: int, header_timeout_s: float) -> type[asyncio.Protocol]:
    """The protocol for uvicorn's `http` setting. Units: seconds for a request's head to arrive whole."""

    class Guarded(H11Protocol):
        waiting: dict[Guarded, asyncio.TimerHandle] = {}  # noqa: RUF012  of this one server; the oldest comes first

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections and not self._make_room():
                transport.write(_FULL)
                transport.close()
                return
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._awaits_head():
                self._wait()
            else:
                self._stop_waiting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._awaits_head() and self.conn.trailing_data[0]:
                self._wait()  # half of the next head is here already

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _awaits_head(self) -> bool:
            answering = self.cycle is not None and not self.cycle.response_complete
            return not answering and self.conn.their_state is h11.IDLE

        def _wait(self) -> None:
            if self not in self.waiting:
                self.waiting[self] = self.loop.call_later(header_timeout_s, self._give_up)

        def _stop_waiting(self) -> None:
            timer = self.waiting.pop(self, None)
            if timer is not None:
                timer.cancel()

        def _give_up(self) -> None:
            self._stop_waiting()
            self.transport.close()

        def _make_room(self) -> bool:
            oldest = next(iter(self.waiting), None)
            if oldest is None:
                return False
            oldest._give_up()
            return True

    return Guarded
