"""Uploads over HTTP: begin, send what is missing piece by piece, commit.

    POST  /api/v1/uploads                    what will come -> {upload, missing: [{sha256, size, offset}]}
    PATCH /api/v1/uploads/ID/SHA256          bytes from `upload-offset` on -> the new offset; the last makes it whole
    POST  /api/v1/uploads/ID/commit          everything becomes visible, or nothing does

A piece that is cut off stays as far as it came; `upload-offset` must be where it stands, or 409 says where that is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack
from typing import Annotated

from fastapi import APIRouter, Header, Path
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from hub.contract import LATEST, Pushed
from hub.errors import BadUpload, Forbidden
from hub.http.access import Pusher, own
from hub.http.strict import StrictRoute
from hub.keys import Principal
from hub.registry import LocalHub
from hub.uploads import Missing, Part, Piece, Upload
from hub.wire import API, MAX_NUMBER, BeginBody, CommitBody

BUFFER_BYTES = 1 << 20  # written to the disk at a time

UploadId = Annotated[str, Path(max_length=64)]
Sha256 = Annotated[str, Path(max_length=80)]
Offset = Annotated[int, Header(alias="upload-offset", ge=0, le=MAX_NUMBER)]


def upload_routes(hub: LocalHub) -> APIRouter:
    routes = APIRouter(prefix=f"{API}/uploads", route_class=StrictRoute)

    @routes.post("", status_code=201)
    def begin(asking: Pusher, body: BeginBody) -> Upload:
        parts = [Part(file.path, file.size, file.sha256) for file in body.files]
        return hub.uploads.begin(own(asking, body.name), parts, owner=asking.id)

    @routes.get("/{upload}")
    def state(asking: Pusher, upload: UploadId) -> Upload:
        return hub.uploads.state(upload, owner=asking.id)

    @routes.patch("/{upload}/{sha256}")
    async def send(asking: Pusher, upload: UploadId, sha256: Sha256, offset: Offset, request: Request) -> Missing:
        with ExitStack() as stack:
            opened = hub.uploads.piece(upload, sha256, owner=asking.id, offset=offset)
            piece = await run_in_threadpool(stack.enter_context, opened)
            await _receive(piece, request)
            return Missing(sha256, piece.size, piece.offset)

    @routes.post("/{upload}/commit", status_code=201)
    def commit(asking: Pusher, upload: UploadId, body: CommitBody) -> Pushed:
        refuse_promotion(asking, body.aliases)
        return hub.commit_upload(
            upload,
            owner=asking.id,
            base=body.base.record(),
            modules=body.modules.record(),
            aliases=body.aliases,
            note=body.note,
            actor=asking.name,
            sees=asking.sees,
        )

    return routes


def refuse_promotion(asking: Principal, aliases: Iterable[str]) -> None:
    """A push moves `latest`; any other alias is a promotion. Raises: Forbidden."""
    others = [alias for alias in aliases if alias != LATEST]
    if others and not asking.holds("promote"):
        raise Forbidden(f"moving {others[0]} needs the scope promote; key {asking.name} may push only")


async def _receive(piece: Piece, request: Request) -> None:
    """Write what arrives, whole or not; what has arrived is kept."""
    buffer = bytearray()
    try:
        async for chunk in _chunks(request):
            buffer += chunk
            if len(buffer) >= BUFFER_BYTES:
                ready, buffer = buffer, bytearray()
                await run_in_threadpool(piece.write, ready)
    finally:
        if buffer:
            await run_in_threadpool(piece.write, buffer)
    if piece.whole:
        await run_in_threadpool(piece.finish)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect as error:
        raise BadUpload("the connection ended before the body did; go on from where it stands") from error
