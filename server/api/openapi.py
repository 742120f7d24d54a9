"""What /openapi.json says of a route. Bodies are read by hand, so they are described here, from their records."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS = {
    400: "refused by name",
    401: "no key, or a wrong one",
    403: "not with this key",
    404: "unknown model",
    413: "body too large",
    500: "a bug of ours",
    502: "the adapter's files are corrupt or were refused",
    503: "no room now, or shutting down; see retry-after",
}


def json_docs(body: type[BaseModel] | None = None) -> dict[str, Any]:
    """Arguments for a route that answers JSON."""
    docs: dict[str, Any] = {"responses": {status: _refusal(text) for status, text in _REFUSALS.items()}}
    # None: our handlers answer with what they return; nothing is validated or filtered on the way out.
    docs["response_model"] = None
    if body is not None:
        docs["openapi_extra"] = {"requestBody": _request(body)}
    return docs


def generation_docs(body: type[BaseModel]) -> dict[str, Any]:
    """Arguments for a route that answers JSON or, when asked to stream, server-sent events."""
    docs = json_docs(body)
    docs["responses"][200] = {
        "description": "the answer; with stream=true as server-sent events",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
    return docs


@cache
def _request(body: type[BaseModel]) -> dict[str, Any]:
    # Subschemas are written out in place: references would point into a document that is not this one.
    schema = body.model_json_schema()
    definitions = schema.pop("$defs", {})
    return {"required": True, "content": {"application/json": {"schema": _inline(schema, definitions)}}}


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inline(value, definitions) for key, value in schema.items()}


def _refusal(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _ERROR}}}
