"""Every scenario by its name."""

from __future__ import annotations

from benchmarks.scenarios import cold, idle, kinds, many, memory, overhead, popularity, rare, w1, w2

_MODULES = (w1, w2, overhead, kinds, popularity, many, cold, rare, idle, memory)
SCENARIOS = {module.SCENARIO.name: module.SCENARIO for module in _MODULES}
