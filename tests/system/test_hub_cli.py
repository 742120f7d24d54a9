"""The command line as a person uses it: real processes, exit codes, what stands on stdout and what on stderr."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hub.registry import LocalHub
from tests.unit.hub.makers import write_base, write_lora

DIGEST = r"sha256:[0-9a-f]{64}"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run `hub` on a home of its own, and check the exit code."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MULTIGRAFT_", "HUB_"))}
    environment = {**kept, "MULTIGRAFT_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "USER": "ada"}

    def hub(*arguments: str | Path, code: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from hub.cli import main; main()", *map(str, arguments)]
        done = subprocess.run(
            command, env={**environment, **extra}, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == code, f"{arguments}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return hub


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Path, Path]:
    base = write_base(tmp_path / "base")
    return write_lora(tmp_path / "one", base, seed=1), write_lora(tmp_path / "two", base, seed=2, lora_alpha=32)


def test_from_push_to_rollback_as_a_person_does_it(run: Run, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    first = run("push", adapters[0], "team/legal", "--alias", "prod", "--note", "first try").stdout
    assert re.fullmatch(rf"team/legal@1 {DIGEST}\n", first)
    second = run("push", adapters[1], "team/legal").stdout
    assert re.fullmatch(rf"team/legal@2 {DIGEST}\n", second)
    digests = [line.split()[1] for line in (first, second)]
    assert json.loads(run("ls", "--json").stdout) == [
        {
            "name": "team/legal",
            "versions": [{"version": number, "digest": digests[number - 1], "kind": "lora"} for number in (1, 2)],
            "aliases": {"latest": 2, "prod": 1},
        }
    ]
    assert run("alias", "team/legal@2", "prod", "--expect", "1").stdout == f"team/legal@prod: 1 -> 2 {digests[1]}\n"
    lost = run("alias", "team/legal@2", "prod", "--expect", "1", code=1)
    assert lost.stderr == (
        "hub: alias prod of team/legal points to version 2, not to version 1 as expected; nothing was moved\n"
    )
    assert run("rollback", "team/legal", "prod").stdout == f"team/legal@prod: 2 -> 1 {digests[0]}\n"
    assert run("pull", "team/legal@prod", tmp_path / "out").stdout == first
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert run("rm", "team/legal@1", code=1).stderr.startswith("hub: team/legal@1 is in use: prod points there")
    run("alias", "team/legal@2", "prod")
    assert run("rm", "team/legal@1").stdout.startswith(f"removed team/legal@1 {digests[0]}")
    assert re.fullmatch(r"freed 2 blobs, \d+ bytes\n", run("gc").stdout)
    assert run("verify").stdout.startswith(f"team/legal@2 {digests[1]} whole: 2 files")


def test_a_refusal_is_told_on_stderr_and_exits_1_and_wrong_usage_exits_2(run: Run, adapters: tuple[Path, Path]) -> None:
    (adapters[0] / "adapter_model.bin").write_bytes(b"")
    refused = run("push", adapters[0], "legal", code=1)
    assert refused.stdout == ""
    assert refused.stderr.startswith("hub: one was refused: 1 problem\n  adapter_model.bin: is a pickle")
    assert "Missing argument" in run("push", code=2).stderr


def test_listing_loads_nothing_heavy(tmp_path: Path) -> None:
    """`hub ls` must answer at once: no torch, and no migrations once the catalogue is there."""
    script = (
        "import sys; from hub.registry import LocalHub; from pathlib import Path; import hub.cli;"
        "LocalHub(Path(sys.argv[1])).adapters();"
        "print([name for name in ('torch', 'numpy', 'pydantic', 'alembic', 'huggingface_hub', 'server', 'trainer')"
        " if name in sys.modules])"
    )
    LocalHub(tmp_path)
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
