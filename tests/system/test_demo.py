"""`hub demo` from the first step to the last: it measures itself and exits 0 only when everything it shows held."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from tests.system.conftest import HUB, environment, hub


def test_the_demo_trains_serves_swaps_compares_and_fuses(home: Path) -> None:
    done = subprocess.run(
        [*HUB, "demo"],
        env=environment(home, COLUMNS="120"),
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines()]
    rows = [cells[1:-1] for cells in table if len(cells) == 9 and cells[1].startswith("demo/")]
    assert [row[0] for row in rows] == ["demo/shout@1", "demo/reverse@1", "demo/pirate@1", "demo/code@1", "demo/code@2"]
    assert [row[1] for row in rows] == ["prompt", "prefix", "ia3", "lora", "lora"]
    for row in rows[:3] + rows[4:]:
        assert (float(row[4]) <= 0.05, float(row[5]) >= 0.9, row[6]) == (True, True, "20/20"), row
    assert re.search(r"12 streams open: \d+ streams finished, 0 dropped", " ".join(done.stdout.split()))
    names = {line["name"]: line for line in json.loads(hub(home, "ls", "--json").stdout)}
    assert set(names) == {"demo/shout", "demo/reverse", "demo/pirate", "demo/code"}
    assert names["demo/code"]["aliases"] == {"latest": 2, "prod": 2}
    hub(home, "verify")
