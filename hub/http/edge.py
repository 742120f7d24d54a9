"""The outermost ring of the service: who asks, how large a body may be, an answer even to our own bugs, and counts."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hub.errors import BadRequest, HubError, InternalError, TooLarge
from hub.http.access import OPEN, Access
from hub.http.config import RegistryConfig
from hub.http.metrics import RegistryMetrics
from hub.http.refusal import refuse

log = logging.getLogger(__name__)

PIECE_PREFIX = "/api/v1/uploads/"
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


class Edge:
    """ASGI middleware. Leaves `principal` and `request_id` in the request's state; nothing behind it reads a key."""

    def __init__(self, app: ASGIApp, access: Access, config: RegistryConfig, metrics: RegistryMetrics) -> None:
        self._app = app
        self._access = access
        self._config = config
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan; there are no websocket routes
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        began, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            elif message["type"] == "http.response.body":
                self._metrics.sent.inc(len(message.get("body", b"")))
            await send(message)

        try:
            if scope["path"] not in OPEN:
                state["principal"] = await self._access.identify(headers.get("authorization"))
            await self._app(scope, self._bounded(scope, headers, receive), answer)
        except HubError as error:
            if status:
                raise
            await refuse(error)(scope, receive, answer)
        except Exception:
            # A bug of ours. Logged with its traceback; the client learns the request's id and nothing of our insides.
            log.exception("request %s failed", request_id)
            if status:
                raise  # half an answer is out: only a broken connection tells the client
            failure = InternalError(f"internal error; quote the request id {request_id}")
            await refuse(failure)(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.request(route, scope["method"], status or 499, time.perf_counter() - began)

    def _bounded(self, scope: Scope, headers: Headers, receive: Receive) -> Callable[[], Awaitable[Message]]:
        """`receive` with a limit on bytes, except for pieces of uploads, and on the time between two arrivals."""
        limit = (
            None
            if scope["path"].startswith(PIECE_PREFIX) and scope["method"] == "PATCH"
            else self._config.max_body_bytes
        )
        if headers.get("content-encoding", "identity") != "identity":
            raise BadRequest("a body must be sent as it is, without content-encoding")
        declared = headers.get("content-length", "0")
        if limit is not None and (not declared.isdecimal() or int(declared[:20]) > limit):
            raise TooLarge(f"a body of {declared[:20]} bytes is above the limit of {limit}")
        received, whole = 0, False

        async def bounded() -> Message:
            nonlocal received, whole
            if whole:  # what is asked for now is only whether the client is still there
                return await receive()
            try:
                async with asyncio.timeout(self._config.body_timeout_s):
                    message = await receive()
            except TimeoutError as error:
                seconds = self._config.body_timeout_s
                raise BadRequest(f"nothing more of the body arrived within {seconds:g} s") from error
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                self._metrics.received.inc(len(message.get("body", b"")))
                whole = not message.get("more_body", False)
                if limit is not None and received > limit:
                    raise TooLarge(f"the body is above the limit of {limit} bytes")
            return message

        return bounded
