"""Every scenario by its name."""

from __future__ import annotations

from benchmarks.scenarios import w1, w2

SCENARIOS = {one.name: one for one in (w1.SCENARIO, w2.SCENARIO)}
