"""Alerts and dashboard: promtool reads them, every alert comes and stays away, nothing unknown is asked for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart import series
from tests.chart.dashboard import DASHBOARD, Query, queries
from tests.chart.rendering import CHART, rendered

ALERTS = sorted((CHART / "alerts").glob("*.yaml"))
TESTS = Path(__file__).parent / "alerts"
QUERIES = list(queries())


def rules() -> list[dict[str, Any]]:
    files = [yaml.safe_load(path.read_text()) for path in ALERTS]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def run(promtool: Path, *arguments: str | Path) -> None:
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", ALERTS, ids=lambda path: path.stem)
def test_promtool_reads_the_rules_and_finds_nothing_doubled(file: Path, promtool: Path) -> None:
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", file)


@pytest.mark.parametrize("file", ALERTS, ids=lambda path: path.stem)
def test_the_alerts_come_and_stay_away(file: Path, promtool: Path) -> None:
    run(promtool, "test", "rules", TESTS / f"{file.stem}.test.yaml")


def test_every_alert_has_both_kinds_of_test() -> None:
    expected: dict[str, set[bool]] = {rule["alert"]: set() for rule in rules()}
    for file in TESTS.glob("*.test.yaml"):
        for test in yaml.safe_load(file.read_text())["tests"]:
            for case in test["alert_rule_test"]:
                expected[case["alertname"]].add(bool(case.get("exp_alerts")))
    assert {name for name, kinds in expected.items() if kinds != {True, False}} == set()


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_asks_only_for_what_there_is(rule: dict[str, Any]) -> None:
    assert series.strange(rule["expr"]) == []
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description"}


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.panel)
def test_a_panel_asks_only_for_what_there_is(query: Query) -> None:
    assert series.strange(query.filled()) == []
    shown = set(re.findall(r"{{(\w+)}}", query.legend))
    everything = series.TARGET.union(*(series.KNOWN[name] for name, _ in series.asked(query.filled())))
    assert shown <= everything
    if " by (" in query.expr and "group_right" not in query.expr:
        assert shown <= series.grouped(query.expr), "the legend names a label that the query sums away"


def test_promtool_reads_every_query_of_the_dashboard(promtool: Path, tmp_path: Path) -> None:
    recorded = [{"record": f"panel:{number}", "expr": query.filled()} for number, query in enumerate(QUERIES)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    run(promtool, "check", "rules", "--lint=none", file)


def test_the_dashboard_is_laid_out_without_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_shows_everything_that_is_counted() -> None:
    asked = {name for query in QUERIES for name, _ in series.asked(query.filled())}
    assert set(series.KNOWN) - asked == set()


def test_the_chart_carries_alerts_and_dashboard_unchanged(texts: dict[str, str]) -> None:
    found = rendered(texts["production"])
    dashboard = found.find("ConfigMap", "r-multigraft-dashboard")
    assert dashboard is not None
    assert yaml.safe_load(dashboard["data"]["multigraft.json"]) == DASHBOARD
    for half in ("registry", "server"):
        rule = found.find("PrometheusRule", f"r-multigraft-{half}")
        assert rule is not None
        assert rule["spec"] == yaml.safe_load((CHART / "alerts" / f"{half}.yaml").read_text())


def test_an_unknown_series_or_label_is_found() -> None:
    assert series.strange("rate(multigraft_request_total[5m])") == ["multigraft_request_total"]
    assert series.strange('multigraft_requests_total{outcom="failed"}') == ["multigraft_requests_total{outcom}"]
    assert series.strange("sum by (adaptor) (rate(multigraft_requests_total[5m]))") == ["adaptor"]
    assert series.strange("vector(1)") == ["asks for nothing"]
