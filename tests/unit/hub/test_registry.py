"""LocalHub: what holds beyond the protocol: leases against collection, damage, mending, and where a hub is found."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub.blobs import BlobStore, DirectoryBlobs
from hub.client import RemoteHub
from hub.connect import open_hub
from hub.errors import BadReference, Corrupt, HubUnavailable, InUse, NotFound, Refused
from hub.ref import parse_reference
from hub.registry import LocalHub
from tests.unit.hub.makers import write_base, write_lora, write_prompt, write_router

LATER_S = 2 * 3600.0
ARRIVAL_TIMEOUT_S = 30


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class PausingBlobs:
    """A BlobStore over another one that stops before each put until it is let go on: a slow push, made visible."""

    def __init__(self, inner: BlobStore) -> None:
        self._inner = inner
        self.waiting = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)

    def arrive(self) -> None:
        """Wait until the push is about to put its next blob."""
        assert self.waiting.acquire(timeout=ARRIVAL_TIMEOUT_S), "the push never came to its next blob"

    def put(self, source: BinaryIO, sha256: str) -> bool:
        self.waiting.release()
        self.go_on.acquire()
        return self._inner.put(source, sha256)

    def stream(self, sha256: str) -> Iterator[bytes]:
        return self._inner.stream(sha256)

    def load(self, sha256: str, size: int) -> memoryview:
        return self._inner.load(sha256, size)

    def adopt(self, path: Path, sha256: str) -> None:
        self._inner.adopt(path, sha256)

    def size(self, sha256: str) -> int | None:
        return self._inner.size(sha256)

    def stored(self) -> Iterator[tuple[str, int]]:
        return self._inner.stored()

    def delete(self, sha256: str) -> None:
        self._inner.delete(sha256)

    def sweep(self, before: float) -> None:
        self._inner.sweep(before)


@pytest.fixture
def hub(tmp_path: Path) -> LocalHub:
    return LocalHub(tmp_path / "home")


def test_a_collection_beside_a_push_takes_nothing_from_it(tmp_path: Path, adapter: Path) -> None:
    home, clock = tmp_path / "home", Clock()
    slow = PausingBlobs(DirectoryBlobs(home / "blobs"))
    pushing = LocalHub(home, clock=clock, blobs=slow)
    collecting = LocalHub(home, clock=clock)
    worker = threading.Thread(target=pushing.push, args=(adapter, "legal"), daemon=True)
    worker.start()
    while worker.is_alive():
        if slow.waiting.acquire(timeout=0.05):
            assert collecting.collect().blobs == 0
            slow.go_on.release()
    worker.join()
    assert collecting.verify(parse_reference("legal@1")).files == 2


def test_a_push_that_outlives_its_lease_stores_its_blobs_again(tmp_path: Path, adapter: Path) -> None:
    home, clock = tmp_path / "home", Clock()
    slow = PausingBlobs(DirectoryBlobs(home / "blobs"))
    pushing = LocalHub(home, clock=clock, blobs=slow)
    collecting = LocalHub(home, clock=clock)
    worker = threading.Thread(target=pushing.push, args=(adapter, "legal"), daemon=True)
    worker.start()
    slow.arrive()
    slow.go_on.release()
    slow.arrive()  # one blob is stored, the other is about to be
    clock.now += LATER_S
    assert collecting.collect().blobs == 1
    slow.go_on.release()
    for _ in range(2):  # the second try
        slow.arrive()
        slow.go_on.release()
    worker.join()
    assert collecting.verify(parse_reference("legal@1")).files == 2


def test_what_a_dead_push_left_is_freed_once_its_lease_has_run_out(tmp_path: Path, adapter: Path) -> None:
    clock = Clock()
    hub = LocalHub(tmp_path / "home", clock=clock)
    hub.push(adapter, "legal")
    with sqlite3.connect(hub.home / "catalogue.sqlite") as database:
        database.execute("INSERT INTO leases VALUES ('dead', ?, ?)", ("f" * 64, clock.now + 10))
    leftover = hub.home / "blobs" / "sha256" / "ff"
    leftover.mkdir(exist_ok=True)
    (leftover / ("f" * 64)).write_bytes(b"left behind")
    assert hub.collect().blobs == 0
    clock.now += LATER_S
    assert hub.collect().blobs == 1
    assert hub.verify(parse_reference("legal")).files == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_found_by_every_way_of_reading(hub: LocalHub, adapter: Path, tmp_path: Path, damage: str) -> None:
    digest = hub.push(adapter, "legal").digest
    entry = hub.manifest(digest).file("adapter_model.safetensors")
    assert entry is not None
    blob = hub.home / "blobs" / "sha256" / entry.sha256[:2] / entry.sha256
    data = blob.read_bytes()
    if damage == "gone":
        blob.unlink()
    else:
        blob.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    for read in (
        lambda: hub.verify(parse_reference("legal")),
        lambda: hub.read(digest, "adapter_model.safetensors"),
        lambda: hub.pull(parse_reference("legal"), tmp_path / "out"),
    ):
        with pytest.raises((Corrupt, NotFound), match=entry.sha256):
            read()
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert not hub.push(adapter, "legal").created
    assert hub.verify(parse_reference("legal")).files == 2, "pushing the same bytes again mends them"


def test_a_manifest_that_was_changed_in_the_catalogue_is_not_believed(hub: LocalHub, adapter: Path) -> None:
    digest = hub.push(adapter, "legal").digest
    with sqlite3.connect(hub.home / "catalogue.sqlite") as database:
        (body,) = database.execute("SELECT body FROM manifests").fetchone()
        value = json.loads(body)
        value["config"]["lora_alpha"] = 999
        database.execute("UPDATE manifests SET body = ?", (json.dumps(value),))
    with pytest.raises(Corrupt, match="another digest"):
        hub.manifest(digest)
    with pytest.raises(Corrupt):
        hub.verify(parse_reference("legal"))


def test_the_same_bytes_against_another_base_are_refused(hub: LocalHub, tmp_path: Path, base: Path) -> None:
    other = write_base(tmp_path / "other")
    (other / "tokenizer.json").write_text('{"version": "another"}')
    folder = write_lora(tmp_path / "a", base)
    hub.push(folder, "legal", base=base)
    with pytest.raises(Refused, match="another shape or tokenizer"):
        hub.push(folder, "legal", base=other)
    assert len(hub.adapters()) == 1


def test_a_file_that_changes_while_it_is_pushed_is_refused(tmp_path: Path, base: Path) -> None:
    folder = write_lora(tmp_path / "a", base)
    home = tmp_path / "home"
    slow = PausingBlobs(DirectoryBlobs(home / "blobs"))
    hub = LocalHub(home, blobs=slow)
    caught: list[BaseException] = []

    def push() -> None:
        try:
            hub.push(folder, "legal")
        except Refused as error:
            caught.append(error)

    worker = threading.Thread(target=push, daemon=True)
    worker.start()
    slow.arrive()
    save_file({"x": np.full(3, np.nan, np.float32)}, folder / "adapter_model.safetensors")
    while worker.is_alive():
        slow.go_on.release()
        worker.join(timeout=0.05)
    assert "changed while it was being pushed" in str(caught[0])
    assert hub.adapters() == []


def test_names_and_digests_are_checked_before_anything_is_touched(hub: LocalHub, adapter: Path) -> None:
    for name in ("../x", "", "A", "a/b/c"):
        with pytest.raises(BadReference):
            hub.push(adapter, name)
    with pytest.raises(BadReference):
        hub.push(adapter, "legal", aliases=["7"])
    with pytest.raises(BadReference, match="a note of 2001 characters is above the limit of 2000"):
        hub.push(adapter, "legal", note="x" * 2001)
    with pytest.raises(BadReference):
        hub.manifest("sha256:../../x")
    digest = hub.push(adapter, "legal").digest
    with pytest.raises(NotFound, match="has no file"):
        hub.read(digest, "../catalogue.sqlite")


def test_a_home_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HubUnavailable, match="not usable"):
        LocalHub(tmp_path / "file" / "home")


def test_a_hub_is_found_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HUB_URL", raising=False)
    monkeypatch.setenv("MULTIGRAFT_HOME", str(tmp_path / "named"))
    here = open_hub()
    assert isinstance(here, LocalHub)
    assert here.home == tmp_path / "named"
    monkeypatch.setenv("HUB_URL", "https://hub.example/")
    there = open_hub()
    assert isinstance(there, RemoteHub)
    assert there.url == "https://hub.example"
    monkeypatch.setenv("HUB_URL", "hub.example")
    with pytest.raises(BadReference, match=r"hub\.example is no address of a hub"):
        open_hub()


def test_threads_may_share_a_hub(hub: LocalHub, tmp_path: Path, base: Path) -> None:
    folders = [write_prompt(tmp_path / str(index), base, tokens=index + 1) for index in range(6)]
    workers = [threading.Thread(target=hub.push, args=(folder, "legal")) for folder in folders]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    (adapter,) = hub.adapters()
    assert [version.version for version in adapter.versions] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def pins(hub: LocalHub, base: Path, tmp_path: Path) -> list[str]:
    """Two experts in the hub, as a router names them."""
    folders = [write_lora(tmp_path / f"skill-{seed}", base, seed=seed) for seed in range(2)]
    pushed = [hub.push(folder, folder.name) for folder in folders]
    return [f"{one.name}@{one.digest}" for one in pushed]


def lose(hub: LocalHub, name: str) -> None:
    """Remove all versions of a name as a hub of before did, whatever pins them."""
    with sqlite3.connect(hub.home / "catalogue.sqlite") as database:
        database.execute("DELETE FROM aliases WHERE name = ?", (name,))
        database.execute("UPDATE versions SET removed_at = '2026-01-01' WHERE name = ?", (name,))


def test_an_expert_that_is_removed_while_its_router_is_pushed_refuses_the_push(
    tmp_path: Path, hub: LocalHub, base: Path, pins: list[str]
) -> None:
    slow = PausingBlobs(DirectoryBlobs(hub.home / "blobs"))
    pushing = LocalHub(hub.home, blobs=slow)
    caught: list[Refused] = []

    def push() -> None:
        try:
            pushing.push(write_router(tmp_path / "r", base, pins), "router")
        except Refused as error:
            caught.append(error)

    worker = threading.Thread(target=push, daemon=True)
    worker.start()
    slow.arrive()
    hub.remove("skill-1", 1)
    while worker.is_alive():
        slow.go_on.release()
        worker.join(timeout=0.05)
    assert "skill-1@sha256" in str(caught[0]) and "is no live version here" in str(caught[0])
    assert hub.adapters("router") == []


def test_a_catalogue_of_before_learns_what_its_routers_pin(
    tmp_path: Path, hub: LocalHub, base: Path, pins: list[str]
) -> None:
    hub.push(write_router(tmp_path / "r", base, pins), "router")
    with sqlite3.connect(hub.home / "catalogue.sqlite") as database:
        database.execute("DROP TABLE pins")
        database.execute("UPDATE alembic_version SET version_num = '0002'")
    with pytest.raises(InUse, match="router router@1 pins it as expert"):
        LocalHub(hub.home).remove("skill-0", 1)


def test_what_a_live_router_pins_is_collected_only_after_it(
    tmp_path: Path, hub: LocalHub, base: Path, pins: list[str]
) -> None:
    router = write_router(tmp_path / "r", base, pins)
    hub.push(router, "router")
    lose(hub, "skill-1")
    assert hub.collect().blobs == 0
    with pytest.raises(Refused, match=r"skill-1@1, sha256:\w{64}, was removed on 2026-01-01\); push that expert first"):
        hub.push(router, "again")
    assert hub.push(tmp_path / "skill-1", "skill-1").version == 2, "the same bytes: the router has its expert again"
    assert not hub.push(router, "router").created
    lose(hub, "skill-1")
    hub.remove("router", 1)
    assert hub.collect().blobs == 3, "router and expert; the config of the experts is one"


def test_who_pins_is_told_only_to_those_who_see_it(tmp_path: Path, hub: LocalHub, base: Path, pins: list[str]) -> None:
    for version in range(7):
        hub.push(write_router(tmp_path / f"r{version}", base, pins, seed=version), f"router-{version}")
    with pytest.raises(InUse, match=r"router-0@1, .*, router-4@1 and 2 more pin it"):
        hub.remove("skill-0", 1)
    with pytest.raises(InUse, match=r"router router-3@1 pins it as expert; remove that first: hub rm router-3@1$"):
        hub.remove("skill-0", 1, sees=lambda name: name == "router-3")
    with pytest.raises(InUse, match="in use: routers under names that you do not see pin it"):
        hub.remove("skill-0", 1, sees=lambda name: name == "skill-0")
