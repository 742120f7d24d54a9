"""Bytes by their sha256: a protocol, and the directory that keeps it on a local disk.

A blob appears whole or not at all: written aside, flushed to the disk, renamed, and the folder flushed too.
Law: what `read` gives hashes to the name it was asked by, or Corrupt is raised; a put of bytes that are there already
writes nothing, unless those that are there are damaged, and then it mends them.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from hub.digest import CHUNK_BYTES, SHA256, check_sha256, chunks
from hub.errors import Corrupt, NotFound


class BlobStore(Protocol):
    """Where the bytes are. Every name is a sha256 in hex."""

    def put(self, source: BinaryIO, sha256: str) -> bool:
        """Store what the source holds; True when bytes were written. Raises: Corrupt if it hashes to another name."""
        ...

    def stream(self, sha256: str) -> Iterator[bytes]:
        """The bytes in pieces; Corrupt is raised before the last when they do not hash to their name."""
        ...

    def load(self, sha256: str, size: int) -> memoryview:
        """All bytes in memory of their own. Raises: NotFound; Corrupt when they hash to another name."""
        ...

    def adopt(self, path: Path, sha256: str) -> None:
        """Store a local file, which is gone afterwards. The caller has hashed it."""
        ...

    def size(self, sha256: str) -> int | None:
        """The bytes of a blob, or None when it is not stored."""
        ...

    def stored(self) -> Iterator[tuple[str, int]]:
        """Every blob and its size in bytes."""
        ...

    def delete(self, sha256: str) -> None:
        """Forget a blob; one that is gone already is no error."""
        ...

    def sweep(self, before: float) -> None:
        """Clear away what unfinished puts left behind before this time (seconds since the epoch)."""
        ...


def open_blob(store: BlobStore, sha256: str) -> BinaryIO:
    """A blob as a file to be read once, in flat memory; reading to its end raises Corrupt when it is damaged."""
    return io.BufferedReader(_Streamed(store.stream(sha256)), CHUNK_BYTES)


def room_for(size: int) -> memoryview:
    """Memory of its own, from the beginning of a page; in large pages, which cost a third, where there are any."""
    if not size:
        return memoryview(bytearray())
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that was built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)


def gather(pieces: Iterator[bytes], size: int) -> memoryview:
    """Pieces of bytes as one, in memory of its own.

    Raises: Corrupt when they are not of that size, and what the pieces raise.
    """
    whole = room_for(size)
    position = 0
    for piece in pieces:
        end = position + len(piece)
        if end <= size:
            whole[position:end] = piece
        position = end
    if position != size:
        raise Corrupt(f"a file has {position} bytes, its manifest says {size}")
    return whole


class _Streamed(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


class DirectoryBlobs:
    """A BlobStore in one directory: `sha256/ab/abcd...` and, while being written, `tmp/`."""

    def __init__(self, root: Path) -> None:
        self._root = root / "sha256"
        self._tmp = root / "tmp"
        for folder in (self._root, self._tmp):
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, source: BinaryIO, sha256: str) -> bool:
        if self._is_whole(sha256):
            return False
        aside = self._tmp / uuid.uuid4().hex
        try:
            with aside.open("xb") as target:
                hasher = hashlib.sha256()
                for chunk in chunks(source):
                    hasher.update(chunk)
                    target.write(chunk)
                target.flush()
                os.fsync(target.fileno())
            if hasher.hexdigest() != sha256:
                raise Corrupt(f"the bytes to store as {sha256} hash to {hasher.hexdigest()}")
            self._place(aside, sha256)
        finally:
            aside.unlink(missing_ok=True)
        return True

    def adopt(self, path: Path, sha256: str) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._place(path, sha256)

    def size(self, sha256: str) -> int | None:
        try:
            return self._path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def stream(self, sha256: str) -> Iterator[bytes]:
        hasher, held = hashlib.sha256(), b""
        try:
            with self._path(sha256).open("rb") as source:
                for chunk in chunks(source):
                    hasher.update(chunk)
                    if held:
                        yield held
                    held = chunk
        except FileNotFoundError as error:
            raise NotFound(f"blob {sha256} is not stored") from error
        if hasher.hexdigest() != sha256:
            raise Corrupt(f"blob {sha256} is damaged: its bytes hash to {hasher.hexdigest()}")
        if held:
            yield held

    def load(self, sha256: str, size: int) -> memoryview:
        hasher, whole, position = hashlib.sha256(), room_for(size), 0
        try:
            with self._path(sha256).open("rb", buffering=0) as source:
                while count := source.readinto(whole[position : position + CHUNK_BYTES]):
                    hasher.update(whole[position : position + count])  # while it is in the processor's cache
                    position += count
                more = source.read(1)
        except FileNotFoundError as error:
            raise NotFound(f"blob {sha256} is not stored") from error
        if hasher.hexdigest() != sha256 or position != size or more:
            raise Corrupt(f"blob {sha256} is damaged: it has not the {size} bytes that hash to its name")
        return whole

    def touch(self, sha256: str) -> None:
        """Note that a blob is used now."""
        with suppress(FileNotFoundError):
            os.utime(self._path(sha256))

    def used_at(self, sha256: str) -> float:
        """When a blob was last touched or stored, in seconds since the epoch; 0 when it is gone."""
        try:
            return self._path(sha256).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def stored(self) -> Iterator[tuple[str, int]]:
        for path in sorted(self._root.glob("??/*")):
            if re.fullmatch(SHA256, path.name):
                yield path.name, path.stat().st_size

    def delete(self, sha256: str) -> None:
        self._path(sha256).unlink(missing_ok=True)

    def sweep(self, before: float) -> None:
        for path in self._tmp.iterdir():
            try:
                if path.stat().st_mtime < before:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue  # renamed into place meanwhile

    def _place(self, aside: Path, sha256: str) -> None:
        path = self._path(sha256)
        path.parent.mkdir(exist_ok=True)
        aside.replace(path)
        flush_folder(path.parent)
        flush_folder(self._root)

    def _path(self, sha256: str) -> Path:
        return self._root / check_sha256(sha256)[:2] / sha256

    def _is_whole(self, sha256: str) -> bool:
        try:
            for _ in self.stream(sha256):
                pass
        except (NotFound, Corrupt):
            return False
        return True


def flush_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the bytes of its files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
