"""What a hub is, wherever it lies: push, resolve, fetch, move, watch. One test suite runs over every implementation.

Laws: versions of a name are 1, 2, 3 ... without holes, and never come back once removed; the same bytes under a name
are one version; an alias moves only by compare-and-set, and every move is an event; a digest never changes its meaning;
a router's experts are there as long as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hub.ref import Reference

if TYPE_CHECKING:
    from hub.manifest import FileEntry, Manifest

LATEST = "latest"

EventKind = Literal["pushed", "alias_moved", "removed"]


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the append-only log. `previous` is where an alias was before; `rollback` marks a step back."""

    seq: int
    kind: EventKind
    name: str
    version: int
    alias: str | None
    digest: str | None
    previous: int | None
    actor: str
    note: str
    at: datetime
    rollback: bool = False


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where a folder went. `created` is False when the name had these bytes already."""

    name: str
    version: int
    digest: str
    created: bool


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference means now. `alias` is the one that was followed, if any."""

    name: str
    version: int
    digest: str
    alias: str | None


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a name. Units: bytes of the weights file. `fingerprint` is that of the base it was made for."""

    version: int
    digest: str
    kind: str
    bytes: int
    base: str
    fingerprint: str
    actor: str
    note: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name with its versions that are not removed, and where its aliases point."""

    name: str
    versions: tuple[Version, ...]
    aliases: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Verified:
    """What was re-hashed and found whole. Units: bytes."""

    name: str
    version: int
    digest: str
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Change:
    """One difference; None where a side has nothing."""

    field: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class Difference:
    """What parts two versions."""

    before: Resolved
    after: Resolved
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection freed. Units: bytes."""

    blobs: int
    bytes: int


class HubReader(Protocol):
    """What whoever uses adapters needs of a hub. Every method raises leaves of HubError only."""

    def resolve(self, reference: Reference, *, default_alias: str = LATEST) -> Resolved:
        """Raises: NotFound; BadReference when a short digest fits two versions."""
        ...

    def manifest(self, digest: str) -> Manifest:
        """Raises: NotFound, Corrupt."""
        ...

    def read(self, digest: str, path: str) -> bytes:
        """One kept file, re-hashed. Raises: NotFound, Corrupt."""
        ...

    def load(self, digest: str, entry: FileEntry) -> memoryview:
        """A kept file as its manifest tells it, re-hashed, in memory of its own. Raises: NotFound, Corrupt."""
        ...

    def at_hand(self, entry: FileEntry) -> bool:
        """Whether a kept file lies on a disk of this machine."""
        ...

    def adapters(self, pattern: str | None = None) -> list[Adapter]:
        """All names, or those that fit a pattern with * and ?, in order."""
        ...

    def log(self, name: str) -> list[Event]:
        """Everything that happened to a name, oldest first. Raises: NotFound."""
        ...

    def head(self) -> int:
        """The number of the last event, 0 when there is none."""
        ...

    def events(self, after: int) -> list[Event]:
        """Every event with a larger number, in order."""
        ...

    def watch(self, after: int) -> Iterator[list[Event]]:
        """Every event with a larger number, as they happen, for ever; an empty list now and then when nothing does.

        Raises: HubUnavailable when the hub is lost; LogLost when it has not come so far as `after`.
        """
        ...


class Hub(HubReader, Protocol):
    """A registry of adapters."""

    def push(
        self, folder: Path, name: str, *, aliases: Sequence[str] = (), note: str = "", base: Path | None = None
    ) -> Pushed:
        """Validate and store a folder as the next version; `latest` and the aliases then point to it.

        Raises: Refused (also when a router's experts are not here), BadReference, NotFound.
        """
        ...

    def stream(self, digest: str, path: str) -> Iterator[bytes]:
        """One kept file in pieces; Corrupt is raised before the end when they do not hash to what they must.

        Raises: NotFound, Corrupt.
        """
        ...

    def pull(self, reference: Reference, folder: Path) -> Resolved:
        """Write the adapter as a folder that PEFT loads, whole or not at all.

        Raises: NotFound, Corrupt, WouldOverwrite.
        """
        ...

    def verify(self, reference: Reference) -> Verified:
        """Re-hash every byte. Raises: NotFound, Corrupt with every damaged file."""
        ...

    def move_alias(
        self, name: str, version: int, alias: str, *, expect: int | None = None, note: str = ""
    ) -> Event | None:
        """Point an alias at a version; None when it points there already.

        `expect` is where the alias must be now, 0 meaning nowhere; None moves it from wherever it is.
        Raises: AliasMoved, NotFound, BadReference.
        """
        ...

    def rollback(self, name: str, alias: str, *, note: str = "") -> Event:
        """Point an alias back to where it was before; again, and it goes further back.

        Raises: NotFound when there is no earlier place, or the version there was removed.
        """
        ...

    def remove(self, name: str, version: int, *, note: str = "") -> Event:
        """Take a version away; its number is never used again.

        Raises: NotFound; InUse while an alias points to it (but the last version of a name goes with its `latest`), or
        while a live router has it as an expert.
        """
        ...

    def collect(self) -> Collected:
        """Free the blobs that no version needs and no push is about to need."""
        ...

    def diff(self, before: Reference, after: Reference) -> Difference:
        """Raises: NotFound."""
        ...


def places(history: Iterable[Event], alias: str) -> list[int]:
    """Where an alias has been, as a stack: a move puts a place on it, a rollback takes one off."""
    stack: list[int] = []
    for event in history:
        if event.kind == "removed" and stack[-1:] == [event.version]:
            stack.clear()  # `latest` went away with the last version of its name
        elif event.kind == "alias_moved" and event.alias == alias:
            if event.rollback:
                stack.pop()
            else:
                stack.append(event.version)
    return stack
