"""The way of every generation request, chat or completion, streamed or whole.

Errors before the first token are HTTP statuses: nothing is sent until the engine has said something. One after it ends
the stream with an error event. A client that goes away ends its request at any point.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import ExitStack, aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.api.body import read_body
from server.api.disconnect import ClientGone, unless_disconnected
from server.api.generation import Generation, start
from server.api.reading import Ticket
from server.api.refusal import error_body
from server.api.service import Service
from server.api.sse import DONE, EventStream
from server.api.transcript import Piece, join
from server.errors import Draining, ServerError
from server.records import Mixture

ADAPTERS_HEADER = "x-multigraft-adapters"
IGNORED_HEADER = "x-multigraft-ignored"
MAX_HEADER_CHARACTERS = 4000

Reader = Callable[[Service, dict[str, Any]], Awaitable[Ticket]]


async def answer(service: Service, request: Request, read: Reader) -> Response:
    """Raises: ServerError, ClientGone."""
    arrived = time.perf_counter()
    try:
        if request.app.state.draining:
            raise Draining("this server is shutting down and takes no new requests")
        ticket = await read(service, await read_body(request, limit=service.config.max_body_bytes))
        generation = await unless_disconnected(request.receive, start(service, ticket.order, arrived=arrived))
    except ServerError as error:
        service.metrics.request_refused("failed" if error.status == 500 else "refused")
        raise
    except ClientGone:
        service.metrics.request_refused("cancelled")
        raise
    headers = served_headers(service, generation.mixture, ticket.ignored)
    return await (_stream if ticket.stream else _whole)(generation, ticket, request, headers)


async def _whole(generation: Generation, ticket: Ticket, request: Request, headers: Mapping[str, str]) -> Response:
    choices: list[list[Piece]] = [[] for _ in generation.choices]

    async def collect() -> None:
        async with aclosing(generation.pieces()) as pieces:
            async for index, piece in pieces:
                choices[index].append(piece)

    try:
        await unless_disconnected(request.receive, collect())
        body = ticket.shape.whole([join(pieces) for pieces in choices], generation.usage(), generation.mixture)
    finally:
        generation.close()
    return Response(body, headers=dict(headers), media_type="application/json")


async def _stream(generation: Generation, ticket: Ticket, request: Request, headers: Mapping[str, str]) -> Response:
    pieces = generation.pieces()
    with ExitStack() as undo:
        undo.callback(generation.close)
        first = await unless_disconnected(request.receive, _next(pieces))
        undo.pop_all()
    return EventStream(_events(generation, ticket, first, pieces), on_close=generation.close, headers=headers)


async def _next(pieces: AsyncGenerator[tuple[int, Piece], None]) -> tuple[int, Piece]:
    return await anext(pieces)


async def _events(
    generation: Generation, ticket: Ticket, first: tuple[int, Piece], rest: AsyncGenerator[tuple[int, Piece], None]
) -> AsyncGenerator[str, None]:
    shape = ticket.shape
    async with aclosing(rest):
        for index in range(len(generation.choices)):
            opening = shape.opening(index, generation.mixture if index == 0 else None)
            if opening is not None:
                yield opening
        try:
            if _says_something(first[1]):
                yield shape.event(*first, generation.usage() if ticket.continuous_usage else None, generation.mixture)
            async for index, piece in rest:
                if _says_something(piece):
                    usage = generation.usage() if ticket.continuous_usage else None
                    yield shape.event(index, piece, usage, generation.mixture)
        except ServerError as error:
            yield error_body(error)
            return
    if ticket.include_usage:
        yield shape.usage_event(generation.usage())
    yield DONE


def _says_something(piece: Piece) -> bool:
    return bool(piece.text or piece.token_ids or piece.finish_reason)


def served_headers(service: Service, mixture: Mixture, ignored: tuple[str, ...]) -> dict[str, str]:
    """What served it, as a `model` of pinned versions that gives the same again.

    Where arrow chose token by token there is no such model: the candidates' versions stand with commas between.
    """
    pinned = "+".join(
        f"{term.name}@{term.version}" + ("" if term.weight == 1.0 else f"*{term.weight!r}".replace("e+", "e"))
        for term in mixture.terms
    )
    if mixture.routing is not None and mixture.routing.mode == "arrow":
        pinned = ",".join(f"{term.name}@{term.version}" for term in mixture.routing.experts)
    headers = {ADAPTERS_HEADER: _ascii(pinned or service.base_id)}
    if ignored:
        headers[IGNORED_HEADER] = _ascii(", ".join(ignored))
    return headers


def _ascii(text: str) -> str:
    """A header holds printable ASCII; anything else is percent-escaped, and what is too long is cut."""
    safe = "".join(c if " " <= c <= "~" else "".join(f"%{byte:02X}" for byte in c.encode()) for c in text)
    return safe[:MAX_HEADER_CHARACTERS]
