"""Whoever watches a registry hears every event once, in order, over kills and restarts of it."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx

from hub.contract import Event
from hub.errors import HubUnavailable, NotFound
from hub.registry import LocalHub
from tests.registries import ADMIN_KEY, READ_KEY, running, threaded
from tests.unit.hub.makers import write_base, write_prompt

ROUNDS = 4
WAIT_S = 60.0


def test_a_watcher_misses_nothing_while_the_registry_is_killed_and_restarted(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    heard: list[Event] = []
    enough, wanted = threading.Condition(), [0]

    with running(tmp_path / "hub") as registry:

        def listen() -> None:
            """As a server does: on with the number after the last one heard, whatever happens to the connection."""
            hub = registry.hub(READ_KEY)
            while True:
                try:
                    for events in hub.watch(heard[-1].seq if heard else 0):
                        with enough:
                            heard.extend(events)
                            enough.notify()
                            if wanted[0] < 0:
                                return
                except (HubUnavailable, NotFound):
                    if wanted[0] < 0:
                        return

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        team = registry.hub()
        for number in range(ROUNDS):
            team.push(write_prompt(tmp_path / f"a{number}", base, tokens=number + 1), "team/bot", aliases=["prod"])
            registry.kill()
            registry.start()
            if number:
                team.rollback("team/bot", "prod")
        head = team.head()
        with enough:
            assert enough.wait_for(lambda: len(heard) >= head, WAIT_S)
        wanted[0] = -1
    assert [event.seq for event in heard] == list(range(1, head + 1))
    assert {event.kind for event in heard} == {"pushed", "alias_moved"}


def test_the_stream_is_server_sent_events_with_numbers_to_resume_from(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    with running(tmp_path / "hub") as registry:
        team = registry.hub()
        for number in range(2):
            team.push(write_prompt(tmp_path / f"a{number}", base, tokens=number + 1), "team/bot")
        headers = {"authorization": f"Bearer {READ_KEY}", "last-event-id": "2"}
        with httpx.stream("GET", f"{registry.url}/api/v1/events", headers=headers, timeout=WAIT_S) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = answer.iter_lines()
            told = [next(line for line in lines if line.startswith("id:")) for _ in range(2)]
        assert told == ["id: 3", "id: 4"]


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    with threaded(LocalHub(tmp_path / "hub")) as url:
        for last in ("-1", "x", "1e3", "9" * 16):
            headers = {"authorization": f"Bearer {ADMIN_KEY}", "last-event-id": last}
            refused = httpx.get(f"{url}/api/v1/events", headers=headers)
            assert refused.status_code == 400
            assert "Last-Event-ID must be the number of an event" in refused.json()["error"]["message"]
