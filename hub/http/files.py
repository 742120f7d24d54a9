"""One kept file as an answer: in pieces, in flat memory, and never a byte of a file that is damaged at its end.

Every answer reads the file from its beginning and hashes it; of a range, what lies before it is read and dropped. The
last piece leaves only when the hash is right, so a damaged file is a broken connection, never a whole wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from hub.errors import BadRequest, NotFound
from hub.manifest import Manifest
from hub.ref import printable
from hub.registry import LocalHub
from hub.wire import tell

_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{0,15})")
# What a route that answers with a file says of itself beyond its own parameters.
RANGES: dict[str, Any] = {
    "parameters": [
        {
            "in": "header",
            "name": "range",
            "description": "one range of bytes; any other header is passed over",
            "schema": {"type": "string", "pattern": f"^{_RANGE.pattern}$"},
        }
    ],
    "responses": {"206": {"description": "the range that was asked for"}},
}


def file_response(
    hub: LocalHub, manifest: Manifest, path: str, request: Request, *, headers: dict[str, str] | None = None
) -> Response:
    """GET or HEAD, whole or from a byte on. Raises: NotFound, Corrupt."""
    entry = manifest.file(path)
    if entry is None:
        raise NotFound(f"adapter {manifest.digest} has no file {printable(path)}")
    about = {"etag": f'"{entry.sha256}"', "accept-ranges": "bytes", **(headers or {})}
    asked_for = request.headers.get("range")
    asked = _asked(asked_for, entry.size)
    if asked == "beyond":
        beyond = BadRequest(f"{path} has {entry.size} bytes: the range {printable(str(asked_for))} is beyond them")
        return JSONResponse(tell(beyond), 416, headers={**about, "content-range": f"bytes */{entry.size}"})
    start, stop = asked if isinstance(asked, tuple) else (0, entry.size)
    status = 206 if isinstance(asked, tuple) else 200
    if status == 206:
        about["content-range"] = f"bytes {start}-{stop - 1}/{entry.size}"
    about["content-length"] = str(stop - start)
    about["content-type"] = "application/octet-stream"
    if request.method == "HEAD":
        return Response(status_code=status, headers=about)
    pieces = _between(hub.stream(manifest.digest, path), start, stop)
    first = next(pieces, b"")  # what is missing or damaged at once is said with a status
    return StreamingResponse(_joined(first, pieces), status_code=status, headers=about)


def _asked(header: str | None, size: int) -> tuple[int, int] | str | None:
    """The range (start, stop) of a header; None for the whole, which is what any other header gets too."""
    match = _RANGE.fullmatch(header or "")
    if match is None:
        return None
    start, last = int(match[1]), int(match[2]) if match[2] else size - 1
    if start >= size or last < start:
        return "beyond"
    return start, min(last + 1, size)


def _between(pieces: Iterator[bytes], start: int, stop: int) -> Iterator[bytes]:
    """Bytes start..stop-1 of a stream that is read to its end, where it is found to be whole or not."""
    position, held = 0, b""
    for piece in pieces:
        wanted = piece[max(0, start - position) : max(0, stop - position)]
        position += len(piece)
        if wanted:
            if held:
                yield held
            held = wanted
    if held:
        yield held


def _joined(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest
