"""The command line in one process: every listing as a person and as a program reads it, and every refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hub import cli
from hub.fidelity import OF_FULL_RANK
from hub.registry import LocalHub
from tests.unit.hub.kinds import CASES, write
from tests.unit.hub.makers import write_golden, write_lora

Run = Callable[..., "Outcome"]


class Outcome:
    def __init__(self, result: Any) -> None:
        self.out, self.err, self.code = result.stdout, result.stderr, result.exit_code

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    environment = {"MULTIGRAFT_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "USER": "ada", "HUB_URL": None}

    def hub(*arguments: str | Path, code: int = 0, **extra: str) -> Outcome:
        result = CliRunner().invoke(cli.app, [*map(str, arguments)], env={**environment, **extra})
        assert result.exit_code == code, result.output + repr(result.exception)
        return Outcome(result)

    return hub


@pytest.fixture
def pushed(run: Run, tmp_path: Path, base: Path) -> tuple[Run, list[str]]:
    """Two versions of team/legal, of which the first is prod."""
    one = write_golden(write_lora(tmp_path / "one", base, seed=1))
    (one / "metrics.json").write_text('{"eval_loss": 0.5}')
    two = write_lora(tmp_path / "two", base, seed=2, lora_alpha=32)
    run("push", one, "team/legal", "--alias", "prod", "--note", "first try")
    run("push", two, "team/legal")
    return run, [item["digest"] for item in run("ls", "--json").json[0]["versions"]]


def test_the_same_bytes_again_are_told(pushed: tuple[Run, list[str]], tmp_path: Path) -> None:
    run, digests = pushed
    again = run("push", tmp_path / "two", "team/legal")
    assert (again.out, again.err) == (f"team/legal@2 {digests[1]}\n", "the same bytes were there already\n")
    assert run("push", "-q", tmp_path / "two", "team/legal").out == f"{digests[1]}\n"
    assert run("push", "--json", tmp_path / "two", "team/legal").json == {
        "name": "team/legal", "version": 2, "digest": digests[1], "created": False,
    }  # fmt: skip


def test_ls_lists_names_versions_and_aliases(pushed: tuple[Run, list[str]]) -> None:
    run, _ = pushed
    header, line = run("ls").out.splitlines()
    assert header.split() == ["NAME", "VERSIONS", "KIND", "SIZE", "ALIASES", "PUSHED", "BY"]
    assert re.fullmatch(r"team/legal +1-2 +lora +4\.\d kB +latest=2 prod=1 +20[-\d]+ [:\d]+ +ada", line)
    assert run("ls", "-q", "team/*").out == "team/legal\n"
    nothing = run("ls", "other*")
    assert (nothing.out, nothing.err) == ("", "nothing fits other*\n")
    assert run("ls", "other*", "--json").json == []


def test_show_tells_everything_of_one_version(pushed: tuple[Run, list[str]]) -> None:
    run, digests = pushed
    shown = run("show", "team/legal@prod", "--json").json
    assert (shown["name"], shown["version"], shown["digest"], shown["aliases"]) == (
        "team/legal", 1, digests[0], ["prod"],
    )  # fmt: skip
    assert (shown["pushed"]["by"], shown["pushed"]["note"]) == ("ada", "first try")
    assert shown["manifest"]["base"]["fingerprint"]
    text = run("show", "team/legal@1").out
    for part in (digests[0], "first try", "tiny-llama", "q_proj, v_proj", "eval_loss = 0.5", "golden.safetensors"):
        assert part in text


def test_log_and_diff_are_read_by_people_and_programs(pushed: tuple[Run, list[str]]) -> None:
    run, _ = pushed
    run("alias", "team/legal@2", "prod", "--note", "better")
    run("rollback", "team/legal", "prod")
    log = run("log", "team/legal", "--json").json
    assert [(event["seq"], event["kind"], event["alias"], event["rollback"]) for event in log][-2:] == [
        (6, "alias_moved", "prod", False),
        (7, "alias_moved", "prod", True),
    ]
    lines = run("log", "team/legal").out.splitlines()
    assert re.search(r"ada +moved prod 1 -> 2 +better", lines[-2])
    assert re.search(r"ada +rolled back prod 2 -> 1", lines[-1])
    changes = run("diff", "team/legal@1", "team/legal@2", "--json").json["changes"]
    assert {"field": "config.lora_alpha", "before": 8, "after": 32} in changes
    text = run("diff", "team/legal@1", "team/legal@2").out
    assert re.search(r"config\.lora_alpha +8 +32", text)
    assert re.search(r"metrics\.eval_loss +0\.5 +-", text)
    assert run("diff", "team/legal@1", "team/legal@prod").err == "no difference\n"


def test_aliases_move_and_say_from_where_to_where(pushed: tuple[Run, list[str]]) -> None:
    run, digests = pushed
    assert run("alias", "team/legal@prod", "staging").out == f"team/legal@staging: nowhere -> 1 {digests[0]}\n"
    assert run("alias", "team/legal@1", "prod").err == "team/legal@prod points to version 1 already\n"
    assert run("alias", "team/legal@1", "prod", "--json").json is None
    assert run("alias", "team/legal@2", "prod", "--expect", "0", code=1).err.endswith("nothing was moved\n")


def test_verify_without_a_reference_looks_at_everything_and_names_what_is_damaged(
    pushed: tuple[Run, list[str]], tmp_path: Path
) -> None:
    run, digests = pushed
    assert run("verify").out.count("whole:") == 2
    assert run("verify", "team/legal@1").out == f"team/legal@1 {digests[0]} whole: 5 files, {total(run)} bytes\n"
    entry = LocalHub(tmp_path / "home").manifest(digests[0]).file("golden.json")
    assert entry is not None
    (tmp_path / "home" / "blobs" / "sha256" / entry.sha256[:2] / entry.sha256).write_bytes(b"{}")
    damaged = run("verify", code=1)
    assert damaged.err.startswith("hub: team/legal@1 is damaged: golden.json: blob")
    assert damaged.out.count("whole:") == 1
    assert [item["whole"] for item in run("verify", "--json", code=1).json] == [False, True]


def total(run: Run) -> int:
    return sum(entry["size"] for entry in run("show", "team/legal@1", "--json").json["manifest"]["files"])


def test_what_strangers_wrote_cannot_colour_the_terminal(pushed: tuple[Run, list[str]], tmp_path: Path) -> None:
    run, _ = pushed
    run("alias", "team/legal@2", "prod", "--note", "\x1b[31m[red]boo\n\x07")
    assert "?[31m[red]boo??" in run("log", "team/legal").out
    (tmp_path / "two" / "evil\x1b[2J").write_text("")
    assert "\x1b" not in run("push", tmp_path / "two", "legal", code=1).err


def test_bases_are_listed_and_found(run: Run, base: Path) -> None:
    assert run("base", base).out == f"{base}\n"
    assert run("base", base, "--json").json["hidden_size"] == 32
    assert isinstance(run("base", "--json").json, list)
    run("base")


def test_the_doctor_speaks_of_this_machine(run: Run, tmp_path: Path) -> None:
    assert "made at first use" in run("doctor").out
    assert not (tmp_path / "home").exists(), "the doctor only looks"
    run("ls")
    findings = {finding["topic"]: finding for finding in run("doctor", "--json").json}
    assert findings["hub home"]["good"] is True
    assert "adapters 0" in findings["hub home"]["found"]
    assert {"python", "cpu", "memory", "cuda", "packages", "hub serve", "hub train"} <= findings.keys()
    assert str(tmp_path / "home") in run("doctor").out
    (tmp_path / "blocked").write_text("")
    blocked = run("doctor", "--json", MULTIGRAFT_HOME=str(tmp_path / "blocked")).json
    assert blocked[0]["good"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["push", "nowhere", "legal"], 1, "there is no folder nowhere"),
        (["push", ".", "../evil"], 1, "looks like a path"),
        (["push", ".", "legal", "--base", "no/such-base"], 1, "no embedded base"),
        (["show", "legal"], 1, "there is no adapter legal"),
        (["show", "legal@@"], 1, "does not fit"),
        (["log", "legal"], 1, "there is no adapter legal"),
        (["rm", "legal"], 1, "names no version to remove"),
        (["rm", "legal@1"], 1, "there is no adapter legal"),
        (["base", "no-such-base-here"], 1, "no embedded base"),
        (["push"], 2, "Missing argument"),
        (["no-such-command"], 2, "No such command"),
        (["alias", "legal@1", "prod", "--expect", "x"], 2, "Invalid value"),
        (["alias", "legal@1", "prod", "--expect", "-1"], 2, "Invalid value"),
        (["--hub", "hub.example", "ls"], 1, "no address of a hub"),
        (["--hub", "https://me:secret@hub.example", "ls"], 1, "holds no user and no password"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(run: Run, arguments: list[str], code: int, reason: str) -> None:
    done = run(*arguments, code=code)
    assert reason in done.err
    assert done.out == ""


def test_a_remote_hub_named_by_the_environment_is_refused_by_every_command(run: Run) -> None:
    assert "no address of a hub" in run("ls", code=1, HUB_URL="ftp://hub.example").err


def test_the_version_is_printed_before_anything_else_is_looked_at(run: Run) -> None:
    assert run("--version", HUB_URL="https://hub.example").out.startswith("multigraft ")


GREETER = """
import typer

def register(app):
    @app.command()
    def greet():
        typer.echo("hello")

    @app.command()
    def needy():
        import no_such_package_anywhere
"""


def test_other_packages_add_commands_and_a_broken_one_breaks_only_itself(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real installed distribution, as pip would leave it: a module and its entry points."""
    (tmp_path / "a_greeter.py").write_text(GREETER)
    installed = tmp_path / "a_greeter-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: a-greeter\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        f"[{cli.COMMANDS_GROUP}]\ngreet = a_greeter:register\nbroken = no_such_package_anywhere:register\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert run("ls").err == "nothing here yet\n"
    assert run("greet").out == "hello\n"
    assert "pip install 'multigraft[broken]'" in run("broken", code=1).err
    assert "no_such_package_anywhere, which is not installed: pip install" in run("needy", code=1).err
    listed = run("--help").out
    assert all(name in listed for name in ("push", "greet", "broken"))


def shown_of(run: Run, folder: Path, recipe: dict[str, Any] | None, metrics: dict[str, Any] | None) -> tuple[str, Any]:
    """The lines of `hub show` between size and parents, without their names' padding; and its JSON."""
    for name, record in (("recipe.json", recipe), ("metrics.json", metrics)):
        if record is not None:
            (folder / name).write_text(json.dumps(record))
    reference = json.loads(run("push", "--json", folder, "made").out)
    what = f"made@{reference['version']}"
    lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in run("show", what).out.splitlines() if "  " in line)
    return f"{lines['served']} / {lines.get('deviation')}", run("show", what, "--json").json


FUSED = {"fusion": {"method": "ties", "density": 0.5}}
LOSSY = {"relative_error": 0.8125, "worst_relative_error": 0.9, "worst_linear": "model.layers.1.self_attn.v_proj"}


@pytest.mark.parametrize(
    ("recipe", "metrics", "told"),
    [
        (None, {"relative_error": 0.5}, "None"),
        (
            FUSED,
            LOSSY,
            "0.812 of the exact weighted sum of its parents (worst: 0.9 at model.layers.1.self_attn.v_proj)",
        ),
        (
            {"fusion": {"method": "cat"}},
            {**LOSSY, "relative_error": 2.5e-8},
            "none from the exact weighted sum of its parents but rounding (2.5e-08)",
        ),
        (
            {"extraction": {"rank": 4}},
            {"relative_error": 0.1, "whole_relative_error": 0.2},
            "0.1 of the difference of the two models at their Linears (0.2 with what was left out)",
        ),
        (FUSED, None, "not recorded; it stands for the exact weighted sum of its parents"),
        (FUSED, {"relative_error": "small"}, "not recorded; it stands for the exact weighted sum of its parents"),
        (FUSED, {"relative_error": 10**400}, "not recorded; it stands for the exact weighted sum of its parents"),
        (FUSED, {"relative_error": True}, "not recorded; it stands for the exact weighted sum of its parents"),
        ({"fusion": "all of them"}, LOSSY, "None"),
    ],
)
def test_show_tells_what_is_served_exactly_from_what_is_stored_exactly(
    run: Run, tmp_path: Path, base: Path, recipe: dict[str, Any] | None, metrics: dict[str, Any] | None, told: str
) -> None:
    line, shown = shown_of(run, write_lora(tmp_path / "a", base), recipe, metrics)
    assert line == f"exactly as it is stored / {told}"
    assert shown["served_exactly"] is shown["manifest"]["exact"] is True
    if told == "None":
        assert shown["deviation"] is None
    else:
        error = (metrics or {}).get("relative_error")
        assert shown["deviation"]["relative_error"] == (error if type(error) is float else None)


def test_show_tells_that_a_change_of_full_rank_is_approximated(run: Run, tmp_path: Path, base: Path) -> None:
    case = CASES["lokr"]
    line, shown = shown_of(run, write(tmp_path / "a", case, base), None, None)
    assert line.startswith("at low rank: a server measures the error") and line.endswith("/ None")
    assert shown["served_exactly"] is shown["manifest"]["exact"] is False


def test_the_kinds_that_are_approximated_are_those_that_the_page_marks() -> None:
    page = (Path(__file__).parents[3] / "docs" / "hub.md").read_text()
    assert set(re.findall(r"^\| `([\w-]+)`\* \|", page, re.MULTILINE)) == OF_FULL_RANK
