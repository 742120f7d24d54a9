"""What the interpreter cannot show: that a GPU's compiler takes the kernels, and uses the tensor cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux on x86_64 only")

ROOT = Path(__file__).parents[4]


def test_every_kernel_compiles_for_the_gpus_it_is_meant_for(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run(
        [sys.executable, "-m", "tests.unit.server.kernels.compile_kernels"],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    lines = [line.split(maxsplit=3) for line in made.stdout.splitlines()]
    assert {kernel for kernel, *_ in lines} == {"_shrink", "_expand", "_attend", "_combine"}
    for kernel, element, size, cores in lines:
        assert int(size) > 0
        assert cores == ("none" if kernel == "_combine" or element == "fp32" else "tensor cores"), (kernel, element)
