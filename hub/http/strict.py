"""Bodies of JSON that no two readers could understand differently: every router here uses this route class."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from hub.errors import BadRequest
from hub.strict_json import BadJson, parse


class StrictRequest(Request):
    async def json(self) -> Any:
        """Raises: BadRequest."""
        try:
            return parse(await self.body())
        except BadJson as error:
            raise BadRequest(f"the body is no usable JSON: {error}") from error


class StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict
