"""What travels between a hub and those who reach it over HTTP: the bodies of requests, and how errors are told.

Answers are the records of `hub.contract` as they are.
Law: an error that is told and heard again is of the same class with the same words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from hub.base import Base, Linear, Modules
from hub.contract import Event
from hub.errors import BadTensors, HubError, HubUnavailable, Problem, Refused, UploadBusy
from hub.experts import Parameter
from hub.keys import MAX_LIFE_S
from hub.ref import printable

API = "/api/v1"
MAX_MODULES = 100_000  # the largest open models have some 70,000 Linear layers
MAX_MODULE_NAME = 256
MAX_LAYERS = 10_000
MAX_SIZE = 2**31 - 1
MAX_NUMBER = 2**53 - 1  # whole numbers that every reader of JSON keeps whole

Text = Annotated[str, Field(max_length=4096)]
Version = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Bytes = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
_Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
_Module = Annotated[str, Field(min_length=1, max_length=MAX_MODULE_NAME)]
_Linear = Annotated[list[_Size], Field(min_length=2, max_length=2)]
_Parameter = Annotated[list[_Size], Field(min_length=3, max_length=3)]


def _few_complaints(value: Any) -> Any:
    """Every wrong item of a body would become a record much larger than itself: the first one is enough."""
    if isinstance(value, dict):
        if len(value) > MAX_MODULES:
            raise ValueError(f"{len(value)} modules are above the limit of {MAX_MODULES}")
        wrong = next((name for name, sizes in value.items() if not _is_linear(name, sizes)), None)
        if wrong is not None:
            raise ValueError(f"{printable(wrong)} must be a name with its two sizes, [inputs, outputs]")
    return value


def _is_linear(name: str, sizes: Any) -> bool:
    whole = isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int for size in sizes)
    return whole and 1 <= min(sizes) <= max(sizes) <= MAX_SIZE and 1 <= len(name) <= MAX_MODULE_NAME


@dataclass(frozen=True, slots=True)
class History:
    """A page of the log: what of it may be seen, and the number of the last event that was looked at."""

    events: list[Event]
    upto: int


class Body(BaseModel):
    """Nothing is coerced, nothing unknown is passed over."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """As `_few_complaints`: of fields that nobody defines, the first."""
        strange = next((key for key in value if key not in cls.model_fields), None) if isinstance(value, dict) else None
        if strange is not None:
            raise ValueError(f"{printable(strange)} is no field here; there are {', '.join(cls.model_fields)}")
        return value


class PartBody(Body):
    path: Annotated[str, Field(max_length=128)]
    size: Bytes
    sha256: Annotated[str, Field(max_length=64)]


class BeginBody(Body):
    """A push begins: what it will bring."""

    name: Text
    files: Annotated[list[PartBody], Field(min_length=1, max_length=64)]


class BaseBody(Body):
    """A base as its owner describes it; the fingerprint follows from it."""

    name: Annotated[str, Field(max_length=512)]
    revision: Annotated[str, Field(max_length=64)] | None = None
    model_type: Annotated[str, Field(max_length=64)]
    hidden_size: _Size
    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    heads: _Size
    kv_heads: _Size
    head_dim: _Size
    intermediate_size: _Size | None
    vocab_size: _Size
    tokenizer: Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")] | None
    experts: _Size | None = None

    def record(self) -> Base:
        return Base(**self.model_dump())


class ModulesBody(Body):
    """The base's modules: (inputs, outputs) of each Linear, and the names of all others.

    Among those are the routers and experts of a mixture, with (experts, inputs, outputs) of each of their weights.
    """

    linears: Annotated[dict[_Module, _Linear], Field(max_length=MAX_MODULES), BeforeValidator(_few_complaints)]
    others: Annotated[list[_Module], Field(max_length=MAX_MODULES), FailFast()]
    parameters: Annotated[
        dict[_Module, _Parameter], Field(max_length=MAX_MODULES), BeforeValidator(_few_complaints)
    ] = {}

    def record(self) -> Modules:
        linears = {name: Linear(inputs, outputs) for name, (inputs, outputs) in self.linears.items()}
        parameters = {name: Parameter(*sizes) for name, sizes in self.parameters.items()}
        return Modules(linears, frozenset(self.others), parameters=parameters)


class CommitBody(Body):
    """A push ends: everything that was brought becomes the next version, or nothing does."""

    base: BaseBody
    modules: ModulesBody
    aliases: Annotated[list[Text], Field(max_length=64)] = []
    note: Annotated[str, Field(max_length=8192)] = ""


class MoveBody(Body):
    """`expect` is where the alias must be now, 0 meaning nowhere."""

    alias: Text
    version: Version
    expect: Annotated[int, Field(ge=0, le=MAX_SIZE)] | None = None
    note: Annotated[str, Field(max_length=8192)] = ""


class RollbackBody(Body):
    alias: Text
    note: Annotated[str, Field(max_length=8192)] = ""


class KeyBody(Body):
    name: Text
    scopes: Annotated[list[Text], Field(max_length=16)]
    names: Annotated[list[Text], Field(max_length=256)] = ["*"]
    life_s: Annotated[float, Field(gt=0, le=MAX_LIFE_S)] | None = None


def commit_body(base: Base, modules: Modules, *, aliases: list[str], note: str) -> dict[str, Any]:
    """The JSON of a `CommitBody`."""
    listed: dict[str, Any] = {
        "linears": {name: [linear.inputs, linear.outputs] for name, linear in modules.linears.items()},
        "others": sorted(modules.others),
    }
    if modules.parameters:  # a registry of before knows no such field, and needs it for mixtures of experts only
        listed["parameters"] = {
            name: [one.experts, one.inputs, one.outputs] for name, one in modules.parameters.items()
        }
    left_out = {"fingerprint"} | ({"experts"} if base.experts is None else set())
    return {
        "base": base.model_dump(exclude=left_out),
        "modules": listed,
        "aliases": aliases,
        "note": note,
    }


def tell(error: HubError) -> dict[str, Any]:
    """An error as JSON: `code` is its class, in small letters."""
    told: dict[str, Any] = {"code": code_of(type(error)), "message": str(error)}
    if isinstance(error, Refused):
        told["what"] = error.what
        told["problems"] = [{"file": one.file, "field": one.field, "reason": one.reason} for one in error.problems]
    if isinstance(error, UploadBusy):
        told["offset"] = error.offset
    return {"error": told}


def hear(told: Any, *, otherwise: str) -> HubError:
    """The error that was told; HubUnavailable with other words when it makes no sense."""
    error = told.get("error") if isinstance(told, Mapping) else None
    if not isinstance(error, Mapping) or not isinstance(error.get("message"), str):
        return HubUnavailable(otherwise)
    kind = _CLASSES.get(str(error.get("code")), HubUnavailable)
    problems = error.get("problems")
    if kind is Refused and isinstance(problems, list):
        return Refused(str(error.get("what")), [_problem(one) for one in problems if isinstance(one, Mapping)])
    if kind is BadTensors:
        return BadTensors([(None, error["message"])])
    if kind is UploadBusy and isinstance(error.get("offset"), int):
        return UploadBusy(error["message"], offset=error["offset"])
    return kind(error["message"]) if kind in _PLAIN else HubUnavailable(error["message"])


def code_of(kind: type[HubError]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def _problem(told: Mapping[str, Any]) -> Problem:
    field = told.get("field")
    return Problem(str(told.get("file")), None if field is None else str(field), str(told.get("reason")))


_CLASSES: Mapping[str, type[HubError]] = {code_of(kind): kind for kind in HubError.__subclasses__()}
_PLAIN = frozenset(kind for kind in _CLASSES.values() if kind.__init__ is HubError.__init__)
