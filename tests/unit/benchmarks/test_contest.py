"""How engines are set beside each other: what each is asked in which round, and who ends where memory is short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks import stable
from benchmarks.bases import BASES, Base
from benchmarks.contest import SLOW_S, WARM_UP_SEED, Contest, Turn
from benchmarks.load import Asked, Load, Round

LOAD = Load(requests=32, prompt=4, new=2, at_once=16)
TURNS = {"base": Turn(LOAD), "16 distinct": Turn(LOAD, 16)}
FOLDERS = [Path(str(number)) for number in range(16)]


@dataclass
class Clocked:
    """An engine and its process in one: every load takes it `wall_s`. Keeps what it was asked."""

    name: str
    wall_s: float = 1.0
    adapters: bool = True
    asked: list[tuple[int, int]] = field(default_factory=list)  # seed, requests
    starts: int = 0
    up: bool = False

    @property
    def family(self) -> str:
        return self.name

    @contextmanager
    def start(self, base: Base, adapters: Sequence[Path], room: Path) -> Iterator[Clocked]:
        self.starts, self.up = self.starts + 1, True
        yield self
        self.up = False

    def load(self, load: Load, asked: Sequence[Asked], seed: int) -> Round:
        assert len(asked) == load.requests
        if seed < WARM_UP_SEED:
            self.asked.append((seed, load.requests))
        return Round(tokens_per_s=load.requests * load.new / self.wall_s, wall_s=self.wall_s)

    def memory_bytes(self) -> int:
        return 1

    def stop(self) -> None: ...

    def go(self) -> None: ...


def _contest(room: Path, rounds: int = 3) -> Contest:
    return Contest(BASES["small"], FOLDERS, room, rounds)


def test_every_engine_has_the_same_prompts_and_no_two_turns_do(tmp_path: Path) -> None:
    engines = [Clocked("a"), Clocked("b")]
    list(_contest(tmp_path).run(engines, TURNS))
    seeds = [seed for seed, _ in engines[0].asked]
    assert seeds == [seed for seed, _ in engines[1].asked]
    assert len(set(seeds)) == len(seeds) == 3 * len(TURNS)


def test_what_is_done_is_given_after_every_round(tmp_path: Path) -> None:
    counts = [len(results.rounds["a"]["base"]) for results in _contest(tmp_path).run([Clocked("a")], TURNS)]
    assert counts == [1, 2, 3]


@pytest.mark.parametrize(("wall_s", "requests"), [(SLOW_S, [32, 32, 32]), (SLOW_S + 1, [32, 16, 16])])
def test_a_turn_that_was_slow_is_asked_with_one_batch(tmp_path: Path, wall_s: float, requests: list[int]) -> None:
    engine = Clocked("a", wall_s)
    list(_contest(tmp_path).run([engine], {"base": TURNS["base"]}))
    assert [count for _, count in engine.asked] == requests


def test_one_batch_is_never_more_than_was_asked_for() -> None:
    few = Turn(replace(LOAD, requests=4))
    assert few.one_batch() == few


def test_where_two_of_three_fit_a_round_starts_as_few_as_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [Clocked("a"), Clocked("b"), Clocked("c")]
    room_for = 2
    monkeypatch.setattr(
        psutil,
        "virtual_memory",
        lambda: SimpleNamespace(available=(room_for - sum(one.up for one in engines)) * stable.FREE_BYTES),
    )
    list(_contest(tmp_path).run(engines, {"base": TURNS["base"]}))
    assert [one.starts for one in engines] == [2, 2, 2]  # the one longest unused ending would make it 3 each
    assert not any(one.up for one in engines)


def test_adapters_are_asked_for_from_the_first_of_a_turn_on() -> None:
    turn = Turn(LOAD, 4, first=8)
    assert set(turn.asked(1)) == {8, 9, 10, 11}
    assert set(turn.warming().asked(1)) == {8, 9, 10, 11}
    assert set(Turn(LOAD, 0, first=8).asked(1)) == {None}
