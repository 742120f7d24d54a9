"""What /openapi.json says beyond what the framework finds by itself: how every refusal looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from hub.http.access import OPEN

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "what": {"type": "string"},
                "problems": {"type": "array", "items": {"type": "object"}},
                "offset": {"type": "integer"},
            },
        }
    },
}
_REFUSALS = {
    "400": "not what the route takes, or refused with every problem",
    "401": "no key, or one that is unknown, revoked or expired",
    "403": "a key without the scope, or for other names",
    "404": "unknown, or not for this key to see",
    "405": "not a method of this route",
    "409": "something else is there, or was first",
    "413": "above a limit of bytes",
    "416": "a range beyond the end of the file",
    "500": "damaged bytes, or a bug of ours",
    "503": "not now: the disk or the catalogue, or too many watchers",
}


def describe(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The app's `openapi`: the framework's own, with our refusals in place of its 422."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schema["components"].setdefault("schemas", {})["Refusal"] = _ERROR
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in schema["paths"].items():
                for operation in methods.values():
                    _complete(operation, is_open=path in OPEN)
            app.openapi_schema = schema
        return app.openapi_schema

    return openapi


def _complete(operation: dict[str, Any], *, is_open: bool) -> None:
    answers = operation["responses"]
    answers.pop("422", None)
    if not is_open:
        operation["security"] = [{"key": []}]
    for status, text in _REFUSALS.items():
        answers.setdefault(
            status,
            {
                "description": text,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}},
            },
        )
