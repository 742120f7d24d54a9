"""The read routes of the Hugging Face Hub, so that its clients fetch adapters from here with HF_ENDPOINT alone.

A repository is an adapter's name. A revision is an alias, a version, a digest, or the first 40 digits of one, which is
what stands in for a commit; `main`, the clients' default, means `latest` unless an alias has that name.
Source: huggingface_hub 2.4.0, hf_api.py, file_download.py, utils/_http.py (errors by x-error-code).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Path, Query
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hub.contract import LATEST, Adapter, Resolved
from hub.errors import BadReference, BadRequest, NotFound
from hub.http.access import Reader
from hub.http.files import RANGES, file_response
from hub.http.refusal import refuse
from hub.http.strict import StrictRoute
from hub.keys import Principal
from hub.manifest import FileEntry, Manifest
from hub.ref import check_name, parse_reference, printable
from hub.registry import LocalHub

COMMIT_DIGITS = 40
MAIN = "main"
MAX_PATHS = 1000
_COMMIT = re.compile(rf"[0-9a-f]{{{COMMIT_DIGITS}}}")
_POINTER_BYTES = 134  # what git-lfs keeps in place of a file; clients want a number

Space = Annotated[str, Path(max_length=128)]
Slug = Annotated[str, Path(max_length=128)]
Revision = Annotated[str, Path(max_length=128)]
FilePath = Annotated[str, Path(max_length=1024)]


def hugging_face_routes(hub: LocalHub) -> APIRouter:
    """Each route twice: with a namespace and without."""
    routes = APIRouter(route_class=StrictRoute, tags=["hugging face"])
    _add_account(routes)
    _add_listing(routes, hub)
    _add_repository(routes, hub)
    _add_plain(routes, hub)
    return routes


def _add_account(routes: APIRouter) -> None:
    @routes.get("/api/whoami-v2")
    def whoami(asking: Reader) -> dict[str, Any]:
        role = "write" if asking.holds("push") else "read"
        token = {"displayName": asking.name, "role": role}
        return {"type": "user", "name": asking.name, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}


def _add_listing(routes: APIRouter, hub: LocalHub) -> None:
    @routes.get("/api/models")
    def models(
        asking: Reader,
        search: Annotated[str, Query(max_length=128)] = "",
        author: Annotated[str, Query(max_length=128)] = "",
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    ) -> list[dict[str, Any]]:
        """Names that hold a text; other filters of the Hub mean nothing here."""
        found = [one for one in hub.adapters() if asking.sees(one.name) and search.lower() in one.name]
        if author:
            found = [one for one in found if one.name.startswith(f"{author}/")]
        return [_summary(one) for one in found[:limit]]


def _add_repository(routes: APIRouter, hub: LocalHub) -> None:
    """With a namespace; /api/models/a/refs is a repository a/refs if there is one, else the refs of a."""

    @routes.get("/api/models/{space}/{slug}", response_class=Response)
    def info(asking: Reader, space: Space, slug: Slug) -> Response:
        if slug == "refs" and not (asking.sees(f"{space}/{slug}") and hub.adapters(f"{space}/{slug}")):
            return _refs(hub, asking, space)
        return _info(hub, asking, f"{space}/{slug}", MAIN)

    @routes.get("/api/models/{space}/{slug}/refs", response_class=Response)
    def refs(asking: Reader, space: Space, slug: Slug) -> Response:
        return _refs(hub, asking, f"{space}/{slug}")

    @routes.get("/api/models/{space}/{slug}/revision/{revision}", response_class=Response)
    def info_at(asking: Reader, space: Space, slug: Slug, revision: Revision) -> Response:
        return _info(hub, asking, f"{space}/{slug}", revision)

    @routes.get("/api/models/{space}/{slug}/tree/{revision}", response_class=Response)
    def tree(asking: Reader, space: Space, slug: Slug, revision: Revision) -> Response:
        return _tree(hub, asking, f"{space}/{slug}", revision)

    @routes.post("/api/models/{space}/{slug}/paths-info/{revision}", response_class=Response)
    async def paths(asking: Reader, space: Space, slug: Slug, revision: Revision, request: Request) -> Response:
        wanted = _wanted(await request.body())
        return await run_in_threadpool(_tree, hub, asking, f"{space}/{slug}", revision, only=wanted)

    @routes.head("/{space}/{slug}/resolve/{revision}/{path:path}", response_class=Response, openapi_extra=RANGES)
    @routes.get("/{space}/{slug}/resolve/{revision}/{path:path}", response_class=Response, openapi_extra=RANGES)
    def resolve(
        asking: Reader, space: Space, slug: Slug, revision: Revision, path: FilePath, request: Request
    ) -> Response:
        return _file(hub, asking, f"{space}/{slug}", revision, path, request)


def _add_plain(routes: APIRouter, hub: LocalHub) -> None:
    """Without a namespace."""

    @routes.get("/api/models/{slug}", response_class=Response)
    def info(asking: Reader, slug: Slug) -> Response:
        return _info(hub, asking, slug, MAIN)

    @routes.get("/api/models/{slug}/revision/{revision}", response_class=Response)
    def info_at(asking: Reader, slug: Slug, revision: Revision) -> Response:
        return _info(hub, asking, slug, revision)

    @routes.get("/api/models/{slug}/tree/{revision}", response_class=Response)
    def tree(asking: Reader, slug: Slug, revision: Revision) -> Response:
        return _tree(hub, asking, slug, revision)

    @routes.post("/api/models/{slug}/paths-info/{revision}", response_class=Response)
    async def paths(asking: Reader, slug: Slug, revision: Revision, request: Request) -> Response:
        return await run_in_threadpool(_tree, hub, asking, slug, revision, only=_wanted(await request.body()))

    @routes.head("/{slug}/resolve/{revision}/{path:path}", response_class=Response, openapi_extra=RANGES)
    @routes.get("/{slug}/resolve/{revision}/{path:path}", response_class=Response, openapi_extra=RANGES)
    def resolve(asking: Reader, slug: Slug, revision: Revision, path: FilePath, request: Request) -> Response:
        return _file(hub, asking, slug, revision, path, request)


class _Missing(NotFound):
    """`code` is what Hugging Face's clients know it by."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def _adapter(hub: LocalHub, asking: Principal, name: str) -> Adapter:
    try:
        found = hub.adapters(check_name(name)) if asking.sees(name) else []
    except BadReference as error:
        raise _Missing(str(error), "RepoNotFound") from error
    if not found:
        raise _Missing(f"there is no adapter {printable(name)}", "RepoNotFound")
    return found[0]


def _at(hub: LocalHub, asking: Principal, name: str, revision: str) -> tuple[Adapter, Resolved]:
    adapter = _adapter(hub, asking, name)
    selector = f"sha256:{revision}" if _COMMIT.fullmatch(revision) else revision
    if selector == MAIN and MAIN not in adapter.aliases:
        selector = LATEST
    try:
        return adapter, hub.resolve(parse_reference(f"{name}@{selector}"))
    except (NotFound, BadReference) as error:
        raise _Missing(str(error), "RevisionNotFound") from error


def _info(hub: LocalHub, asking: Principal, name: str, revision: str) -> Response:
    try:
        adapter, resolved = _at(hub, asking, name, revision)
    except _Missing as error:
        return _refuse(error)
    version = next(one for one in adapter.versions if one.version == resolved.version)
    manifest = hub.manifest(resolved.digest)
    siblings = [
        {"rfilename": entry.path, "size": entry.size, "blobId": entry.sha256, "lfs": _lfs(entry, "sha256")}
        for entry in manifest.files
    ]
    about = {
        "sha": _commit(resolved.digest),
        "lastModified": _moment(version.at),
        "siblings": siblings,
        "cardData": {"base_model": manifest.base.name, "library_name": "peft"},
        "usedStorage": sum(entry.size for entry in manifest.files),
    }
    return JSONResponse(_summary(adapter) | about)


def _tree(
    hub: LocalHub, asking: Principal, name: str, revision: str, *, only: frozenset[str] | None = None
) -> Response:
    try:
        _, resolved = _at(hub, asking, name, revision)
    except _Missing as error:
        return _refuse(error)
    files = [entry for entry in hub.manifest(resolved.digest).files if only is None or entry.path in only]
    rows = [
        {"type": "file", "oid": entry.sha256, "size": entry.size, "path": entry.path, "lfs": _lfs(entry, "oid")}
        for entry in files
    ]
    return JSONResponse(rows)


def _wanted(form: bytes) -> frozenset[str]:
    """The field `paths` of an HTML form, which is what clients send here."""
    try:
        return frozenset(parse_qs(form.decode("utf-8", "replace"), max_num_fields=MAX_PATHS).get("paths", []))
    except ValueError as error:
        raise BadRequest(f"a form of more than {MAX_PATHS} fields") from error


def _refs(hub: LocalHub, asking: Principal, name: str) -> Response:
    try:
        adapter = _adapter(hub, asking, name)
    except _Missing as error:
        return _refuse(error)
    digests = {one.version: one.digest for one in adapter.versions}
    branches = {MAIN: adapter.aliases[LATEST], **adapter.aliases} if LATEST in adapter.aliases else adapter.aliases
    return JSONResponse(
        {
            "branches": [_ref("heads", alias, digests[version]) for alias, version in branches.items()],
            "tags": [_ref("tags", str(version), digest) for version, digest in digests.items()],
            "converts": [],
        }
    )


def _file(hub: LocalHub, asking: Principal, name: str, revision: str, path: str, request: Request) -> Response:
    try:
        _, resolved = _at(hub, asking, name, revision)
    except _Missing as error:
        return _refuse(error)
    manifest: Manifest = hub.manifest(resolved.digest)
    entry = manifest.file(path)
    if entry is None:
        message = f"{name}@{resolved.version} has no file {printable(path)}"
        return _refuse(_Missing(message, "EntryNotFound"), {"x-repo-commit": _commit(resolved.digest)})
    headers = {
        "x-repo-commit": _commit(resolved.digest),
        "x-linked-etag": f'"{entry.sha256}"',
        "x-linked-size": str(entry.size),
        "content-disposition": f'inline; filename="{entry.path}"',
    }
    return file_response(hub, manifest, path, request, headers=headers)


def _refuse(error: _Missing, headers: Mapping[str, str] | None = None) -> Response:
    answer = refuse(NotFound(str(error)), hugging_face=error.code)
    answer.headers.update(headers or {})
    return answer


def _summary(adapter: Adapter) -> dict[str, Any]:
    newest = adapter.versions[-1]
    return {
        "id": adapter.name,
        "modelId": adapter.name,
        "author": adapter.name.rpartition("/")[0] or None,
        "sha": _commit(newest.digest),
        "lastModified": _moment(newest.at),
        "createdAt": _moment(adapter.versions[0].at),
        "private": True,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["peft", newest.kind, f"base_model:{newest.base}", f"base_model:adapter:{newest.base}"],
    }


def _ref(kind: str, name: str, digest: str) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": _commit(digest)}


def _lfs(entry: FileEntry, key: str) -> dict[str, Any]:
    return {key: entry.sha256, "size": entry.size, "pointerSize": _POINTER_BYTES}


def _moment(at: datetime) -> str:
    """The one form of a time that clients read."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _commit(digest: str) -> str:
    return digest.removeprefix("sha256:")[:COMMIT_DIGITS]
