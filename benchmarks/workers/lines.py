"""What an engine without HTTP is wrapped in: batches come as lines of JSON on stdin, seconds go out on stdout.

It runs in the peer's own environment, so it knows the standard library alone. The first line out is {"ready": true}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], list[int | None], int], int]  # prompts, adapters, new -> tokens made


def serve(start: Callable[[dict[str, Any]], Generate]) -> None:
    """`start` is given what the command line says, as JSON."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is for the log
    generate = start(json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any]
        began = time.perf_counter()
        try:
            tokens = generate(asked["prompts"], asked["adapters"], asked["new"])
            answer = {"tokens": tokens, "wall_s": time.perf_counter() - began}
        except Exception as error:  # noqa: BLE001 (the outer edge: the reason goes to the other side)
            answer = {"failed": f"{type(error).__name__}: {error}"[:1000]}
        print(json.dumps(answer), file=out, flush=True)
