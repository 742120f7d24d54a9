"""Bytes of a request to a checked record: bounded, strict, and every complaint names the field.

Order: size, encoding, JSON, fields that we know and do not act on (`server.api.fields`), then the record's own limits.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from server.api.disconnect import ClientGone
from server.api.fields import INERT, UNSUPPORTED, is_neutral
from server.errors import BodyTooLarge, InvalidValue, MalformedBody, UnknownParameter, UnsupportedParameter

M = TypeVar("M", bound=BaseModel)

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SHOWN = 80  # characters of an offending value


@dataclass(frozen=True, slots=True)
class Checked(Generic[M]):
    body: M
    ignored: tuple[str, ...] = ()  # unknown fields that a lenient server let pass


async def read_body(request: Request, *, limit: int) -> dict[str, Any]:
    """Raises: BodyTooLarge, MalformedBody, ClientGone."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise MalformedBody(f"content-encoding {encoding[:40]!r} is not accepted: send the body as it is")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(limit)
    received = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        received += message.get("body", b"")
        if len(received) > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return parse_json(bytes(received))


def parse_json(body: bytes) -> dict[str, Any]:
    """Raises: MalformedBody."""
    try:
        text = body.decode()
        value = json.loads(text, parse_constant=_refuse_constant)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no character
    except UnicodeError as error:
        raise MalformedBody("the body is not valid UTF-8") from error
    except RecursionError as error:
        raise MalformedBody("the body is nested too deeply") from error
    except ValueError as error:
        raise MalformedBody(f"the body is not valid JSON: {error}"[:300]) from error
    if not isinstance(value, dict):
        raise MalformedBody(f"the body must be a JSON object, not {_show(value)}")
    return value


def check(model: type[M], data: Mapping[str, Any], *, lenient: bool) -> Checked[M]:
    """Raises: UnsupportedParameter, UnknownParameter, InvalidValue, MalformedBody."""
    fields = model.model_fields
    wanted: dict[str, Any] = {}
    for name, value in data.items():
        if name in fields:
            wanted[name] = value
        elif name in UNSUPPORTED:
            if not is_neutral(name, value):
                raise UnsupportedParameter(f"{name}={_show(value)} is not supported by this server", param=name)
        elif name not in INERT:
            wanted[name] = value
    ignored: list[str] = []
    while True:
        try:
            return Checked(model.model_validate(wanted), tuple(ignored))
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False)
            unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
            if not (lenient and unknown):
                raise _complaint(problems, model) from error
            for problem in unknown:
                ignored.append(_path(problem["loc"])[:100])
                _remove(wanted, problem["loc"])


def _complaint(problems: Sequence[ErrorDetails], model: type[BaseModel]) -> Exception:
    problem = problems[0]
    path = _path(problem["loc"])
    if problem["type"] == "extra_forbidden":
        name = str(problem["loc"][-1])
        known = {*model.model_fields, *INERT, *UNSUPPORTED}
        near = difflib.get_close_matches(name[:100], known, n=1) if len(problem["loc"]) == 1 else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return UnknownParameter(f"unknown field {path[:200]!r}{hint}", param=path)
    if problem["type"] == "missing":
        return MalformedBody(f"required field {path!r} is missing", param=path)
    message = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return InvalidValue(f"{path}: {message}, not {_show(problem['input'])}", param=path)


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _remove(data: dict[str, Any], loc: tuple[int | str, ...]) -> None:
    """Drop one field of a parsed body, however deep; the containers on the way are replaced, not written to."""
    if len(loc) == 1:
        del data[str(loc[0])]
        return
    inner: Any = data
    for step, part in enumerate(loc[:-1]):
        inner[part] = inner[part].copy()
        inner = inner[part]
        assert isinstance(inner, dict | list), f"step {step} of {loc} holds a field"
    del inner[loc[-1]]


def _show(value: object) -> str:
    if isinstance(value, dict | list) and len(value) > 20:
        return f"{type(value).__name__} of {len(value)}"
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
