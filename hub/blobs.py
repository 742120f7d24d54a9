"""Bytes by their sha256: a protocol, and the directory that keeps it on a local disk.

A blob appears whole or not at all: written aside, flushed to the disk, renamed, and the folder flushed too.
Law: what `read` gives hashes to the name it was asked by, or Corrupt is raised; a put of bytes that are there already
writes nothing, unless those that are there are damaged, and then it mends them.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from hub.digest import SHA256, check_sha256, chunks
from hub.errors import Corrupt, NotFound


class BlobStore(Protocol):
    """Where the bytes are. Every name is a sha256 in hex."""

    def put(self, source: BinaryIO, sha256: str) -> bool:
        """Store what the source holds; True when bytes were written. Raises: Corrupt if it hashes to another name."""
        ...

    def stream(self, sha256: str) -> Iterator[bytes]:
        """The bytes in pieces; Corrupt is raised before the end when they do not hash to their name."""
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


def read_blob(store: BlobStore, sha256: str) -> bytes:
    """A whole blob, re-hashed. Raises: NotFound, Corrupt."""
    return b"".join(store.stream(sha256))


class DirectoryBlobs:
    """A BlobStore in one directory: `sha256/ab/abcd...` and, while being written, `tmp/`."""

    def __init__(self, root: Path) -> None:
        self._root = root / "sha256"
        self._tmp = root / "tmp"
        for folder in (self._root, self._tmp):
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, source: BinaryIO, sha256: str) -> bool:
        path = self._path(sha256)
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
            path.parent.mkdir(exist_ok=True)
            aside.replace(path)
            flush_folder(path.parent)
            flush_folder(self._root)
        finally:
            aside.unlink(missing_ok=True)
        return True

    def stream(self, sha256: str) -> Iterator[bytes]:
        hasher = hashlib.sha256()
        try:
            with self._path(sha256).open("rb") as source:
                for chunk in chunks(source):
                    hasher.update(chunk)
                    yield chunk
        except FileNotFoundError as error:
            raise NotFound(f"blob {sha256} is not stored") from error
        if hasher.hexdigest() != sha256:
            raise Corrupt(f"blob {sha256} is damaged: its bytes hash to {hasher.hexdigest()}")

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
