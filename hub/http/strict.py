"""Bodies of JSON that no two readers could understand differently: every router here uses this route class.

What a body would become in memory is bounded before it is read: a value is many times larger there than in its text.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from hub.errors import BadRequest
from hub.strict_json import BadJson, parse

MAX_VALUES = 500_000  # the largest base that is taken has some 400,000


class StrictRequest(Request):
    async def json(self) -> Any:
        """Raises: BadRequest."""
        body = await self.body()
        count = sum(body.count(sign) for sign in (b",", b"[", b"{"))  # every value but one follows one of them
        if count > MAX_VALUES:
            raise BadRequest(f"the body holds some {count} values, above the limit of {MAX_VALUES}")
        try:
            return await run_in_threadpool(parse, body)
        except BadJson as error:
            raise BadRequest(f"the body is no usable JSON: {error}") from error


class StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict
