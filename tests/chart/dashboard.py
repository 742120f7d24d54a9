"""The dashboard as its panels and queries, with Grafana's variables filled in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.chart.rendering import CHART

DASHBOARD: dict[str, Any] = json.loads((CHART / "dashboards" / "multigraft.json").read_text())


@dataclass(frozen=True)
class Query:
    panel: str
    expr: str
    legend: str

    def filled(self, *, interval: str = "5m") -> str:
        return self.expr.replace("$__rate_interval", interval).replace("$namespace", ".*").replace("$pod", ".*")


def queries() -> Iterator[Query]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield Query(panel["title"], target["expr"], target["legendFormat"])
