"""kill -9 at any instant of push, alias, rollback, rm and gc leaves the old state or the new one, and loses nothing.

Workers are real processes. Each writes down what the hub has confirmed to it before it goes on; after the kill, all
that was confirmed must be there, the tables must be what the log says, and every referenced byte must re-hash.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import sqlalchemy as sa

from hub.blobs import BlobStore, DirectoryBlobs
from hub.contract import Event
from hub.errors import AliasMoved, InUse, NotFound
from hub.ref import Reference
from hub.registry import LEASE_S, LocalHub
from tests.forks import start
from tests.unit.hub.makers import write_base, write_prompt

CONTENTS = 4
ROUNDS = 20
PUSHES = 8
JOIN_TIMEOUT_S = 60.0


class DyingBlobs:
    """A BlobStore that kills its process at the n-th call of one method, just before or just after it."""

    def __init__(self, inner: BlobStore, *, method: str, call: int, after: bool) -> None:
        self._inner, self._method, self._left, self._after = inner, method, call, after

    def put(self, source: BinaryIO, sha256: str) -> bool:
        return self._dying("put", lambda: self._inner.put(source, sha256))

    def delete(self, sha256: str) -> None:
        self._dying("delete", lambda: self._inner.delete(sha256))

    def stream(self, sha256: str) -> Iterator[bytes]:
        return self._inner.stream(sha256)

    def load(self, sha256: str, size: int) -> memoryview:
        return self._inner.load(sha256, size)

    def adopt(self, path: Path, sha256: str) -> None:
        self._dying("adopt", lambda: self._inner.adopt(path, sha256))

    def size(self, sha256: str) -> int | None:
        return self._inner.size(sha256)

    def stored(self) -> Iterator[tuple[str, int]]:
        return self._inner.stored()

    def sweep(self, before: float) -> None:
        self._dying("sweep", lambda: self._inner.sweep(before))

    def _dying(self, method: str, work: Callable[[], Any]) -> Any:
        dies = method == self._method
        self._left -= dies
        if dies and not self._left and not self._after:
            die()
        result = work()
        if dies and not self._left:
            die()
        return result


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("crash")
    base = write_base(root / "base")
    return [write_prompt(root / str(index), base, tokens=index + 1) for index in range(CONTENTS + 2 * PUSHES)]


def work(home: Path, folders: list[Path], confirmed: Path, seed: int) -> None:
    """Do anything that a hub can do, in any order, until killed."""
    choose = random.Random(seed)
    hub = LocalHub(home)
    with confirmed.open("a", buffering=1) as notes:

        def note(event: Event | None) -> None:
            if event is not None:
                notes.write(json.dumps([event.seq, event.kind, event.version, event.alias, event.previous]) + "\n")

        notes.write(json.dumps("ready") + "\n")
        while True:
            version, alias = choose.randint(1, 6), choose.choice(["prod", "staging"])
            operation = choose.choice(["push", "push", "push", "move", "move", "rollback", "remove", "collect"])
            try:
                if operation == "push":
                    hub.push(folders[choose.randrange(CONTENTS)], "legal", aliases=[alias])
                    notes.write(json.dumps("pushed") + "\n")
                elif operation == "move":
                    note(hub.move_alias("legal", version, alias))
                elif operation == "rollback":
                    note(hub.rollback("legal", alias))
                elif operation == "remove":
                    note(hub.remove("legal", version))
                else:
                    hub.collect()
            except (NotFound, InUse, AliasMoved):
                continue


def push_all(home: Path, folders: list[Path]) -> None:
    hub = LocalHub(home)
    for folder in folders:
        hub.push(folder, "legal")


def push_dying(home: Path, folder: Path, method: str, call: int, after: bool) -> None:
    blobs = DyingBlobs(DirectoryBlobs(home / "blobs"), method=method, call=call, after=after)
    LocalHub(home, blobs=blobs).push(folder, "legal", aliases=["prod"])


def push_dying_in_transaction(home: Path, folder: Path, commit: int) -> None:
    hub = LocalHub(home)
    left = [commit]

    @sa.event.listens_for(sa.engine.Engine, "commit")
    def count(_connection: Any) -> None:
        left[0] -= 1
        if not left[0]:
            die()

    hub.push(folder, "legal", aliases=["prod"])


def collect_dying(home: Path, method: str, call: int, after: bool) -> None:
    blobs = DyingBlobs(DirectoryBlobs(home / "blobs"), method=method, call=call, after=after)
    LocalHub(home, blobs=blobs, clock=much_later).collect()


def much_later() -> float:
    return time.time() + 2 * LEASE_S


def killed(process: BaseProcess) -> bool:
    process.join(JOIN_TIMEOUT_S)
    return process.exitcode == -signal.SIGKILL


def check(home: Path) -> Mapping[str, int]:
    """The state is one that the log describes, every referenced byte re-hashes, and a collection changes neither."""
    hub = LocalHub(home)
    adapters = hub.adapters()
    log = hub.events(0)
    live, aliases = replay(log)
    found = adapters[0] if adapters else None
    assert ({version.version for version in found.versions} if found else set()) == live
    assert (dict(found.aliases) if found else {}) == aliases
    pushed = [event.version for event in log if event.kind == "pushed"]
    assert pushed == list(range(1, len(pushed) + 1)), "versions are dense"
    for _ in range(2):
        for version in live:
            hub.verify(Reference("legal", str(version)))
        LocalHub(home, clock=much_later).collect()
    left = {path.name for path in (home / "blobs").rglob("*") if path.is_file()}
    assert left == referenced(hub, live), "what nothing needs is freed, leftovers of dead pushes too"
    return aliases


def replay(log: list[Event]) -> tuple[set[int], dict[str, int]]:
    """What the tables must hold, told from the log alone."""
    live: set[int] = set()
    aliases: dict[str, int] = {}
    for event in log:
        if event.kind == "pushed":
            live.add(event.version)
        elif event.kind == "removed":
            live.discard(event.version)
            aliases = {alias: version for alias, version in aliases.items() if version != event.version}
        else:
            assert event.alias is not None
            assert event.previous == aliases.get(event.alias)
            aliases[event.alias] = event.version
    return live, aliases


def referenced(hub: LocalHub, live: set[int]) -> set[str]:
    digests = {hub.resolve(Reference("legal", str(version))).digest for version in live}
    return {entry.sha256 for digest in digests for entry in hub.manifest(digest).files}


def wait_for(path: Path, *, lines: int) -> None:
    """Until so much was confirmed; the first line says only that the worker is there."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while len(confirmations(path)) < lines:
        assert time.monotonic() < deadline, "the worker did not come so far"
        time.sleep(0.002)


def confirmations(path: Path) -> list[Any]:
    """What was written down; a line that the kill cut short was not."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_kills_at_random_instants_lose_nothing_that_was_confirmed(tmp_path: Path, folders: list[Path]) -> None:
    home = tmp_path / "home"
    choose = random.Random(20)
    done = 0
    for number in range(ROUNDS):
        notes = [tmp_path / f"{number}.{worker}" for worker in range(2)]
        workers = [start(work, home, folders, path, choose.randrange(10**6)) for path in notes]
        for worker, path in zip(workers, notes, strict=True):
            wait_for(path, lines=choose.randint(1, 3))
            time.sleep(choose.uniform(0, 0.1))
            os.kill(worker.pid or 0, signal.SIGKILL)
        assert all(killed(worker) for worker in workers), "a worker failed before it was killed"
        events = {
            (event.seq, event.kind, event.version, event.alias, event.previous) for event in LocalHub(home).events(0)
        }
        told = [tuple(line) for path in notes for line in confirmations(path) if isinstance(line, list)]
        assert set(told) <= events
        done += sum(len(confirmations(path)) - 1 for path in notes)
        if number % 5 == 4:
            check(home)
    assert done >= ROUNDS, "the kills came too early to mean anything"


def test_a_kill_while_a_new_hub_is_made_leaves_one_that_opens(tmp_path: Path) -> None:
    choose = random.Random(5)
    for number in range(6):
        home = tmp_path / str(number)
        worker = start(push_all, home, [])
        time.sleep(choose.uniform(0, 0.4))
        worker.kill()
        worker.join(JOIN_TIMEOUT_S)
        assert LocalHub(home).head() == 0


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2])
def test_a_push_killed_among_its_blobs_never_happened(
    tmp_path: Path, folders: list[Path], call: int, after: bool
) -> None:
    home = tmp_path / "home"
    LocalHub(home).push(folders[0], "legal", aliases=["prod"])
    assert killed(start(push_dying, home, folders[1], "put", call, after))
    assert check(home) == {"latest": 1, "prod": 1}
    assert LocalHub(home).push(folders[1], "legal").version == 2


@pytest.mark.parametrize("commit", [1, 2])
def test_a_push_killed_before_it_commits_never_happened(tmp_path: Path, folders: list[Path], commit: int) -> None:
    """The first commit is the lease; the second is manifest, version and aliases."""
    home = tmp_path / "home"
    LocalHub(home).push(folders[0], "legal", aliases=["prod"])
    assert killed(start(push_dying_in_transaction, home, folders[1], commit))
    assert check(home) == {"latest": 1, "prod": 1}


@pytest.mark.parametrize(("method", "call", "after"), [("delete", 1, False), ("delete", 1, True), ("sweep", 1, False)])
def test_a_collection_killed_half_way_is_finished_by_the_next(
    tmp_path: Path, folders: list[Path], method: str, call: int, after: bool
) -> None:
    home = tmp_path / "home"
    hub = LocalHub(home)
    for folder in folders[:3]:
        hub.push(folder, "legal")
    for version in (1, 2):
        hub.remove("legal", version)
    assert killed(start(collect_dying, home, method, call, after))
    assert check(home) == {"latest": 3}
    assert hub.push(folders[0], "legal").version == 4
    assert check(home) == {"latest": 4}


def test_two_processes_pushing_one_name_both_succeed_with_different_versions(
    tmp_path: Path, folders: list[Path]
) -> None:
    home = tmp_path / "home"
    mine, theirs = folders[CONTENTS : CONTENTS + PUSHES], folders[CONTENTS + PUSHES :]
    workers = [start(push_all, home, part) for part in (mine, theirs)]
    for worker in workers:
        worker.join(JOIN_TIMEOUT_S)
        assert worker.exitcode == 0
    (adapter,) = LocalHub(home).adapters()
    assert [version.version for version in adapter.versions] == list(range(1, 2 * PUSHES + 1))
    assert len({version.digest for version in adapter.versions}) == 2 * PUSHES
    check(home)
