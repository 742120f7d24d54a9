"""A model of names, versions, aliases and their history, beside the real hub, through any sequence of operations."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hub.contract import Event
from hub.errors import AliasMoved, InUse, NotFound
from hub.ref import Reference
from hub.registry import LocalHub
from tests.unit.hub.makers import write_base, write_prompt

NAMES = ("legal", "team/tone")
ALIASES = ("prod", "staging", "latest")
CONTENTS = 3

names = st.sampled_from(NAMES)
aliases = st.sampled_from(ALIASES)
versions = st.integers(1, 5)


class Model:
    """What a hub should hold, said as simply as possible."""

    def __init__(self) -> None:
        self.live: dict[str, dict[int, int]] = {name: {} for name in NAMES}  # version -> content
        self.given: dict[str, int] = dict.fromkeys(NAMES, 0)
        self.places: dict[tuple[str, str], list[int]] = {}

    def push(self, name: str, content: int, moved: set[str]) -> int:
        version = next((number for number, item in self.live[name].items() if item == content), None)
        if version is None:
            self.given[name] += 1
            version = self.given[name]
            self.live[name][version] = content
        for alias in moved | {"latest"}:
            self.move(name, alias, version)
        return version

    def move(self, name: str, alias: str, version: int) -> None:
        places = self.places.setdefault((name, alias), [])
        if places[-1:] != [version]:
            places.append(version)

    def target(self, name: str, alias: str) -> int | None:
        return next(iter(self.places.get((name, alias), [])[-1:]), None)

    def pointing(self, name: str, version: int) -> set[str]:
        return {alias for alias in ALIASES if self.target(name, alias) == version}


class Hubs(RuleBasedStateMachine):
    """Every rule does the same to the hub and to the model."""

    @initialize()
    def start(self) -> None:
        self.scratch = TemporaryDirectory()
        root = Path(self.scratch.name)
        base = write_base(root / "base")
        self.folders = [write_prompt(root / str(index), base, tokens=index + 1) for index in range(CONTENTS)]
        self.hub = LocalHub(root / "home")
        self.model = Model()
        self.seen: list[Event] = []

    def teardown(self) -> None:
        self.scratch.cleanup()

    @rule(name=names, content=st.integers(0, CONTENTS - 1), moved=st.sets(aliases, max_size=2))
    def push(self, name: str, content: int, moved: set[str]) -> None:
        pushed = self.hub.push(self.folders[content], name, aliases=sorted(moved))
        assert pushed.version == self.model.push(name, content, moved)

    @rule(name=names, version=versions, alias=aliases, expect=st.none() | st.integers(0, 3))
    def move(self, name: str, version: int, alias: str, expect: int | None) -> None:
        try:
            self.hub.move_alias(name, version, alias, expect=expect)
        except NotFound:
            assert version not in self.model.live[name]
        except AliasMoved:
            assert expect != (self.model.target(name, alias) or 0)
        else:
            assert expect in (None, self.model.target(name, alias) or 0)
            self.model.move(name, alias, version)

    @rule(name=names, alias=aliases)
    def rollback(self, name: str, alias: str) -> None:
        places = self.model.places.get((name, alias), [])
        possible = len(places) > 1 and places[-2] in self.model.live[name]
        try:
            event = self.hub.rollback(name, alias)
        except NotFound:
            assert not possible
        else:
            assert possible
            places.pop()
            assert event.version == places[-1]

    @rule(name=names, version=versions)
    def remove(self, name: str, version: int) -> None:
        live, pointing = self.model.live[name], self.model.pointing(name, version)
        alone = list(live) == [version]
        try:
            self.hub.remove(name, version)
        except NotFound:
            assert version not in live
        except InUse:
            assert pointing - ({"latest"} if alone else set())
        else:
            assert not pointing - ({"latest"} if alone else set())
            del live[version]
            if pointing:
                self.model.places[name, "latest"].clear()

    @rule()
    def collect(self) -> None:
        self.hub.collect()

    @rule()
    def reopen(self) -> None:
        self.hub = LocalHub(self.hub.home)

    @invariant()
    def the_hub_holds_what_the_model_holds(self) -> None:
        expected = {
            name: (sorted(live), {alias: target for alias in ALIASES if (target := self.model.target(name, alias))})
            for name, live in self.model.live.items()
            if live
        }
        found = {
            adapter.name: ([version.version for version in adapter.versions], dict(adapter.aliases))
            for adapter in self.hub.adapters()
        }
        assert found == expected

    @invariant()
    def nothing_referenced_is_lost(self) -> None:
        for name, live in self.model.live.items():
            for version, content in live.items():
                resolved = self.hub.resolve(Reference(name, str(version)))
                assert self.hub.manifest(resolved.digest).virtual_tokens == content + 1
                self.hub.verify(Reference(name, str(version)))

    @invariant()
    def the_log_only_grows(self) -> None:
        log = self.hub.events(0)
        assert log[: len(self.seen)] == self.seen
        assert [event.seq for event in log] == list(range(1, self.hub.head() + 1))
        self.seen = log


Hubs.TestCase.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_sequence_of_operations_leaves_what_the_model_says = Hubs.TestCase
