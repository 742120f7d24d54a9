"""A hub read through a folder of this machine: what was fetched once is here, and is enough when the hub is away.

Files are kept by their sha256 under a budget of bytes, the least recently used leave first, and every read re-hashes;
a damaged copy is thrown away and fetched again. Manifests are kept by digest. What a reference meant is remembered and
used only while the hub cannot be reached.
Law: nothing is read here that does not hash to the name that it is asked by.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from hub.blobs import DirectoryBlobs
from hub.contract import LATEST, Adapter, Event, HubReader, Resolved
from hub.digest import check_digest
from hub.errors import Corrupt, HubUnavailable, NotFound
from hub.manifest import parse_manifest
from hub.ref import Reference, printable

if TYPE_CHECKING:
    from hub.manifest import FileEntry, Manifest

MAX_REMEMBERED = 10_000
_MEMORY = "resolved.json"


@dataclass(frozen=True, slots=True)
class Remembered(Resolved):
    """What a reference meant when the hub was last asked, told while it cannot be reached."""


class CachedHub:
    """The reading half of the Hub protocol. Threads may share it. Units: bytes."""

    def __init__(self, hub: HubReader, folder: Path, *, budget_bytes: int) -> None:
        self._hub = hub
        self._folder = folder
        self._budget_bytes = budget_bytes
        try:
            (folder / "manifests").mkdir(parents=True, exist_ok=True)
            self._blobs = DirectoryBlobs(folder)
        except OSError as error:
            raise HubUnavailable(f"the disk cache {printable(str(folder))} is not usable: {error.strerror}") from error
        self._lock = threading.Lock()
        self._meant = self._remembered()
        self._listing: list[Adapter] = []

    def resolve(self, reference: Reference, *, default_alias: str = LATEST) -> Resolved:
        key = f"{reference.name}@{reference.selector or default_alias}"
        try:
            resolved = self._hub.resolve(reference, default_alias=default_alias)
        except HubUnavailable:
            with self._lock:
                remembered = self._meant.get(key)
            if remembered is None:
                raise
            return Remembered(**asdict(remembered))
        except NotFound:
            self._remember(key, None)
            raise
        self._remember(key, resolved)
        return resolved

    def manifest(self, digest: str) -> Manifest:
        path = self._folder / "manifests" / f"{check_digest(digest).removeprefix('sha256:')}.json"
        try:
            return parse_manifest(path.read_text(encoding="utf-8"), digest)
        except (OSError, UnicodeDecodeError, Corrupt):
            manifest = self._hub.manifest(digest)
            self._write(path, manifest.model_dump_json())
            return manifest

    def read(self, digest: str, path: str) -> bytes:
        entry = self.manifest(digest).file(path)
        if entry is None:
            raise NotFound(f"adapter {digest} has no file {printable(path)}")
        return bytes(self.load(digest, entry))

    def load(self, digest: str, entry: FileEntry) -> memoryview:
        try:
            content = self._blobs.load(entry.sha256, entry.size)
            self._blobs.touch(entry.sha256)
            return content
        except NotFound:
            pass
        except Corrupt:
            self._blobs.delete(entry.sha256)
        content = self._hub.load(digest, entry)
        self._keep(entry.sha256, content)
        return content

    def at_hand(self, entry: FileEntry) -> bool:
        return self._blobs.size(entry.sha256) is not None or self._hub.at_hand(entry)

    def adapters(self, pattern: str | None = None) -> list[Adapter]:
        """While the hub is away, of the whole list the last one that was seen."""
        try:
            found = self._hub.adapters(pattern)
        except HubUnavailable:
            if pattern is not None:
                return [adapter for adapter in self._listing if adapter.name == pattern]
            return self._listing
        if pattern is None:
            self._listing = found
        return found

    def log(self, name: str) -> list[Event]:
        return self._hub.log(name)

    def head(self) -> int:
        return self._hub.head()

    def events(self, after: int) -> list[Event]:
        return self._hub.events(after)

    def watch(self, after: int) -> Iterator[list[Event]]:
        return self._hub.watch(after)

    def _keep(self, sha256: str, content: memoryview) -> None:
        """Into the cache, if it can hold it at all; a disk that is full costs nothing but the next fetch."""
        if len(content) > self._budget_bytes:
            return
        try:
            with self._lock:
                self._make_room(len(content))
                self._blobs.put(BytesIO(content), sha256)
        except OSError:
            self._blobs.sweep(float("inf"))

    def _make_room(self, wanted: int) -> None:
        kept = sorted((self._blobs.used_at(sha256), size, sha256) for sha256, size in self._blobs.stored())
        total = sum(size for _, size, _ in kept)
        for _, size, sha256 in kept:
            if total + wanted <= self._budget_bytes:
                return
            self._blobs.delete(sha256)
            total -= size

    def _remember(self, key: str, resolved: Resolved | None) -> None:
        with self._lock:
            if self._meant.get(key) == resolved:
                return
            self._meant.pop(key, None)
            if resolved is not None:
                self._meant[key] = resolved
                if len(self._meant) > MAX_REMEMBERED:
                    self._meant.popitem(last=False)
            text = json.dumps({key: asdict(value) for key, value in self._meant.items()})
            self._write(self._folder / _MEMORY, text)

    def _remembered(self) -> OrderedDict[str, Resolved]:
        try:
            value = json.loads((self._folder / _MEMORY).read_text(encoding="utf-8"))
            return OrderedDict((key, Resolved(**one)) for key, one in value.items())
        except (OSError, ValueError, TypeError, AttributeError):
            return OrderedDict()  # a memory that cannot be read is no memory; the hub will tell

    def _write(self, path: Path, text: str) -> None:
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
        except OSError:
            aside.unlink(missing_ok=True)
