"""Uploads that can be resumed: the pieces of a push on their way into the blob store.

A push says first which files it will bring, by size and sha256; it is told which are missing and how far each has come.
A piece grows in a file of its own, which belongs to the key that sends it and outlives both processes, so the same push
run again goes on where it stopped. A piece whose bytes are not what was said is thrown away whole.
Law: nothing enters the blob store but bytes that hash to their name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from hub.blobs import BlobStore
from hub.digest import check_sha256, sha256_of_stream
from hub.errors import BadUpload, Corrupt, HubUnavailable, NotFound, Problem, Refused, TooLarge, UploadBusy, UploadGone
from hub.ref import check_name, printable
from hub.schema import leases, reading, uploads, writing

if TYPE_CHECKING:
    from hub.methods import Limits

MAX_PARTS = 16
PIECE_LIFE_S = 24 * 3600.0
_OWNER = re.compile(r"[a-z0-9-]{1,32}")
_UPLOAD = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Part:
    """One file that a push brings. Units: size in bytes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Missing:
    """A piece that the hub has not got whole. Units: bytes; `offset` is where to go on."""

    sha256: str
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Upload:
    """A push that has begun."""

    upload: str
    missing: tuple[Missing, ...]


class Uploads:
    """Units: lease and clock in seconds."""

    def __init__(
        self,
        engine: Engine,
        blobs: BlobStore,
        folder: Path,
        *,
        lease_s: float,
        clock: Callable[[], float],
        limits: Limits | None = None,
    ) -> None:
        self._engine = engine
        self._blobs = blobs
        self._folder = folder
        self._lease_s = lease_s
        self._clock = clock
        self._limits = limits

    def begin(self, name: str, parts: Sequence[Part], *, owner: str) -> Upload:
        """Raises: BadReference, BadUpload, TooLarge, Refused, HubUnavailable when the disk has no room for it."""
        check_name(name)
        self._check(parts)
        upload = uuid.uuid4().hex
        expires_at = self._clock() + self._lease_s
        files = json.dumps([[part.path, part.size, part.sha256] for part in parts])
        rows = [
            {"lease": upload, "sha256": sha256, "expires_at": expires_at}
            for sha256 in sorted({part.sha256 for part in parts})
        ]
        with writing(self._engine) as connection:
            connection.execute(leases.insert(), rows)
            connection.execute(uploads.insert().values(lease=upload, owner=owner, name=name, files=files))
        missing = self._missing(parts, owner)
        try:
            self._check_room(sum(one.size - one.offset for one in missing))
        except HubUnavailable:
            self.end(upload)
            raise
        return Upload(upload, missing)

    def state(self, upload: str, *, owner: str) -> Upload:
        """How far it has come. Raises: UploadGone."""
        _, parts = self._begun(upload, owner)
        return Upload(upload, self._missing(parts, owner))

    def parts(self, upload: str, *, owner: str) -> tuple[str, tuple[Part, ...]]:
        """The name it is for and what it holds, all of it arrived. Raises: UploadGone, BadUpload."""
        name, parts = self._begun(upload, owner)
        missing = self._missing(parts, owner)
        if missing:
            first = missing[0]
            raise BadUpload(
                f"{len(missing)} files are not whole yet: {first.sha256} has {first.offset} of {first.size}"
            )
        return name, parts

    @contextmanager
    def piece(self, upload: str, sha256: str, *, owner: str, offset: int) -> Iterator[Piece]:
        """A piece to be written from `offset` on.

        Raises: UploadGone, BadUpload, UploadBusy with the offset to go on from.
        """
        _, parts = self._begun(upload, owner)
        part = next((part for part in parts if part.sha256 == check_sha256(sha256)), None)
        if part is None:
            raise BadUpload(f"this upload holds no file with the sha256 {sha256}")
        if self._blobs.size(sha256) == part.size:
            raise UploadBusy(f"{sha256} is here already", offset=part.size)
        self._renew(upload)
        path = self._path(owner, sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _lock(descriptor, path, part)
            have = os.lseek(descriptor, 0, os.SEEK_END)
            try:
                if have != offset:
                    raise UploadBusy(f"{sha256} goes on at byte {have}, not {offset}", offset=have)
                yield Piece(descriptor, path, part, offset, self._blobs)
            finally:  # still under the lock: what never got a byte leaves no trace
                if os.fstat(descriptor).st_size == 0 and _is_at(descriptor, path):
                    path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def discard_damaged(self, parts: Sequence[Part]) -> None:
        """Throw away what is stored and does not hash to its name, so that the next push brings it again."""
        for part in parts:
            try:
                for _ in self._blobs.stream(part.sha256):
                    pass
            except Corrupt:
                self._blobs.delete(part.sha256)
            except NotFound:
                continue

    def end(self, upload: str) -> None:
        """Forget an upload that was committed or given up; its pieces stay until they are swept."""
        with writing(self._engine) as connection:
            connection.execute(uploads.delete().where(uploads.c.lease == upload))
            connection.execute(leases.delete().where(leases.c.lease == upload))

    def sweep(self) -> None:
        """Clear away uploads whose lease is over and pieces that nobody went on with for a day."""
        alive = sa.select(leases.c.lease)
        with writing(self._engine) as connection:
            connection.execute(uploads.delete().where(uploads.c.lease.not_in(alive)))
        before = self._clock() - PIECE_LIFE_S
        for path in self._folder.glob("*/*.part"):
            try:
                if path.stat().st_mtime < before:
                    _discard(path)
            except FileNotFoundError:
                continue  # finished meanwhile

    def _begun(self, upload: str, owner: str) -> tuple[str, tuple[Part, ...]]:
        row = None
        if _UPLOAD.fullmatch(upload):
            alive = sa.select(sa.literal(1)).where(
                leases.c.lease == uploads.c.lease, leases.c.expires_at > self._clock()
            )
            wanted = sa.select(uploads).where(uploads.c.lease == upload, uploads.c.owner == owner, alive.exists())
            with reading(self._engine) as connection:
                row = connection.execute(wanted).first()
        if row is None:
            raise UploadGone(f"there is no upload {printable(upload)}, or it has expired; run the same command again")
        return row.name, tuple(Part(*part) for part in json.loads(row.files))

    def _missing(self, parts: Sequence[Part], owner: str) -> tuple[Missing, ...]:
        found: dict[str, Missing] = {}
        for part in parts:
            if self._blobs.size(part.sha256) != part.size:
                found[part.sha256] = Missing(part.sha256, part.size, self._come(part, owner))
        return tuple(found.values())

    def _come(self, part: Part, owner: str) -> int:
        """How many bytes of a piece are here; one that is all here was not finished, and nothing more need be sent."""
        path = self._path(owner, part.sha256)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return 0
        if size > part.size:  # the same bytes were announced with another size before
            _discard(path)
            return 0
        return size

    def _check(self, parts: Sequence[Part]) -> None:
        if not 1 <= len(parts) <= MAX_PARTS:
            raise BadUpload(f"{len(parts)} files: an adapter has 1 to {MAX_PARTS}")
        if len({part.path for part in parts}) != len(parts):
            raise BadUpload("a file stands twice in the upload")
        from hub.methods import Limits
        from hub.validate import file_limits  # not at the top: listing a hub must not wait for validation

        most = file_limits(self._limits or Limits())
        problems = []
        for part in parts:
            check_sha256(part.sha256)
            limit = most.get(part.path)
            if limit is None:
                problems.append(Problem(printable(part.path), None, "is no part of an adapter"))
            elif part.size > limit:
                raise TooLarge(f"{part.path} has {part.size} bytes, above the limit of {limit}")
        if problems:
            raise Refused("the upload", problems)

    def _check_room(self, wanted: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        space = os.statvfs(self._folder)
        free = space.f_bavail * space.f_frsize
        if wanted > free:
            raise HubUnavailable(f"the hub's disk has {free} bytes free, this push needs {wanted}")

    def _renew(self, upload: str) -> None:
        """A slow upload must not lose what it has brought."""
        with writing(self._engine) as connection:
            later = self._clock() + self._lease_s
            connection.execute(leases.update().where(leases.c.lease == upload).values(expires_at=later))

    def _path(self, owner: str, sha256: str) -> Path:
        assert _OWNER.fullmatch(owner), f"owner {owner!r} is not made by us"
        return self._folder / owner / f"{check_sha256(sha256)}.part"


class Piece:
    """One file of an upload while bytes arrive. Only one process writes it at a time."""

    def __init__(self, descriptor: int, path: Path, part: Part, offset: int, blobs: BlobStore) -> None:
        self._descriptor = descriptor
        self._path = path
        self._part = part
        self._blobs = blobs
        self._hasher: Any = None if offset else hashlib.sha256()  # of a resumed piece the beginning is read again
        self.offset = offset

    @property
    def size(self) -> int:
        return self._part.size

    @property
    def whole(self) -> bool:
        return self.offset == self._part.size

    def write(self, data: bytes | bytearray) -> None:
        """Raises: BadUpload when there are more bytes than were announced; HubUnavailable when the disk is full."""
        if self.offset + len(data) > self._part.size:
            self._throw_away()
            raise BadUpload(f"{self._part.path} brings more than the {self._part.size} bytes that were announced")
        if self._hasher is not None:
            self._hasher.update(data)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise HubUnavailable(
                    "the hub's disk is full; nothing is lost, run the same command again later"
                ) from error
            raise
        self.offset += len(data)

    def finish(self) -> None:
        """Hand the whole piece to the blob store. Raises: BadUpload when it does not hash to its name."""
        assert self.whole, "a piece is finished when all of it is here"
        found = self._rehashed() if self._hasher is None else self._hasher.hexdigest()
        if found != self._part.sha256:
            self._throw_away()
            raise BadUpload(f"the bytes of {self._part.path} hash to {found}, not to {self._part.sha256}")
        self._blobs.adopt(self._path, self._part.sha256)

    def _rehashed(self) -> str:
        with self._path.open("rb") as source:
            return sha256_of_stream(source)

    def _throw_away(self) -> None:
        self._path.unlink(missing_ok=True)


def _discard(path: Path) -> None:
    """Remove a piece, unless it is being written: only who holds its lock may rename or remove it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one that stands at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int, path: Path, part: Part) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = _is_at(descriptor, path)
    except BlockingIOError:
        ours = False
    if not ours:  # whoever held it may have finished it between our opening and our lock
        have = os.lseek(descriptor, 0, os.SEEK_END)
        raise UploadBusy(f"{part.sha256} is being sent by another push now", offset=have)
