"""The store's laws while a thousand adapters come and go through a budget that holds a few of them."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.adapters.lowering.target import Target
from server.adapters.source import Artifact, GoldenRow, Resolution
from server.adapters.store import PROBES_AT_ONCE, AdapterStore
from server.config import AdapterConfig
from server.errors import AdapterUnavailable, MixtureRefused
from server.metrics import Metrics
from server.primitives.graft import Graft
from server.primitives.routed_experts import Route
from server.primitives.site import SiteShape

ADAPTERS, AT_ONCE, ROUNDS, HELD, RANK, SIZE = 1000, 16, 60, 24, 2, 8
SITE = "layers.0.q"
BYTES = 2 * RANK * SIZE * 2  # A and B in bfloat16
GOLDEN_ROWS = PROBES_AT_ONCE + 3
LOGITS = torch.arange(5.0)
CONFIG = {"r": RANK, "lora_alpha": 4, "target_modules": ["q"]}


class MadeSource:
    """A hub of adapters that are made when they are asked for; counts what is fetched, and what of it at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now: Counter[str] = Counter()
        self.most_at_once = 0
        self.twice: list[str] = []
        self.fetched = 0

    def pointer(self, text: str) -> tuple[str, str]:
        return text, "latest"

    def resolve(self, text: str) -> Resolution:
        return Resolution(text, 1, f"sha256:{int(text):064x}", "latest")

    def earlier(self, name: str, alias: str) -> Sequence[Resolution]:
        return ()

    def fetch(self, resolution: Resolution) -> Artifact:
        with self._lock:
            self.fetched += 1
            self._now[resolution.digest] += 1
            self.most_at_once = max(self.most_at_once, sum(self._now.values()))
            if self._now[resolution.digest] > 1:
                self.twice.append(resolution.digest)
        value = torch.full((RANK, SIZE), float(int(resolution.name) % 256), dtype=torch.bfloat16)
        root = f"base_model.model.{SITE}"
        tensors = {f"{root}.lora_A.weight": value, f"{root}.lora_B.weight": value.t().contiguous()}
        with self._lock:
            self._now[resolution.digest] -= 1
        return Artifact("lora", RANK, CONFIG, tensors, (), "disk")


class Probing:
    """A workshop that answers every golden row with the same logits, and counts."""

    def __init__(self) -> None:
        self.probes = self.now = self.most_at_once = 0

    async def probe(self, graft: Graft, prompt_ids: Sequence[int], *, route: Route | None) -> Tensor:
        self.probes += 1
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        return LOGITS


class GoldenSource(MadeSource):
    """Every adapter with golden rows, of which the last of those with an odd name is wrong."""

    def fetch(self, resolution: Resolution) -> Artifact:
        row = GoldenRow((1, 2), LOGITS)
        last = GoldenRow((1, 2), LOGITS.flip(0)) if int(resolution.name) % 2 else row
        return replace(super().fetch(resolution), golden=(*[row] * (GOLDEN_ROWS - 1), last))


def made_store(source: Any, workshop: Any = None, **settings: Any) -> AdapterStore:
    """Without golden rows and soft prompts nobody asks the workshop."""
    sites = {SITE: SiteShape(SIZE, SIZE, None)}
    target = Target(sites, (), SIZE, torch.float32, torch.device("cpu"), 64, 0, lambda name: torch.empty(0))
    return AdapterStore(source, workshop, target, AdapterConfig(**settings), Metrics(), quantized=False)


def popular(rng: random.Random, count: int) -> Sequence[str]:
    return [str(name) for name in rng.choices(range(ADAPTERS), [1 / (rank + 1) for rank in range(ADAPTERS)], k=count)]


@pytest.mark.parametrize("terms", [1, 3])
def test_a_thousand_adapters_churn_within_the_budget_and_none_that_is_held_goes(terms: int) -> None:
    source = MadeSource()
    budget = HELD * BYTES  # less than all users want at once where they want three
    store = made_store(source, cache_bytes=budget, max_concurrent_loads=2)
    served: Counter[str] = Counter()

    def check() -> None:
        assert sum(status.bytes for status in store.resident()) <= budget

    async def user(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(ROUNDS // terms):
            names = popular(rng, terms)
            lease = await store.acquire([(name, 1.0) for name in names])
            for _ in range(rng.randrange(4)):
                check()
                resident = {status.digest for status in store.resident() if status.tier == "device"}
                assert {graft.digest for graft, _ in lease.grafts} <= resident
                await asyncio.sleep(0)
            for graft, _ in lease.grafts:
                low = graft.sites[SITE].lowrank
                assert low is not None
                assert set(low.A_RI.flatten().tolist()) == {int(graft.label.partition("@")[0]) % 256}, (
                    "another's tensors"
                )
            lease.release()
            served.update(names)

    async def all_users() -> None:
        await asyncio.gather(*(user(seed) for seed in range(AT_ONCE)))

    asyncio.run(asyncio.wait_for(all_users(), 120))
    check()
    assert all(status.leases == 0 for status in store.resident())
    assert not source.twice, "one digest was loaded twice at once"
    assert source.most_at_once <= 2
    assert len(served) < source.fetched < served.total(), "some came again after they had gone, some were still there"


def test_loads_leave_every_other_threads_cores_alone() -> None:
    cores = torch.get_num_threads()
    seen: list[int] = []

    class Looking(MadeSource):
        def fetch(self, resolution: Resolution) -> Artifact:
            seen.append(torch.get_num_threads())
            return super().fetch(resolution)

    torch.set_num_threads(2)
    try:
        store = made_store(Looking(), max_concurrent_loads=2)
        asyncio.run(store.warm("7"))
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [1]
        assert [*later, torch.get_num_threads()] == [2, 2]
    finally:
        torch.set_num_threads(cores)


def test_golden_rows_share_steps_and_are_asked_once_in_the_life_of_a_server() -> None:
    """What came out right for some bytes on this base comes out right again: decision 25."""
    workshop = Probing()
    store = made_store(GoldenSource(), workshop)

    async def work() -> None:
        await store.warm("2")
        assert workshop.probes == GOLDEN_ROWS
        assert workshop.most_at_once == PROBES_AT_ONCE
        await store.evict("2")
        await store.warm("2")
        assert workshop.probes == GOLDEN_ROWS
        with pytest.raises(AdapterUnavailable, match=f"golden row {GOLDEN_ROWS - 1} is off by"):
            await store.warm("3")

    asyncio.run(work())


def test_a_resident_adapter_takes_what_its_factors_take_in_the_file() -> None:
    store = made_store(MadeSource())
    status = asyncio.run(store.warm("7"))
    assert status.bytes == BYTES


def test_mixtures_that_want_each_others_room_come_one_after_the_other() -> None:
    store = made_store(MadeSource(), cache_bytes=3 * BYTES)

    async def user(pair: int) -> None:
        lease = await store.acquire([(str(2 * pair), 1.0), (str(2 * pair + 1), 0.5)])
        assert len(lease.grafts) == 2
        await asyncio.sleep(0.01)
        lease.release()

    async def all_users() -> None:
        await asyncio.gather(*(user(pair) for pair in range(8)))

    asyncio.run(asyncio.wait_for(all_users(), 10))


def test_adapters_that_are_never_all_let_go_keep_no_other_out(monkeypatch: pytest.MonkeyPatch) -> None:
    store = made_store(MadeSource(), cache_bytes=BYTES)
    monkeypatch.setattr("server.adapters.room.PATIENCE_S", 0.1)

    async def popular_ones(over: asyncio.Event) -> int:
        served, held = 0, await store.acquire([("0", 1.0)])
        while not over.is_set():
            following = asyncio.create_task(store.acquire([("0", 1.0)]))
            await asyncio.wait([following], timeout=0.02)
            held.release()
            held = await following
            served += 1
        held.release()
        return served

    async def rare_one() -> int:
        over = asyncio.Event()
        flood = asyncio.create_task(popular_ones(over))
        await asyncio.sleep(0.05)
        rare = await store.acquire([("1", 1.0)])
        rare.release()
        over.set()
        return await flood

    assert asyncio.run(asyncio.wait_for(rare_one(), 10)) > 3


def test_a_mixture_that_never_fits_is_refused_at_once() -> None:
    store = made_store(MadeSource(), cache_bytes=2 * BYTES)

    async def ask() -> None:
        with pytest.raises(MixtureRefused, match=f"take {3 * BYTES} bytes, the adapter cache holds {2 * BYTES}"):
            await store.acquire([(name, 1.0) for name in ("1", "2", "3")])
        assert {status.leases for status in store.resident()} == {0}
        (await store.acquire([("1", 1.0), ("3", 1.0)])).release()

    asyncio.run(asyncio.wait_for(ask(), 10))
