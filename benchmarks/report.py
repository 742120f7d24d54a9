"""What the command line of every benchmark does: run in a room that is gone afterwards, write a result and a table."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Report = dict[str, Any]
Counts = Mapping[str, int]
SERVING = ("multigraft", "torch", "transformers", "peft")  # whose versions matter where a server answers


def command(
    name: str,
    doc: str | None,
    counts: Counts,
    run: Callable[[Path, Counts], Report],
    table: Callable[[Report], str],
) -> None:
    """`counts` are the options, whole numbers by name, with their defaults; the result is NAME.json."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in counts.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = vars(parser.parse_args())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # not without ending what it has started
    with tempfile.TemporaryDirectory(prefix="multigraft-bench-") as room:
        report = run(Path(room), {option: asked[option] for option in counts})
    asked["out"].mkdir(parents=True, exist_ok=True)
    (asked["out"] / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))  # noqa: T201
