"""GET /v1/models: the base, `auto` and every name of the hub that can be asked for.

In OpenAI's shape, with vLLM's additions. `auto` stands there while there is an adapter that it could choose.
"""

from __future__ import annotations

from typing import Any

from server.api.choose import ROUTED
from server.api.service import Service
from server.contract import Servable
from server.errors import ModelNotFound
from server.records import UNKNOWN_MODEL


async def list_models(service: Service) -> dict[str, Any]:
    adapters = await service.adapters.servable()
    routed = [_routed(service)] if await service.adapters.routable() else []
    lines = [_base(service), *routed, *(_adapter(service, servable) for servable in adapters)]
    return {"object": "list", "data": lines}


async def find_model(service: Service, model: str) -> dict[str, Any]:
    """Raises: ModelNotFound."""
    if model in service.base_names:
        return _base(service) | {"id": model}
    if model == ROUTED and ROUTED not in service.adapters.given_names() and await service.adapters.routable():
        return _routed(service)
    servable = await service.adapters.known(model)
    if servable is None and model.startswith(service.base_id + ":"):
        servable = await service.adapters.known(model.removeprefix(service.base_id + ":"))
    if servable is None:
        raise ModelNotFound(UNKNOWN_MODEL.format(model[:200]), param="model")
    return _adapter(service, servable)


def _base(service: Service) -> dict[str, Any]:
    return {
        "id": service.base_id,
        "object": "model",
        "created": service.info.started,
        "owned_by": "multigraft",
        "root": service.base_id,
        "parent": None,
        "max_model_len": service.engine.max_model_len,
    }


def _routed(service: Service) -> dict[str, Any]:
    """Only while there is something to choose from."""
    return _base(service) | {"id": ROUTED, "parent": service.base_id}


def _adapter(service: Service, servable: Servable) -> dict[str, Any]:
    return {
        "id": servable.id,
        "object": "model",
        "created": servable.created,
        "owned_by": "multigraft",
        "root": servable.digest,
        "parent": service.base_id,
        "max_model_len": service.engine.max_model_len,
        "version": servable.version,
        "digest": servable.digest,
        "kind": servable.kind,
    }
