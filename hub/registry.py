"""LocalHub: a hub in one folder of this machine. The order blobs > manifest > version > alias lives here alone.

A push leases the blobs it will need, stores them, and then commits manifest, version and aliases in one transaction. So
a kill at any instant leaves either no trace in the catalogue or all of it, and a collection running beside a push takes
nothing that the push has stored. What a killed push stored is freed once its lease has run out.

Imports inside functions: what only reads the catalogue must not wait for pydantic and the rest of validation.
"""

from __future__ import annotations

import fnmatch
import getpass
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from hub.blobs import BlobStore, DirectoryBlobs, flush_folder, read_blob
from hub.catalog import By, Catalogue, LeaseLost, OtherBase
from hub.contract import (
    LATEST,
    Adapter,
    Change,
    Collected,
    Difference,
    Event,
    Pushed,
    Resolved,
    Verified,
)
from hub.digest import check_digest
from hub.errors import (
    BadReference,
    Corrupt,
    HubUnavailable,
    NotFound,
    Problem,
    Refused,
    RemoteUnsupported,
    WouldOverwrite,
)
from hub.ref import Reference, check_alias, check_name, printable
from hub.schema import open_database

if TYPE_CHECKING:
    from hub.manifest import FileEntry, Manifest
    from hub.methods import Limits

HOME_VARIABLE = "MULTIGRAFT_HOME"
URL_VARIABLE = "HUB_URL"
LEASE_S = 3600.0
MAX_NOTE = 2000
_TRIES = 3


def default_home() -> Path:
    """$MULTIGRAFT_HOME, or the platform's folder for user data."""
    named = os.environ.get(HOME_VARIABLE)
    return Path(named).expanduser() if named else platformdirs.user_data_path("multigraft", appauthor=False)


def open_hub(home: Path | None = None) -> LocalHub:
    """The hub that the environment names: a local one.

    Raises: RemoteUnsupported when $HUB_URL is set, HubUnavailable.
    """
    if home is None and (url := os.environ.get(URL_VARIABLE)):
        refuse_remote(url)
    return LocalHub(home if home is not None else default_home())


def refuse_remote(url: str) -> None:
    """Raises: RemoteUnsupported."""
    raise RemoteUnsupported(
        f"remote hubs are not supported by this version: {printable(url)}; unset {URL_VARIABLE} to use the local hub"
    )


class LocalHub:
    """The Hub protocol over a directory of blobs and a SQLite catalogue. Units: lease and clock in seconds."""

    def __init__(
        self,
        home: Path,
        *,
        limits: Limits | None = None,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.time,
        blobs: BlobStore | None = None,
    ) -> None:
        self.home = home
        self._limits = limits
        self._lease_s = lease_s
        self._clock = clock
        try:
            home.mkdir(parents=True, exist_ok=True)
            self._blobs = DirectoryBlobs(home / "blobs") if blobs is None else blobs
        except OSError as error:
            raise HubUnavailable(f"the hub's home {printable(str(home))} is not usable: {error.strerror}") from error
        self._catalogue = Catalogue(open_database(home / "catalogue.sqlite"), clock=clock)

    def push(
        self,
        folder: Path,
        name: str,
        *,
        aliases: Sequence[str] = (),
        note: str = "",
        base: Path | None = None,
        actor: str | None = None,
    ) -> Pushed:
        check_name(name)
        for alias in aliases:
            check_alias(alias)
        from hub.manifest import CONFIG_FILE
        from hub.validate import validate

        by = _by(actor, note)
        manifest = validate(folder, base=base, limits=self._limits)
        for _ in range(_TRIES):
            try:
                return self._store(folder, manifest, name=name, moved=aliases, by=by)
            except LeaseLost:
                continue
            except OtherBase as error:
                problem = Problem(CONFIG_FILE, "base_model_name_or_path", str(error))
                raise Refused(printable(folder.name), [problem]) from error
        raise HubUnavailable(f"the push took longer than its lease of {self._lease_s:g} s, {_TRIES} times")

    def resolve(self, reference: Reference, *, default_alias: str = LATEST) -> Resolved:
        return self._catalogue.resolve(reference, default_alias=default_alias)

    def manifest(self, digest: str) -> Manifest:
        from hub.manifest import parse_manifest

        return parse_manifest(self._catalogue.manifest_text(check_digest(digest)), digest)

    def read(self, digest: str, path: str) -> bytes:
        entry = self.manifest(digest).file(path)
        if entry is None:
            raise NotFound(f"adapter {digest} has no file {printable(path)}")
        return read_blob(self._blobs, entry.sha256)

    def pull(self, reference: Reference, folder: Path) -> Resolved:
        from hub.folder import holds, write_folder

        resolved = self.resolve(reference)
        manifest = self.manifest(resolved.digest)
        target = folder.absolute()
        if holds(target, manifest):
            return resolved
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise WouldOverwrite(f"{printable(str(folder))} is there and holds something else than {reference}")
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_folder(aside, manifest, self._blobs)
            aside.rename(target)
            flush_folder(target.parent)
        except OSError as error:
            raise HubUnavailable(f"{printable(str(folder))} cannot be written: {error.strerror}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return resolved

    def verify(self, reference: Reference) -> Verified:
        resolved = self.resolve(reference)
        manifest = self.manifest(resolved.digest)
        damaged = [reason for entry in manifest.files if (reason := self._damage(entry)) is not None]
        if damaged:
            raise Corrupt(f"{resolved.name}@{resolved.version} is damaged: {'; '.join(damaged)}")
        total = sum(entry.size for entry in manifest.files)
        return Verified(resolved.name, resolved.version, resolved.digest, len(manifest.files), total)

    def move_alias(
        self,
        name: str,
        version: int,
        alias: str,
        *,
        expect: int | None = None,
        actor: str | None = None,
        note: str = "",
    ) -> Event | None:
        by = _by(actor, note)
        return self._catalogue.move_alias(check_name(name), check_alias(alias), version=version, expect=expect, by=by)

    def rollback(self, name: str, alias: str, *, actor: str | None = None, note: str = "") -> Event:
        by = _by(actor, note)
        return self._catalogue.rollback(check_name(name), check_alias(alias), by=by)

    def remove(self, name: str, version: int, *, actor: str | None = None, note: str = "") -> Event:
        return self._catalogue.remove(check_name(name), version, by=_by(actor, note))

    def collect(self) -> Collected:
        count, total = self._catalogue.collect(self._blobs.stored(), self._blobs.delete)
        self._blobs.sweep(self._clock() - self._lease_s)
        return Collected(count, total)

    def adapters(self, pattern: str | None = None) -> list[Adapter]:
        found = self._catalogue.adapters()
        return [item for item in found if pattern is None or fnmatch.fnmatchcase(item.name, pattern)]

    def log(self, name: str) -> list[Event]:
        return self._catalogue.log(check_name(name))

    def diff(self, before: Reference, after: Reference) -> Difference:
        first, second = self.resolve(before), self.resolve(after)
        old, new = _facts(self.manifest(first.digest)), _facts(self.manifest(second.digest))
        changes = [
            Change(field, old.get(field), new.get(field))
            for field in sorted(old.keys() | new.keys())
            if old.get(field) != new.get(field)
        ]
        return Difference(first, second, tuple(changes))

    def head(self) -> int:
        return self._catalogue.head()

    def events(self, after: int) -> list[Event]:
        return self._catalogue.events(after)

    def _store(self, folder: Path, manifest: Manifest, *, name: str, moved: Sequence[str], by: By) -> Pushed:
        lease = uuid.uuid4().hex
        self._catalogue.lease(lease, {entry.sha256 for entry in manifest.files}, lease_s=self._lease_s)
        try:
            for entry in manifest.files:
                self._put(folder, manifest, entry=entry)
            return self._catalogue.commit(lease, manifest, name=name, moved=moved, by=by)
        except BaseException:
            self._catalogue.release(lease)
            raise

    def _put(self, folder: Path, manifest: Manifest, *, entry: FileEntry) -> None:
        from hub.validate import open_kept

        try:
            with open_kept(folder, manifest, entry=entry) as source:
                self._blobs.put(source, entry.sha256)
        except Corrupt as error:
            raise Refused(folder.name, [Problem(entry.path, None, "changed while it was being pushed")]) from error
        except OSError as error:
            raise HubUnavailable(f"{entry.path} could not be stored: {error.strerror}") from error

    def _damage(self, entry: FileEntry) -> str | None:
        size = 0
        try:
            for chunk in self._blobs.stream(entry.sha256):
                size += len(chunk)
        except (NotFound, Corrupt) as error:
            return f"{entry.path}: {error}"
        return None if size == entry.size else f"{entry.path}: has {size} bytes, the manifest says {entry.size}"


def _by(actor: str | None, note: str) -> By:
    if len(note) > MAX_NOTE:
        raise BadReference(f"a note of {len(note)} characters is above the limit of {MAX_NOTE}")
    return By(actor or system_user(), note)


def system_user() -> str:
    """Who the operating system says is asking."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user database
        return f"uid-{os.getuid()}"


def _facts(manifest: Manifest) -> dict[str, Any]:
    """A manifest as flat fields; files by their digest, so that a change of content is a change."""
    whole = manifest.model_dump(mode="json", exclude={"files", "digest", "schema_version"})
    files = {f"files.{entry.path}": f"sha256:{entry.sha256} ({entry.size} bytes)" for entry in manifest.files}
    return {**dict(_flat(whole, "")), **files}


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
