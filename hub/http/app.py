"""The registry's HTTP app: every route, and what becomes of every error. Built once, by `hub.http.serve`."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from hub.errors import BadRequest, HubError, NotFound
from hub.http.access import Access, Reader
from hub.http.api import api_routes
from hub.http.config import RegistryConfig
from hub.http.edge import Edge
from hub.http.events import Watchers
from hub.http.huggingface import hugging_face_routes
from hub.http.metrics import Holdings, RegistryMetrics
from hub.http.openapi import describe
from hub.http.pieces import upload_routes
from hub.http.refusal import refuse
from hub.ref import printable
from hub.registry import LocalHub
from hub.wire import API, MAX_NUMBER

log = logging.getLogger(__name__)


def create_app(hub: LocalHub, config: RegistryConfig) -> FastAPI:
    metrics = RegistryMetrics()
    watchers = Watchers(hub, limit=config.max_watchers)
    metrics.registry.register(Holdings(hub, lambda: watchers.open))

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(watchers.follow()), asyncio.create_task(_collect(hub, config.collect_s))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    app = FastAPI(
        title="Multigraft registry",
        version=version("multigraft"),
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=life,
    )
    app.state.draining = False
    app.state.watchers = watchers
    _add_probes(app, hub, metrics)
    _add_stream(app, watchers)
    for routes in (api_routes(hub), upload_routes(hub), hugging_face_routes(hub)):
        app.include_router(routes)
    app.add_exception_handler(HubError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_values)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_middleware(Edge, access=Access(hub.keys, config), config=config, metrics=metrics)
    app.openapi = describe(app)  # type: ignore[method-assign]
    _add_description(app)
    return app


def _add_probes(app: FastAPI, hub: LocalHub, metrics: RegistryMetrics) -> None:
    """Open to everybody, so they tell nothing of adapters or keys."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "draining, or the catalogue cannot be read"}})
    async def ready(request: Request) -> JSONResponse:
        if request.app.state.draining:
            return JSONResponse({"status": "draining"}, 503)
        try:
            await run_in_threadpool(hub.head)
        except HubError as error:
            log.error("not ready: %s", error)
            return JSONResponse({"status": "the catalogue cannot be read"}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/version")
    async def installed() -> dict[str, str]:
        return {"version": version("multigraft"), "service": "registry"}

    @app.get("/metrics", response_class=Response)
    def scrape() -> Response:
        return Response(metrics.scrape(), media_type=metrics.content_type)


def _add_stream(app: FastAPI, watchers: Watchers) -> None:
    @app.get(f"{API}/events", response_class=StreamingResponse)
    async def events(
        asking: Reader, request: Request, after: Annotated[int | None, Query(ge=0, le=MAX_NUMBER)] = None
    ) -> Response:
        """Server-sent events, for ever. `after`, or else the header Last-Event-ID, is the last one that was seen."""
        last = request.headers.get("last-event-id", "0")
        if after is None and not (last.isascii() and last.isdecimal() and len(last) <= 15):
            raise BadRequest(f"Last-Event-ID must be the number of an event, not {printable(last)}")
        start = int(last) if after is None else after
        await watchers.check(start)
        return StreamingResponse(
            watchers.stream(start, asking),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )


def _add_description(app: FastAPI) -> None:
    """Not open, as the framework's own route is."""

    @app.get("/openapi.json", include_in_schema=False)
    def description(asking: Reader) -> JSONResponse:
        return JSONResponse(app.openapi())


async def _collect(hub: LocalHub, every_s: float) -> None:
    while every_s:
        await asyncio.sleep(every_s)
        try:
            freed = await run_in_threadpool(hub.collect)
            log.info("collected %d blobs, %d bytes", freed.blobs, freed.bytes)
        except HubError as error:
            log.warning("nothing was collected: %s", error)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HubError)
    return refuse(error)


async def _refuse_values(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    return refuse(BadRequest(f"{printable(where)}: {first['msg']}, not {_shown(first.get('input'))}"))


def _shown(value: Any) -> str:
    """A value of a request in a few words."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, bytes):
        return "a body without content-type: application/json"
    return printable(json.dumps(value[:120] if isinstance(value, str) else value, default=str)[:120])


async def _refuse_http(request: Request, error: Exception) -> Response:
    """What the framework itself refuses, in our shape."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, HubError):
        return refuse(error.__cause__)
    route = f"{request.method} {printable(request.url.path)}"
    if error.status_code == 404:
        return refuse(NotFound(f"no route {route}"))
    answer = refuse(BadRequest(f"{route}: {error.detail}"))
    answer.status_code = error.status_code
    answer.headers.update(error.headers or {})
    return answer
