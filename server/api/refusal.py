"""An error as an answer: OpenAI's shape, all four keys, at most `MAX_BODY_BYTES`."""

from __future__ import annotations

import json
import math

from starlette.responses import Response

from server.errors import ServerError, Unauthorized, Unavailable

MAX_BODY_BYTES = 4096
DEFAULT_RETRY_AFTER_S = 1.0


def error_body(error: ServerError) -> str:
    """Law: valid JSON in ASCII of at most `MAX_BODY_BYTES`, whatever the message holds."""
    message, param = error.message, error.param
    while len(text := _dump(error, message, param)) > MAX_BODY_BYTES:
        message, param = message[: len(message) * 3 // 4], (param or "")[:100] or None
    return text


def error_response(error: ServerError) -> Response:
    return Response(error_body(error), error.status, headers=_headers(error), media_type="application/json")


def _dump(error: ServerError, message: str, param: str | None) -> str:
    return json.dumps({"error": {"message": message, "type": error.type, "param": param, "code": error.code}})


def _headers(error: ServerError) -> dict[str, str]:
    if isinstance(error, Unavailable):
        seconds = error.retry_after_s if error.retry_after_s is not None else DEFAULT_RETRY_AFTER_S
        return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(0, round(seconds * 1000)))}
    if isinstance(error, Unauthorized):
        return {"www-authenticate": "Bearer"}
    return {}
