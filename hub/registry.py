"""LocalHub: a hub in one folder of this machine. The order blobs > manifest > version > alias lives here alone.

A push leases the blobs it will need, stores them, and then commits manifest, version and aliases in one transaction. So
a kill at any instant leaves either no trace in the catalogue or all of it, and a collection running beside a push takes
nothing that the push has stored. What a killed push stored is freed once its lease has run out.

Imports inside functions: what only reads the catalogue must not wait for pydantic and the rest of validation.
"""

from __future__ import annotations

import getpass
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import platformdirs

from hub.blobs import BlobStore, DirectoryBlobs, open_blob
from hub.catalog import By, Catalogue, LeaseLost, OtherBase, PinLost
from hub.contract import (
    LATEST,
    Adapter,
    Collected,
    Difference,
    Event,
    Pushed,
    Resolved,
    Verified,
)
from hub.digest import check_digest
from hub.errors import BadReference, Corrupt, HubUnavailable, LogLost, NotFound, Problem, Refused, UploadGone
from hub.keys import Keys
from hub.ref import Reference, check_alias, check_name, printable
from hub.schema import open_database
from hub.uploads import Uploads

if TYPE_CHECKING:
    from hub.base import Base, Modules
    from hub.manifest import FileEntry, Manifest
    from hub.methods import Limits
    from hub.pins import Pin

HOME_VARIABLE = "MULTIGRAFT_HOME"
LEASE_S = 3600.0
WATCH_S = 0.1  # between two looks at a log that has nothing new
GLANCE_S = 0.02  # between two looks at whether its files have changed
CATALOGUE_FILES = ("catalogue.sqlite", "catalogue.sqlite-wal")
MAX_NOTE = 2000
_TRIES = 3


# Which names whoever asks may know of.
Sees = Callable[[str], bool]


def everything(name: str) -> bool:
    """Nobody is kept from anything in a hub of this machine."""
    return True


def default_home() -> Path:
    """$MULTIGRAFT_HOME, or the platform's folder for user data."""
    named = os.environ.get(HOME_VARIABLE)
    return Path(named).expanduser() if named else platformdirs.user_data_path("multigraft", appauthor=False)


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
        engine = open_database(home / CATALOGUE_FILES[0])
        self._catalogue = Catalogue(engine, clock=clock)
        self.keys = Keys(engine, clock=clock)
        self.uploads = Uploads(engine, self._blobs, home / "uploads", lease_s=lease_s, clock=clock, limits=limits)

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
        from hub.validate import validate

        by = _by(actor, note)
        manifest = validate(folder, base=base, limits=self._limits)
        self._check_pins(manifest, printable(folder.name), sees=everything)
        for _ in range(_TRIES):
            try:
                return self._store(folder, manifest, name=name, moved=aliases, by=by)
            except LeaseLost:
                continue
        raise HubUnavailable(f"the push took longer than its lease of {self._lease_s:g} s, {_TRIES} times")

    def commit_upload(
        self,
        upload: str,
        *,
        owner: str,
        base: Base,
        modules: Modules,
        aliases: Sequence[str] = (),
        note: str = "",
        actor: str | None = None,
        sees: Sees = everything,
    ) -> Pushed:
        """What `push` does, for files that came by an upload, on a base that its sender describes.

        Adapters under names that the sender may not see cannot be pinned: to it they do not exist.
        Raises: UploadGone, BadUpload, Refused, BadReference.
        """
        from hub.validate import validate_kept

        for alias in aliases:
            check_alias(alias)
        by = _by(actor, note)
        name, parts = self.uploads.parts(upload, owner=owner)
        stored = {part.path: part for part in parts}

        def opened(path: str) -> tuple[BinaryIO, int]:
            return open_blob(self._blobs, stored[path].sha256), stored[path].size

        sizes = {part.path: part.size for part in parts}
        try:
            manifest = validate_kept(name, sizes, opened, base=base, modules=modules, limits=self._limits)
            if {(entry.path, entry.sha256) for entry in manifest.files} != {(part.path, part.sha256) for part in parts}:
                problem = Problem("adapter_config.json", None, "was not sent in its canonical form")
                raise Refused(name, [problem])
            self._check_pins(manifest, name, sees=sees)
            pushed = self._commit(upload, manifest, name=name, moved=aliases, by=by)
        except Refused:
            self.uploads.end(upload)  # nothing else can come of it: the next collection frees what it brought
            raise
        except Corrupt as error:
            self.uploads.discard_damaged(parts)
            raise UploadGone(f"a file of this push was damaged on the hub's disk ({error}); run it again") from error
        except LeaseLost as error:
            raise UploadGone(f"upload {upload} has expired; run the same command again") from error
        self.uploads.end(upload)
        return pushed

    def resolve(self, reference: Reference, *, default_alias: str = LATEST) -> Resolved:
        return self._catalogue.resolve(reference, default_alias=default_alias)

    def manifest(self, digest: str) -> Manifest:
        from hub.manifest import parse_manifest

        return parse_manifest(self._catalogue.manifest_text(check_digest(digest)), digest)

    def read(self, digest: str, path: str) -> bytes:
        return b"".join(self.stream(digest, path))

    def stream(self, digest: str, path: str) -> Iterator[bytes]:
        entry = self.manifest(digest).file(path)
        if entry is None:
            raise NotFound(f"adapter {digest} has no file {printable(path)}")
        return self._blobs.stream(entry.sha256)

    def load(self, digest: str, entry: FileEntry) -> memoryview:
        return self._blobs.load(entry.sha256, entry.size)

    def at_hand(self, entry: FileEntry) -> bool:
        return True

    def pull(self, reference: Reference, folder: Path) -> Resolved:
        from hub.folder import pull_folder

        resolved = self.resolve(reference)
        pull_folder(folder, self.manifest(resolved.digest), self._stream, what=str(reference))
        return resolved

    def verify(self, reference: Reference) -> Verified:
        from hub.compare import verify_files

        resolved = self.resolve(reference)
        return verify_files(resolved, self.manifest(resolved.digest), self._stream)

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

    def remove(
        self, name: str, version: int, *, actor: str | None = None, note: str = "", sees: Sees = everything
    ) -> Event:
        return self._catalogue.remove(check_name(name), version, by=_by(actor, note), sees=sees)

    def collect(self) -> Collected:
        count, total = self._catalogue.collect(self._blobs.stored(), self._blobs.delete)
        self.uploads.sweep()
        self._blobs.sweep(self._clock() - self._lease_s)
        return Collected(count, total)

    def adapters(self, pattern: str | None = None) -> list[Adapter]:
        return self._catalogue.adapters(pattern)

    def names_of(self, digest: str) -> list[str]:
        """Every name under which a digest can be asked for now."""
        return self._catalogue.names_of(check_digest(digest))

    def counts(self) -> tuple[int, int]:
        """How many names and versions there are."""
        return self._catalogue.counts()

    def stored_bytes(self) -> int:
        """Bytes of all blobs."""
        return sum(size for _, size in self._blobs.stored())

    def log(self, name: str) -> list[Event]:
        return self._catalogue.log(check_name(name))

    def diff(self, before: Reference, after: Reference) -> Difference:
        from hub.compare import difference

        first, second = self.resolve(before), self.resolve(after)
        return difference(first, self.manifest(first.digest), second, self.manifest(second.digest))

    def head(self) -> int:
        return self._catalogue.head()

    def events(self, after: int, *, limit: int | None = None) -> list[Event]:
        return self._catalogue.events(after, limit=limit)

    def watch(self, after: int) -> Iterator[list[Event]]:
        if after > (head := self.head()):
            raise LogLost(f"event {after} is beyond the last one of this hub, {head}")
        while True:
            found = self.events(after)
            yield found
            if found:
                after = found[-1].seq
            else:
                self._wait()

    def _wait(self) -> None:
        """Short while the catalogue's files have just been written to, for a commit is seen some time after that."""
        until = time.monotonic() + WATCH_S
        while time.monotonic() < until:
            time.sleep(GLANCE_S)
            if time.time() - self._written_at() < WATCH_S:
                return

    def _written_at(self) -> float:
        """When the catalogue was last written to; a look at that costs far less than a question to it."""
        latest = 0.0
        for name in CATALOGUE_FILES:
            with suppress(FileNotFoundError):  # what is not written back yet comes and goes with who is connected
                latest = max(latest, (self.home / name).stat().st_mtime)
        return latest

    def _store(self, folder: Path, manifest: Manifest, *, name: str, moved: Sequence[str], by: By) -> Pushed:
        lease = uuid.uuid4().hex
        self._catalogue.lease(lease, {entry.sha256 for entry in manifest.files}, lease_s=self._lease_s)
        with ExitStack() as undo:
            undo.callback(self._catalogue.release, lease)
            for entry in manifest.files:
                self._put(folder, manifest, entry=entry)
            pushed = self._commit(lease, manifest, name=name, moved=moved, by=by)
            undo.pop_all()  # the commit has ended the lease
            return pushed

    def _put(self, folder: Path, manifest: Manifest, *, entry: FileEntry) -> None:
        from hub.validate import open_kept

        try:
            with open_kept(folder, manifest, entry=entry) as source:
                self._blobs.put(source, entry.sha256)
        except Corrupt as error:
            raise Refused(folder.name, [Problem(entry.path, None, "changed while it was being pushed")]) from error
        except OSError as error:
            raise HubUnavailable(f"{entry.path} could not be stored: {error.strerror}") from error

    def _check_pins(self, manifest: Manifest, what: str, *, sees: Sees) -> None:
        """Raises: Refused with every adapter that cannot be pinned."""
        from hub.pins import PINNING_FIELD, pins_of

        reasons = [(pin, self._why_not_pinned(pin, manifest, sees=sees)) for pin in pins_of(manifest.config)]
        problems = [
            Problem("adapter_config.json", PINNING_FIELD, f"{pin} {reason}") for pin, reason in reasons if reason
        ]
        if problems:
            raise Refused(what, problems)

    def _why_not_pinned(self, pin: Pin, router: Manifest, *, sees: Sees) -> str | None:
        from hub.pins import why_no_expert

        try:
            if not sees(pin.name):
                raise NotFound(f"there is no adapter {pin.name}")
            found = self.resolve(Reference(pin.name, pin.digest))
        except NotFound as error:
            return f"is not in this hub ({error}); push that expert first"
        return why_no_expert(self.manifest(found.digest), router)

    def _commit(self, lease: str, manifest: Manifest, *, name: str, moved: Sequence[str], by: By) -> Pushed:
        from hub.pins import PINNING_FIELD, pins_of

        try:
            pinned = pins_of(manifest.config)
            return self._catalogue.commit(lease, manifest, name=name, moved=moved, pinned=pinned, by=by)
        except OtherBase as error:
            problem = Problem("adapter_config.json", "base_model_name_or_path", str(error))
            raise Refused(name, [problem]) from error
        except PinLost as error:
            raise Refused(name, [Problem("adapter_config.json", PINNING_FIELD, str(error))]) from error

    def _stream(self, entry: FileEntry) -> Iterator[bytes]:
        return self._blobs.stream(entry.sha256)


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
