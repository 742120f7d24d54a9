"""/api/v1: adapters, versions, aliases, files and keys. Each route says which scope it takes.

Names stand at the end of a path or in the body, and are checked against the grammar before anything is looked up;
nothing of a request becomes a path on the disk.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import Response

from hub.contract import Adapter, Collected, Event, Resolved
from hub.errors import NotFound
from hub.http.access import (
    Admin,
    Promoter,
    Reader,
    own,
    seen,
    seen_adapters,
    seen_digest,
    seen_events,
    unbounded,
)
from hub.http.files import RANGES, file_response
from hub.http.strict import StrictRoute
from hub.keys import Created, Key, Principal
from hub.ref import parse_reference
from hub.registry import LocalHub
from hub.wire import API, MAX_NUMBER, MAX_SIZE, History, KeyBody, MoveBody, RollbackBody

EVENTS_AT_ONCE = 1000

Name = Annotated[str, Path(max_length=256, description="[namespace/]slug")]
Digest = Annotated[str, Path(max_length=80, description="sha256: and 64 hex digits")]
Ref = Annotated[str, Query(max_length=4096, description="NAME, NAME@VERSION, NAME@ALIAS or NAME@sha256:...")]


def api_routes(hub: LocalHub) -> APIRouter:
    """Everything but uploads and the event stream."""
    routes = APIRouter(prefix=API, route_class=StrictRoute)
    _add_reading(routes, hub)
    _add_moving(routes, hub)
    _add_keeping(routes, hub)
    return routes


def _add_reading(routes: APIRouter, hub: LocalHub) -> None:
    @routes.get("/whoami")
    def whoami(asking: Reader) -> Principal:
        return asking

    @routes.get("/adapters")
    def adapters(
        asking: Reader, pattern: Annotated[str | None, Query(max_length=256, description="* and ? fit anything")] = None
    ) -> list[Adapter]:
        return seen_adapters(asking, hub.adapters(pattern))

    @routes.get("/adapters/{name:path}")
    def adapter(asking: Reader, name: Name) -> Adapter:
        found = hub.adapters(seen(asking, name))
        if not found:
            raise NotFound(f"there is no adapter {name}")
        return found[0]

    @routes.get("/resolve")
    def resolve(asking: Reader, ref: Ref, default_alias: Annotated[str, Query(max_length=96)] = "latest") -> Resolved:
        reference = parse_reference(ref)
        seen(asking, reference.name)
        return hub.resolve(reference, default_alias=default_alias)

    @routes.get("/log/{name:path}")
    def log(asking: Reader, name: Name) -> list[Event]:
        return hub.log(seen(asking, name))

    @routes.get("/head")
    def head(asking: Reader) -> int:
        return hub.head()

    @routes.get("/history")
    def history(asking: Reader, after: Annotated[int, Query(ge=0, le=MAX_NUMBER)]) -> History:
        """At most a thousand events with a larger number, in order; ask again after `upto` until it stays."""
        found = hub.events(after, limit=EVENTS_AT_ONCE)
        return History(seen_events(asking, found), found[-1].seq if found else after)

    @routes.get("/manifests/{digest}", response_class=Response)
    def manifest(asking: Reader, digest: Digest) -> Response:
        """The canonical JSON, of which the digest follows."""
        found = hub.manifest(seen_digest(asking, hub, digest))
        return Response(found.model_dump_json(), media_type="application/json")

    @routes.get("/files/{digest}/{path}", response_class=Response, openapi_extra=RANGES)
    def file(asking: Reader, digest: Digest, path: Annotated[str, Path(max_length=128)], request: Request) -> Response:
        """One file of an adapter; `Range: bytes=N-` goes on from byte N."""
        return file_response(hub, hub.manifest(seen_digest(asking, hub, digest)), path, request)


def _add_moving(routes: APIRouter, hub: LocalHub) -> None:
    @routes.post("/aliases/{name:path}")
    def move_alias(asking: Promoter, name: Name, body: MoveBody) -> Event | None:
        """Compare-and-set; null when the alias points there already."""
        return hub.move_alias(
            own(asking, name), body.version, body.alias, expect=body.expect, note=body.note, actor=asking.name
        )

    @routes.post("/rollbacks/{name:path}")
    def rollback(asking: Promoter, name: Name, body: RollbackBody) -> Event:
        return hub.rollback(own(asking, name), body.alias, note=body.note, actor=asking.name)

    @routes.delete("/versions/{name:path}")
    def remove(
        asking: Admin,
        name: Name,
        version: Annotated[int, Query(ge=1, le=MAX_SIZE)],
        note: Annotated[str, Query(max_length=8192)] = "",
    ) -> Event:
        return hub.remove(own(asking, name), version, note=note, actor=asking.name, sees=asking.sees)


def _add_keeping(routes: APIRouter, hub: LocalHub) -> None:
    @routes.post("/collect")
    def collect(asking: Admin) -> Collected:
        unbounded(asking)
        return hub.collect()

    @routes.get("/keys")
    def keys(asking: Admin) -> list[Key]:
        unbounded(asking)
        return hub.keys.listed()

    @routes.post("/keys", status_code=201)
    def create_key(asking: Admin, body: KeyBody) -> Created:
        """The only answer that ever holds the key itself."""
        unbounded(asking)
        return hub.keys.create(body.name, body.scopes, names=body.names, life_s=body.life_s, actor=asking.name)

    @routes.delete("/keys/{key}")
    def revoke_key(asking: Admin, key: Annotated[str, Path(max_length=64)]) -> Key:
        unbounded(asking)
        return hub.keys.revoke(key)
