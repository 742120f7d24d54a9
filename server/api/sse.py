"""Server-sent events: texts in, one `data:` event each out, closed early when the client goes.

Source: WHATWG HTML, section 9.2; the `[DONE]` line is OpenAI's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.disconnect import cancel_all, until_disconnect

DONE = "[DONE]"


class EventStream(Response):
    """`on_close` runs once, however the stream ends: exhausted, failed, disconnected, or never begun to be read."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[str, None], *, on_close: Callable[[], None], headers: Mapping[str, str]
    ) -> None:
        self._events = events
        self._on_close = on_close
        self.status_code = 200
        self.background = None
        # x-accel-buffering: nginx would otherwise hold tokens back.
        self.init_headers({**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(until_disconnect(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            await cancel_all(pump, gone)
            self._on_close()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for event in events:
                body = f"data: {event}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
