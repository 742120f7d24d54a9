"""An error as an answer: `{"error": {"code", "message", ...}}`, and the headers that Hugging Face's clients read."""

from __future__ import annotations

import json

from starlette.responses import Response

from hub.errors import Forbidden, HubError, HubUnavailable, NotFound, Unauthorized
from hub.wire import tell

RETRY_AFTER_S = 2


def refuse(error: HubError, *, hugging_face: str | None = None) -> Response:
    """`hugging_face`: which of its errors this is, such as RepoNotFound."""
    headers = {"content-type": "application/json"}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, HubUnavailable):
        headers["retry-after"] = str(RETRY_AFTER_S)
    if hugging_face is None and isinstance(error, Unauthorized | Forbidden):
        hugging_face = "GatedRepo" if isinstance(error, Forbidden) else None
    if hugging_face is None and isinstance(error, NotFound):
        hugging_face = "EntryNotFound"
    if hugging_face is not None:
        headers["x-error-code"] = hugging_face
        headers["x-error-message"] = _ascii(str(error))
    return Response(json.dumps(tell(error)), status_code=error.status, headers=headers)


def _ascii(text: str) -> str:
    """A header holds printable ASCII, in one line."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:500]
