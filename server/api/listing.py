"""GET /v1/models: the base and every name of the hub that can be asked for, in OpenAI's shape with vLLM's additions."""

from __future__ import annotations

from typing import Any

from server.api.service import Service
from server.contract import Servable
from server.errors import ModelNotFound
from server.records import UNKNOWN_MODEL


async def list_models(service: Service) -> dict[str, Any]:
    adapters = await service.adapters.servable()
    return {"object": "list", "data": [_base(service), *(_adapter(service, servable) for servable in adapters)]}


async def find_model(service: Service, model: str) -> dict[str, Any]:
    """Raises: ModelNotFound."""
    if model in service.base_names:
        return _base(service) | {"id": model}
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
