"""What the chart renders, run: both halves start with their ConfigMaps, `helm test` passes, Prometheus finds it all.

The queries of alerts and dashboard are put to a Prometheus that scrapes the two processes.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.chart import series
from tests.chart.dashboard import queries
from tests.chart.processes import Machine, free_ports, status
from tests.chart.rendering import CHART, rendered, template
from tests.chart.test_monitoring import rules

REGISTRY, SERVER = "r-multigraft-registry", "r-multigraft-server"
HALVES = {REGISTRY: series.REGISTRY, SERVER: series.SERVER}
SCRAPES = 4
SCRAPE_TIMEOUT_S = 60.0
MAY_BE_EMPTY = {"Refused"}  # no version was refused
OF_THE_DISK = re.compile("MultigraftRegistryDisk")


@pytest.fixture(scope="module")
def machine(helm4: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Registry and server as a bare `helm install` starts them, but for fewer threads and less memory."""
    small = ["server.resources.requests.cpu=1", "server.options.kvBytes=33554432", "tests.timeoutSeconds=60"]
    text = template(helm4, *(word for value in small for word in ("--set", value)))
    registry, server = free_ports(2)
    running = Machine(rendered(text), tmp_path_factory.mktemp("machine"), {REGISTRY: registry, SERVER: server})
    with running.deployment(REGISTRY) as one, running.deployment(SERVER) as other:
        yield running
        for process in (one, other):
            process.send_signal(signal.SIGTERM)
        for process, name in ((one, REGISTRY), (other, SERVER)):
            found = running.rendered.find("Deployment", name)
            assert found is not None
            grace = found["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
            assert process.wait(timeout=grace) == 0, f"{name} did not end by itself"


@pytest.fixture(scope="module")
def tested(machine: Machine) -> Machine:
    """After `helm test`, and a few requests that were refused."""
    for name in ("r-multigraft-test-registry", "r-multigraft-test-server"):
        done = machine.pod(name)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "RED APPLE" in done.stdout
    return machine


@pytest.fixture(scope="module")
def scraped(tested: Machine, prometheus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that has scraped both a few times, while requests went on."""
    room = tmp_path_factory.mktemp("prometheus")
    jobs = [
        {
            "job_name": f"multigraft-{name.rpartition('-')[2]}",
            "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "team", "pod": f"{name}-0"}}],
        }
        for name, port in tested.ports.items()
    ]
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}
    (room / "prometheus.yaml").write_text(yaml.safe_dump(config))
    [port] = free_ports(1)
    command = [str(prometheus), f"--config.file={room / 'prometheus.yaml'}", f"--storage.tsdb.path={room / 'data'}"]
    with (room / "log").open("wb") as out:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=out, stderr=out, cwd=room
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + SCRAPE_TIMEOUT_S
        while status(f"{url}/-/ready") != 200 or len(ask(url, f"count_over_time(up[1m]) >= {SCRAPES}")) < 2:
            assert process.poll() is None and time.monotonic() < deadline, (room / "log").read_text()[-4000:]
            assert tested.pod("r-multigraft-test-server").returncode == 0
            assert status(f"http://127.0.0.1:{tested.ports[REGISTRY]}/api/v1/adapters") == 401
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def ask(url: str, query: str) -> list[Any]:
    """The vector that a query gives now."""
    address = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(address, timeout=30) as answer:
        found: list[Any] = json.load(answer)["data"]["result"]
        return found


@pytest.mark.parametrize("name", HALVES)
def test_the_probes_are_answered(name: str, machine: Machine) -> None:
    found = machine.rendered.find("Deployment", name)
    assert found is not None
    [container] = found["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = container[probe]["httpGet"]["path"]
        assert status(f"http://127.0.0.1:{machine.ports[name]}{path}") == 200, probe


def test_without_a_key_nothing_but_the_open_routes_answers(machine: Machine) -> None:
    assert status(f"http://127.0.0.1:{machine.ports[SERVER]}/v1/models") == 401
    assert status(f"http://127.0.0.1:{machine.ports[REGISTRY]}/api/v1/adapters") == 401


def test_helm_test_pushes_serves_and_asks(tested: Machine) -> None:
    again = tested.pod("r-multigraft-test-registry")
    assert again.returncode == 0, again.stderr
    assert "helm-test/shout@1 " in again.stdout, "a second test pushes no second version"


def test_a_server_that_does_not_answer_fails_the_test_pod() -> None:
    [port] = free_ports(1)
    asked = {"SERVER_URL": f"http://127.0.0.1:{port}", "API_KEY": "k", "MODEL": "", "EXPECT": "x", "TIMEOUT_S": "1"}
    command = [sys.executable, str(CHART / "files" / "ask.py")]
    done = subprocess.run(command, env=asked, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "refused" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", HALVES)
def test_the_table_of_series_is_what_is_shown(name: str, tested: Machine) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{tested.ports[name]}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    shown: dict[str, set[frozenset[str]]] = {}
    for sample in (sample for family in families for sample in family.samples):
        shown.setdefault(sample.name, set()).add(frozenset(sample.labels))
    for series_name, labels in HALVES[name].items():
        assert shown.get(series_name) == {labels}, series_name


def test_every_query_of_the_dashboard_finds_something(scraped: str) -> None:
    found = {query: ask(scraped, query.filled(interval="1m")) for query in queries()}
    assert {query.panel for query, result in found.items() if not result} <= MAY_BE_EMPTY
    for query, result in found.items():
        for label in re.findall(r"{{(\w+)}}", query.legend):
            assert all(label in item["metric"] for item in result), f"{query.panel}: no {label} to show"


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_is_silent_while_all_is_well(rule: dict[str, Any], scraped: str) -> None:
    found = ask(scraped, rule["expr"])
    assert OF_THE_DISK.match(rule["alert"]) or found == []
