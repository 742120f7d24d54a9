"""The event stream: what its watcher may see, from where it stopped, as long as its key lives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from hub.http.config import RegistryConfig
from hub.registry import LocalHub
from tests.registries import ADMIN_KEY, threaded
from tests.unit.hub.makers import write_lora

EVENTS = "/api/v1/events"
WATCHERS = 3


@pytest.fixture
def hub(tmp_path: Path) -> LocalHub:
    return LocalHub(tmp_path / "home")


@pytest.fixture
def client(hub: LocalHub) -> Iterator[httpx.Client]:
    config = RegistryConfig(admin_key=ADMIN_KEY, max_watchers=WATCHERS)
    with threaded(hub, config) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@contextmanager
def watching(
    client: httpx.Client, *, key: str = ADMIN_KEY, after: int | None = None, last: str | None = None
) -> Iterator[Iterator[str]]:
    """The lines of a stream, once it has begun."""
    headers = {"authorization": f"Bearer {key}", **({} if last is None else {"last-event-id": last})}
    asked = {} if after is None else {"after": after}
    with client.stream("GET", EVENTS, params=asked, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(lines) == ": watching"
        yield lines


def told(lines: Iterator[str], count: int) -> list[tuple[int, str, str]]:
    """The next events: number, kind and name, as a browser would read them."""
    found: list[tuple[int, str, str]] = []
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if name:
            fields[name] = value
        elif line == "" and "data" in fields:
            event = json.loads(fields["data"])
            assert (str(event["seq"]), event["kind"]) == (fields["id"], fields["event"])
            found.append((event["seq"], event["kind"], event["name"]))
            fields = {}
            if len(found) == count:
                return found
    return found


def test_a_watcher_is_told_all_that_was_and_all_that_comes(client: httpx.Client, hub: LocalHub, adapter: Path) -> None:
    hub.push(adapter, "legal")
    with watching(client) as lines:
        assert told(lines, 2) == [(1, "pushed", "legal"), (2, "alias_moved", "legal")]
        hub.move_alias("legal", 1, "prod")
        assert told(lines, 1) == [(3, "alias_moved", "legal")]


@pytest.mark.parametrize(("after", "last", "first"), [(None, None, 1), (0, None, 1), (2, None, 3), (None, "2", 3),
                                                      (1, "2", 2)])  # fmt: skip
def test_a_watcher_goes_on_where_it_stopped(
    client: httpx.Client, hub: LocalHub, adapter: Path, after: int | None, last: str | None, first: int
) -> None:
    hub.push(adapter, "legal", aliases=["prod", "staging"])
    with watching(client, after=after, last=last) as lines:
        assert [seq for seq, _, _ in told(lines, 4 - first + 1)] == list(range(first, 5))


def test_a_watcher_of_some_names_hears_of_no_others(
    client: httpx.Client, hub: LocalHub, adapter: Path, base: Path, tmp_path: Path
) -> None:
    key = hub.keys.create("ci", ["read"], names=["team/*"], actor="test").secret
    hub.push(write_lora(tmp_path / "other", base, seed=1), "other/legal")
    hub.push(adapter, "team/legal")
    with watching(client, key=key) as lines:
        assert [name for _, _, name in told(lines, 2)] == ["team/legal", "team/legal"]


def test_a_stream_ends_with_its_key(client: httpx.Client, hub: LocalHub, adapter: Path) -> None:
    created = hub.keys.create("ci", ["read"], actor="test")
    hub.push(adapter, "legal")
    with watching(client, key=created.secret, after=2) as lines:
        hub.keys.revoke(created.key.key)
        hub.move_alias("legal", 1, "prod")
        assert told(lines, 1) == [], "what happens after the revocation is not told"


def test_a_watcher_who_has_seen_more_than_there_was_is_told_so(client: httpx.Client) -> None:
    answer = client.get(EVENTS, params={"after": 1}, headers={"authorization": f"Bearer {ADMIN_KEY}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "log_lost")


@pytest.mark.parametrize("last", ["", "x", "-1", "1.5", "1" * 16, "²", "0x1", "1 1"])
def test_a_last_event_that_is_no_number_is_refused(client: httpx.Client, last: str) -> None:
    headers = [(b"authorization", f"Bearer {ADMIN_KEY}".encode()), (b"last-event-id", last.encode("latin-1"))]
    answer = client.get(EVENTS, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")


def test_there_are_only_so_many_watchers_and_a_place_is_free_when_one_leaves(client: httpx.Client) -> None:
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    with watching(client), watching(client), watching(client):
        answer = client.get(EVENTS, headers=headers)
        assert (answer.status_code, answer.headers["retry-after"].isdecimal()) == (503, True)
        assert f"the limit is {WATCHERS}" in answer.json()["error"]["message"]
        assert "multigraft_registry_watchers 3.0" in client.get("/metrics").text
    while "multigraft_registry_watchers 0.0" not in client.get("/metrics").text:
        continue
    with watching(client):
        pass
