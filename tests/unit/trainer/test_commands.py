"""`hub fuse` and `hub extract`: what they refuse, in one line and with which exit code, before any work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hub.cli import app

MIXTURE = "team/one*0.5+team/two"


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    assert not done.stdout
    return done.exit_code, " ".join(done.stderr.split())


@pytest.fixture(autouse=True)
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIGRAFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HUB_URL", raising=False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--method ties", "ties needs --density"),
        ("--method cat --rank 4", "cat is exact"),
        ("--method linear --energy 0.9", "linear is exact"),
        ("--method svd --rank 4 --energy 0.9", "exclude each other"),
        ("--method svd --density 0.5", "svd keeps every entry"),
        ("--method ties --density 0.5 --seed 1", "ties throws no dice"),
        ("--method dare_ties --density 0", "--density is 0.0, not above 0 and at most 1"),
        ("--method dare_ties --density 0.5 --energy 1.5", "--energy is 1.5, not above 0 and at most 1"),
        ("--method mean", "'mean' is not one of"),
    ],
)
def test_options_of_a_fusion_that_do_not_go_together_are_wrong_usage(options: str, reason: str) -> None:
    code, said = run("fuse", MIXTURE, *options.split(), "--as", "team/both")
    assert code == 2 and reason in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--rank 2", "give --out FOLDER, --push NAME or both"),
        ("--out x", "give --rank N or --energy E"),
        ("--out x --rank 2 --energy 0.5", "give --rank N or --energy E"),
        ("--out x --energy 0", "--energy is 0.0, not above 0 and at most 1"),
        ("--out x --rank 2 --alias prod", "--alias and --note go with --push"),
    ],
)
def test_options_of_an_extraction_that_do_not_go_together_are_wrong_usage(arguments: str, reason: str) -> None:
    code, said = run("extract", "seedling", "seedling", *arguments.split())
    assert code == 2 and reason in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("fuse team/one++team/two --method cat --as both", "hub: a mixture has an empty term"),
        ("fuse team/one --method cat --as both@2", "hub: --as both@2: a name is wanted, without a version or alias"),
        ("fuse team/one --method svd --rank 257 --as both", "hub: rank 257 is above max_rank 256 (the largest that"),
        ("fuse team/one --method cat --as both", "hub: there is no adapter team/one"),
        ("extract seedling seedling --rank 257 --push both", "hub: rank 257 is above max_rank 256 (the largest that"),
        ("extract seedling seedling --energy 0.9 --max-rank 300 --push both", "hub: rank 300 is above max_rank 256"),
        ("extract seedling . --rank 2 --out tests", "hub: tests is already there"),
    ],
)
def test_a_refusal_is_one_line_before_any_work(arguments: str, said: str) -> None:
    code, heard = run(*arguments.split())
    assert code == 1 and heard.startswith(said)


def test_the_commands_are_known_without_torch() -> None:
    script = "import sys, trainer.commands; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
