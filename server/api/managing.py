"""What is resident, and changing it by hand: vLLM's load and unload, and ours. Changing needs the admin key."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from server.api.body import check, read_body
from server.api.choose import refuse_path
from server.api.requests import LoadBody, ReferenceBody, UnloadBody
from server.api.service import Service
from server.contract import AdapterStatus
from server.errors import InvalidValue

M = TypeVar("M", bound=BaseModel)


def list_adapters(service: Service) -> dict[str, Any]:
    return {"object": "list", "data": [_status(status) for status in service.adapters.resident()]}


async def load(service: Service, request: Request, loaded: set[str]) -> PlainTextResponse:
    """`loaded`: the names loaded by hand so far. A second load of one is refused, as vLLM's clients expect.

    Raises: BadRequest, ModelNotFound, AdapterUnavailable.
    """
    body = await _read(LoadBody, service, request)
    name = body.lora_name
    refuse_path(body.lora_path, param="lora_path")
    if name in service.base_names:
        raise InvalidValue(f"lora_name {name!r} is the name of the base", param="lora_name")
    if name in loaded and not body.load_inplace:
        raise InvalidValue(f"{name!r} is already loaded; to replace it send load_inplace=true", param="lora_name")
    await service.adapters.load(name, body.lora_path)
    loaded.add(name)
    if body.pinned:
        await service.adapters.pin(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload(service: Service, request: Request, loaded: set[str]) -> PlainTextResponse:
    """Raises: BadRequest, ModelNotFound."""
    name = (await _read(UnloadBody, service, request)).lora_name
    await service.adapters.unload(name)
    loaded.discard(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def pin(service: Service, request: Request) -> dict[str, Any]:
    return _status(await service.adapters.pin(await _reference(service, request)))


async def warm(service: Service, request: Request) -> dict[str, Any]:
    return _status(await service.adapters.warm(await _reference(service, request)))


async def evict(service: Service, request: Request) -> dict[str, Any]:
    return _status(await service.adapters.evict(await _reference(service, request)))


async def _reference(service: Service, request: Request) -> str:
    return (await _read(ReferenceBody, service, request)).ref


async def _read(model: type[M], service: Service, request: Request) -> M:
    data = await read_body(request, limit=service.config.max_body_bytes)
    return check(model, data, lenient=service.config.lenient).body


def _status(status: AdapterStatus) -> dict[str, Any]:
    return dataclasses.asdict(status)
