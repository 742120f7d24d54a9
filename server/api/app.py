"""The HTTP app: every route, and what becomes of every error. Built once, by `server.main`.

`app.state.draining` is the one thing that changes afterwards: set to True, new generation requests get 503 and /ready
says no, while running ones finish and /health stays well.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.api import managing
from server.api.answer import answer
from server.api.disconnect import ClientGone
from server.api.edge import Edge
from server.api.embeddings import embeddings
from server.api.gauges import Gauges
from server.api.keys import admit_admin
from server.api.listing import find_model, list_models
from server.api.openapi import generation_docs, json_docs
from server.api.reading import read_chat, read_completion
from server.api.refusal import error_response
from server.api.requests import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    LoadBody,
    ReferenceBody,
    TokenizeBody,
    UnloadBody,
)
from server.api.service import ServerInfo, Service
from server.api.tokens import detokenize, tokenize
from server.config import AdapterConfig, HttpConfig
from server.contract import Adapters, Engine, HubStatus
from server.errors import MalformedBody, MethodNotAllowed, RouteNotFound, ServerError
from server.metrics import Metrics
from server.text.tokenizer import Tokenizer

CLIENT_CLOSED = 499  # nginx's number; nobody is there to read it, the log is


def create_app(
    *,
    engine: Engine,
    adapters: Adapters,
    tokenizer: Tokenizer,
    config: HttpConfig,
    base_id: str,
    metrics: Metrics,
    info: ServerInfo,
    adapter_cache_bytes: int = AdapterConfig().cache_bytes,
) -> FastAPI:
    text_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="text")
    service = Service(engine, adapters, tokenizer, config, base_id, metrics, info, text_thread)
    app = FastAPI(title="Multigraft", version=info.version, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.draining = False
    metrics.registry.register(Gauges(engine, adapters, adapter_cache_bytes))
    _add_generation(app, service)
    _add_reading(app, service)
    _add_managing(app, service)
    _add_probes(app, service)
    app.add_exception_handler(ServerError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(ClientGone, _nobody)
    app.add_middleware(Edge, config=config)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", **generation_docs(ChatBody))
    async def chat_completions(request: Request) -> Response:
        return await answer(service, request, read_chat)

    @app.post("/v1/completions", **generation_docs(CompletionBody))
    async def completions(request: Request) -> Response:
        return await answer(service, request, read_completion)

    @app.post("/v1/embeddings", **json_docs(EmbeddingsBody))
    async def to_vectors(request: Request) -> Response:
        return await embeddings(service, request)


def _add_reading(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", **json_docs())
    async def models() -> Any:
        return await list_models(service)

    @app.get("/v1/models/{model:path}", **json_docs())
    async def model(request: Request) -> Any:
        return await find_model(service, request.path_params["model"])

    @app.get("/v1/adapters", **json_docs())
    async def adapters() -> Any:
        return managing.list_adapters(service)

    @app.post("/tokenize", **json_docs(TokenizeBody))
    async def to_tokens(request: Request) -> Any:
        return await tokenize(service, request)

    @app.post("/detokenize", **json_docs(DetokenizeBody))
    async def to_text(request: Request) -> Any:
        return await detokenize(service, request)


def _add_managing(app: FastAPI, service: Service) -> None:
    async def admin(request: Request) -> None:
        admit_admin(request.state.holder, service.config)

    only_admin = [Depends(admin)]
    loaded: set[str] = set()

    @app.post("/v1/load_lora_adapter", dependencies=only_admin, **json_docs(LoadBody))
    async def load(request: Request) -> Response:
        return await managing.load(service, request, loaded)

    @app.post("/v1/unload_lora_adapter", dependencies=only_admin, **json_docs(UnloadBody))
    async def unload(request: Request) -> Response:
        return await managing.unload(service, request, loaded)

    @app.post("/v1/adapters/pin", dependencies=only_admin, **json_docs(ReferenceBody))
    async def pin(request: Request) -> Any:
        return await managing.pin(service, request)

    @app.post("/v1/adapters/warm", dependencies=only_admin, **json_docs(ReferenceBody))
    async def warm(request: Request) -> Any:
        return await managing.warm(service, request)

    @app.post("/v1/adapters/evict", dependencies=only_admin, **json_docs(ReferenceBody))
    async def evict(request: Request) -> Any:
        return await managing.evict(service, request)


def _add_probes(app: FastAPI, service: Service) -> None:
    """Open to everybody, so they tell nothing about requests or keys."""

    @app.get("/health", **json_docs())
    async def health() -> Response:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/ready", **json_docs())
    async def ready(request: Request) -> Response:
        draining = request.app.state.draining
        status = "draining" if draining else "ready" if service.engine.alive else "failed"
        body = {"status": status, **_hub_body(service.adapters.hub())}
        return JSONResponse(body, 200 if status == "ready" else 503)

    @app.get("/version", **json_docs())
    async def version() -> Any:
        return {"version": service.info.version, "base": service.base_id, **service.info.details}

    @app.get("/metrics", **json_docs())
    async def scrape() -> Response:
        return Response(service.metrics.scrape(), media_type=service.metrics.content_type)


def _hub_body(hub: HubStatus) -> dict[str, Any]:
    """A hub that is away does not make a server unready: it serves what it has."""
    if hub.reachable:
        return {"hub": "reachable"}
    return {"hub": "away", "hub_away_s": round(time.time() - (hub.away_since or time.time()), 1)}


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    return error_response(error)


async def _refuse_http(request: Request, error: Exception) -> Response:
    """What the framework itself refuses, in our shape."""
    assert isinstance(error, HTTPException)
    route = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        return error_response(RouteNotFound(f"no route {route}"))
    if error.status_code == 405:
        response = error_response(MethodNotAllowed(f"{route} is not allowed"))
        response.headers.update(error.headers or {})
        return response
    return error_response(MalformedBody(str(error.detail)))


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)
