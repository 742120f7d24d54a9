"""The outermost ring of the service: who asks, how large a body may be, an answer even to our own bugs, and counts."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hub.errors import BadRequest, HubError, InternalError, TooLarge
from hub.http.access import OPEN, Access
from hub.http.bodies import Bodies
from hub.http.config import RegistryConfig
from hub.http.metrics import RegistryMetrics
from hub.http.refusal import refuse
from hub.ref import printable

log = logging.getLogger(__name__)

PIECE_PREFIX = "/api/v1/uploads/"
COMMIT_SUFFIX = "/commit"
SMALL_BODY_BYTES = 256 << 10
MAX_HEAD_BYTES = 32 << 10
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


class Edge:
    """ASGI middleware. Leaves `principal` and `request_id` in the request's state; nothing behind it reads a key."""

    def __init__(self, app: ASGIApp, access: Access, config: RegistryConfig, metrics: RegistryMetrics) -> None:
        self._app = app
        self._access = access
        self._config = config
        self._metrics = metrics
        self._bodies = Bodies(timeout_s=config.body_timeout_s, count=metrics.received.inc)

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
        distrust = _why_distrusted(scope, headers)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            elif message["type"] == "http.response.body":
                self._metrics.sent.inc(len(message.get("body", b"")))
            await send(message)

        try:
            if distrust is not None:
                raise BadRequest(distrust)
            if scope["path"] not in OPEN:
                state["principal"] = await self._access.identify(headers.get("authorization"))
            limit = self._limit(scope)
            _check_declared(headers, limit)
            with self._bodies.arriving(receive, limit=limit) as bounded:
                await self._app(scope, bounded, answer)
        except HubError as error:
            if status:
                raise
            refusal = refuse(error)
            if distrust is not None:  # where the next request begins is anybody's guess
                refusal.headers["connection"] = "close"
            await refusal(scope, receive, answer)
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

    def _limit(self, scope: Scope) -> int | None:
        """Only a commit, which describes a base, is more than a few fields; a piece has the size it was begun with."""
        if scope["path"].startswith(PIECE_PREFIX) and scope["state"]["principal"].holds("push"):
            if scope["method"] == "PATCH":
                return None
            if scope["path"].endswith(COMMIT_SUFFIX):
                return self._config.max_body_bytes
        return min(SMALL_BODY_BYTES, self._config.max_body_bytes)


def _check_declared(headers: Headers, limit: int | None) -> None:
    """What is known of a body before it arrives. Raises: BadRequest, TooLarge."""
    if headers.get("content-encoding", "identity") != "identity":
        raise BadRequest("a body must be sent as it is, without content-encoding")
    declared = headers.get("content-length", "0")
    if limit is not None and (not declared.isdecimal() or int(declared[:20]) > limit):
        raise TooLarge(f"a body of {declared[:20]} bytes is above the limit of {limit}")


def _why_distrusted(scope: Scope, headers: Headers) -> str | None:
    """Why a request is not even looked at: its head is too large, or a proxy before us could see another body."""
    lines = sum(len(name) + len(value) + 4 for name, value in headers.raw)
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"]) + lines
    if size > MAX_HEAD_BYTES:
        return f"a head of {size} bytes is above the limit of {MAX_HEAD_BYTES}"
    if not scope["path"].isprintable():  # a newline at the end would be passed over by the routes' patterns
        return f"the path {printable(scope['path'])} holds characters that no path has"
    if scope["http_version"] not in ("1.0", "1.1"):
        return f"HTTP/{scope['http_version']} is not spoken here, only HTTP/1.1"
    if "transfer-encoding" in headers and ("content-length" in headers or scope["http_version"] != "1.1"):
        return "a body has either a content-length or, in HTTP/1.1, a transfer-encoding; not both"
    return None
