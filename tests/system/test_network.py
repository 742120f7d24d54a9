"""A team's day over the network: one registry, two servers, a third who pushes; processes die and come back."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from hub.client import RemoteHub
from tests.registries import READ_KEY, Registry, free_port, running
from tests.system.conftest import API_ENV, BASE, Server, serving
from tests.system.test_swap import ask, metric, stream, wait_for

RandomAdapter = Callable[[str, int], Path]
KINDS = ("lora", "ia3", "prefix", "prompt")
TOKENS = 24


@dataclass
class Site:
    """A server's place: its home and port outlive its process."""

    home: Path
    port: int
    registry: Registry

    def serve(self, *flags: str) -> ExitStack:
        environment = {**API_ENV, "HUB_URL": self.registry.url, "HUB_TOKEN": READ_KEY}
        stack = ExitStack()
        self.server: Server = stack.enter_context(serving(self.home, "--port", str(self.port), *flags, env=environment))
        return stack

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with running(tmp_path / "registry") as process:
        yield process


@pytest.fixture
def team(registry: Registry) -> Iterator[RemoteHub]:
    """The one who pushes and moves."""
    hub = registry.hub()
    yield hub
    hub.close()


@pytest.fixture
def site(registry: Registry, tmp_path: Path) -> Site:
    return Site(tmp_path / "site", free_port(), registry)


def push_two_of_each(team: RemoteHub, random_adapter: RandomAdapter) -> dict[str, str]:
    """Two versions of each kind, `prod` on the first; digest -> NAME@N."""
    labels = {}
    for kind in KINDS:
        for version in (1, 2):
            labels[team.push(random_adapter(kind, version), f"team/{kind}").digest] = f"team/{kind}@{version}"
        team.move_alias(f"team/{kind}", 1, "prod")
    return labels


def serves(where: Site, model: str) -> int:
    """The version that answers now."""
    return int(ask(where.url, model, tokens=1)[1][0]["version"])


def test_streams_go_on_while_aliases_move_and_processes_die(
    registry: Registry, team: RemoteHub, site: Site, tmp_path: Path, random_adapter: RandomAdapter
) -> None:
    labels = push_two_of_each(team, random_adapter)
    other = Site(tmp_path / "other", free_port(), registry)
    done = threading.Event()
    dying = threading.Event()  # the other server is being killed: what it had in hand is lost with it
    seen: dict[int, list[tuple[str, str]]] = {site.port: [], other.port: []}
    failures: list[BaseException] = []

    def keep_asking(where: Site, model: str) -> None:
        while not done.is_set():
            was_dying = dying.is_set()
            try:
                seen[where.port].append(stream(where.url, model, TOKENS))
            except (httpx.TransportError, AssertionError) as error:
                if where is other and (was_dying or dying.is_set()):
                    continue
                failures.append(error)
                return

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda one: one.serve(), (site, other))
    with first, second as replaced:
        alone = {digest: ask(site.url, label, tokens=TOKENS)[0] for digest, label in labels.items()}
        alone[""] = ask(site.url, BASE, tokens=TOKENS)[0]
        assert len(set(alone.values())) == len(alone), "two adapters answer alike, which would prove nothing"
        models = [f"team/{kind}@prod" for kind in KINDS] + [BASE, "team/lora@prod"]
        threads = [
            threading.Thread(target=keep_asking, args=(where, model)) for where in (site, other) for model in models * 2
        ]
        for thread in threads:
            thread.start()

        def move(number: int) -> None:
            kind, version = KINDS[number % 4], 2 if (number // 4) % 2 == 0 else 1
            team.move_alias(f"team/{kind}", version, "prod")
            wait_for(lambda: all(serves(where, f"team/{kind}@prod") == version for where in (site, other)), 180)

        def more_streams() -> None:
            """Both servers finish another eight, whatever else is down."""
            wanted = {port: len(texts) + 8 for port, texts in seen.items()}
            wait_for(lambda: bool(failures) or all(len(seen[port]) >= count for port, count in wanted.items()), 180)

        for number in range(4):
            move(number)
        registry.kill()
        wait_for(lambda: all(httpx.get(f"{one.url}/ready").json()["hub"] == "away" for one in (site, other)))
        assert metric(site.url, "multigraft_hub_reachable") == 0
        more_streams()
        registry.start()
        for number in range(4, 7):
            move(number)
        registry.kill()
        registry.start()
        move(7)
        dying.set()
        other.server.stop(signal.SIGKILL)
        replaced.pop_all().close()
        with other.serve():
            dying.clear()
            move(8)
            move(9)
            more_streams()
            done.set()
            for thread in threads:
                thread.join()
    assert not failures, failures[0]
    answered = seen[site.port] + seen[other.port]
    for text, digest in answered:
        assert text == alone[digest], f"{labels.get(digest, BASE)} did not answer as it does alone"
    assert {digest for _, digest in answered} >= {*labels, ""}, "a version never served"


def test_a_hundred_first_requests_fetch_an_adapter_once_while_others_stream(
    registry: Registry, team: RemoteHub, site: Site, random_adapter: RandomAdapter
) -> None:
    digest = team.push(random_adapter("lora", 1), "team/bot").digest
    with site.serve():
        with ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(lambda _: ask(site.url, "team/bot", tokens=2), range(100)))
        assert {served[0]["digest"] for _, served in answers} == {digest}
        assert len({text for text, _ in answers}) == 1
        assert metric(site.url, 'multigraft_adapter_load_seconds_count{tier="hub"}') == 1
        fetched = [
            float(line.rsplit(" ", 1)[1])
            for line in httpx.get(f"{registry.url}/metrics").text.splitlines()
            if re.match(r'multigraft_registry_requests_total{method="GET",route="[^"]*/files/.*status="200"}', line)
        ]
        assert fetched == [1]  # an adapter of PEFT's own has no golden rows: its weights are all that is fetched


def test_a_server_that_starts_while_the_registry_is_away_serves_what_it_has_had(
    registry: Registry, team: RemoteHub, site: Site, random_adapter: RandomAdapter
) -> None:
    team.push(random_adapter("lora", 1), "team/bot")
    team.push(random_adapter("lora", 2), "team/new")
    with site.serve():
        before = ask(site.url, "team/bot")
    registry.kill()
    with site.serve():
        assert httpx.get(f"{site.url}/ready").status_code == 200
        assert ask(site.url, "team/bot") == before
        unknown = httpx.post(f"{site.url}/v1/completions", json={"model": "team/new", "prompt": "x"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (503, "unavailable")
        assert int(unknown.headers["retry-after"]) >= 1
        assert httpx.get(f"{site.url}/ready").json()["hub"] == "away"
        registry.start()
        wait_for(lambda: httpx.get(f"{site.url}/ready").json()["hub"] == "reachable")
        assert ask(site.url, "team/new")[1][0]["version"] == 1


def test_a_server_loads_only_the_names_that_it_is_allowed(
    team: RemoteHub, site: Site, random_adapter: RandomAdapter
) -> None:
    for name in ("team/bot", "team/secret", "other/bot"):
        team.push(random_adapter("lora", 1), name)
    with site.serve("--allow", "team/b*", "--allow", "x"):
        assert ask(site.url, "team/bot@1")[1][0]["version"] == 1
        unknown = httpx.post(f"{site.url}/v1/completions", json={"model": "team/nothing", "prompt": "x"})
        for name in ("team/secret", "team/secret@1", "other/bot", "team/bot+other/bot"):
            refused = httpx.post(f"{site.url}/v1/completions", json={"model": name, "prompt": "x"})
            assert refused.status_code == 404
            assert refused.json()["error"]["code"] == unknown.json()["error"]["code"] == "model_not_found"
        listed = [one["id"] for one in httpx.get(f"{site.url}/v1/models").json()["data"]]
        assert listed == [BASE, "team/bot"]
