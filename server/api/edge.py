"""The outermost ring of the app: every request gets an id, a key check, and an answer even when we have a bug."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.keys import admit, holder_of
from server.api.refusal import error_response
from server.config import HttpConfig
from server.errors import EngineFailed, ServerError

_LOG = logging.getLogger("server.api")
_SAFE_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


class Edge:
    """ASGI middleware. Leaves `request_id` and `holder` in the request's state."""

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan; there are no websocket routes
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id", b""))
        holder = holder_of(headers.get(b"authorization", b""), self._config)
        scope.setdefault("state", {}).update(request_id=request_id, holder=holder)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            admit(holder, scope["path"], self._config)
            await self._app(scope, receive, send_with_id)
        except ServerError as error:
            await error_response(error)(scope, receive, send_with_id)
        except Exception:
            # A bug of ours. Logged with its traceback; the client learns the request's id and nothing of our insides.
            _LOG.exception("request %s failed", request_id)
            if started:
                raise  # half an answer is out: only a broken connection tells the client
            failure = EngineFailed(f"internal error; quote the request id {request_id}")
            await error_response(failure)(scope, receive, send_with_id)


def _request_id(given: bytes) -> str:
    return given.decode() if _SAFE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
