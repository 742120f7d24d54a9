"""The bodies of requests as they arrive: each under a limit and in time, all of them together under a budget.

A body is held in memory until its request is answered, except for a piece of an upload, which goes to the disk as it
comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import Message, Receive

from hub.errors import BadRequest, HubUnavailable, TooLarge

HELD_BYTES = 64 << 20
HELD_OF_A_PIECE = 1 << 20


class Bodies:
    """Those of one service. Units: bytes; seconds between two arrivals."""

    def __init__(self, *, timeout_s: float, count: Callable[[int], None], budget: int = HELD_BYTES) -> None:
        self._timeout_s = timeout_s
        self._count = count
        self._budget = budget
        self._held = 0

    @contextmanager
    def arriving(self, receive: Receive, *, limit: int | None) -> Iterator[Receive]:
        """`receive` for one request, within a limit; None for a piece, whose size was announced.

        Raises, where it is called: BadRequest, TooLarge; HubUnavailable when too much is held already.
        """
        body = _Body(receive, limit, self._timeout_s)

        async def counted() -> Message:
            arrived, held = body.received, body.held
            try:
                message = await body.receive()
            finally:
                self._count(body.received - arrived)
                self._held += body.held - held
            if self._held > self._budget:
                raise HubUnavailable(f"the bodies of all requests are more than {self._budget} bytes now; try again")
            return message

        try:
            yield counted
        finally:
            self._held -= body.held


class _Body:
    def __init__(self, receive: Receive, limit: int | None, timeout_s: float) -> None:
        self._receive = receive
        self._limit = limit
        self._timeout_s = timeout_s
        self._whole = False
        self.received = 0

    @property
    def held(self) -> int:
        return min(self.received, HELD_OF_A_PIECE) if self._limit is None else self.received

    async def receive(self) -> Message:
        if self._whole:  # what is asked for now is only whether the client is still there
            return await self._receive()
        try:
            async with asyncio.timeout(self._timeout_s):
                message = await self._receive()
        except TimeoutError as error:
            raise BadRequest(f"nothing more of the body arrived within {self._timeout_s:g} s") from error
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._limit is not None and self.received > self._limit:
                raise TooLarge(f"the body is above the limit of {self._limit} bytes")
        return message
