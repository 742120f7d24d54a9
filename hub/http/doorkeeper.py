"""Connections under a limit: who says nothing makes room for those who do.

uvicorn waits for ever for the first request of a connection, for the rest of a request's head, for the rest of a body
that was answered before it ended, and for a client that does not take its answer. Here each of them is closed after a
while. When there are too many connections the oldest of those that owe us something leaves at once, and after them the
oldest that rests between two requests; one that is being answered is never closed for another. Only when all are being
answered does a new one get 503.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hub.errors import BadRequest, HubError, HubUnavailable
from hub.wire import tell

_REASONS = {400: "Bad Request", 503: "Service Unavailable"}


def guarded(*, max_connections: int, header_timeout_s: float, body_timeout_s: float = 30.0) -> type[asyncio.Protocol]:
    """The protocol for uvicorn's `http` setting.

    Units: seconds for a request's head to arrive whole, and between two arrivals of bytes on their way out.
    """

    class Guarded(H11Protocol):
        # Of this one server, with the timers that close them; the oldest comes first.
        owing: dict[Guarded, asyncio.TimerHandle] = {}  # noqa: RUF012  a head, or the end of an answered body
        resting: dict[Guarded, asyncio.TimerHandle] = {}  # noqa: RUF012  between two requests
        refused = False
        stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # uvicorn's sockets do not say that they are TCP, so asyncio leaves them waiting for more to send: head and
            # body of an answer go out apart, and a client that keeps its connection would wait 40 ms for the second.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if len(self.connections) > max_connections and not self._make_room():
                transport.write(_answer(HubUnavailable("too many connections")))
                transport.close()
                return
            self._settle()

        def data_received(self, data: bytes) -> None:
            if self.refused:  # only read so that the refusal is not lost
                return
            super().data_received(data)
            self._settle()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._settle()

        def send_400_response(self, msg: str) -> None:
            """For what is no HTTP; `msg` says no more than that."""
            self.refused = True
            if self.cycle is not None:  # whoever waits for the rest of this body waits no longer
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(_answer(BadRequest("this is no HTTP request, or its head is too large")))
                self.transport.write_eof()
            else:  # an answer is out already, or a part of it
                self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.stalled = self.loop.call_later(body_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._flows()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._flows()
            self._leave()
            super().connection_lost(exc)

        def _settle(self) -> None:
            """Stand where one belongs, with a timer that later arrivals do not renew."""
            answering = self.cycle is not None and not self.cycle.response_complete
            if (answering and not self.refused) or self.transport.is_closing():
                self._leave()
                return
            rests = self.cycle is not None and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
            place, seconds = (self.resting, self.timeout_keep_alive) if rests else (self.owing, header_timeout_s)
            if self not in place:
                self._leave()
                place[self] = self.loop.call_later(seconds, self._give_up)

        def _leave(self) -> None:
            timer = self.owing.pop(self, None) or self.resting.pop(self, None)
            if timer is not None:
                timer.cancel()

        def _flows(self) -> None:
            if self.stalled is not None:
                self.stalled.cancel()
                self.stalled = None

        def _give_up(self) -> None:
            self._leave()
            self.transport.close()

        def _make_room(self) -> bool:
            oldest = next(iter(self.owing), None) or next(iter(self.resting), None)
            if oldest is None:
                return False
            oldest._give_up()
            return True

    return Guarded


def _answer(error: HubError) -> bytes:
    """A refusal as bytes, where no HTTP conversation can be held."""
    body = json.dumps(tell(error))
    head = (
        f"HTTP/1.1 {error.status} {_REASONS[error.status]}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
    )
    return (head + body).encode("ascii")
