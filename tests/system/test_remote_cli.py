"""Every `hub` command with a hub that is elsewhere: what a person and a program read, and one clear line for each no.

The story of a team and the refusals run as processes against a `hub registry`; what must be equal to the local hub,
word for word, is compared in one process.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hub import cli
from hub.credentials import FILE
from hub.http.config import RegistryConfig
from hub.methods import Limits
from hub.registry import LocalHub
from tests.forks import hub_command
from tests.networks import answer, answering
from tests.registries import ADMIN_KEY, READ_KEY, Registry, free_port, running, threaded
from tests.unit.hub.makers import write_base, write_golden, write_lora

DIGEST = r"sha256:[0-9a-f]{64}"
KEY = r"mgk_[0-9a-f]{12}_[A-Za-z0-9_-]{43}"
Done = subprocess.CompletedProcess[str]


class Person:
    """Somebody with a home of their own, who types commands."""

    def __init__(self, home: Path, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MULTIGRAFT_", "HUB_"))}
        self.home = home
        self.environment = {**kept, "MULTIGRAFT_HOME": str(home), "HF_HUB_OFFLINE": "1", **environment}

    def __call__(self, *arguments: str | Path, code: int = 0, **extra: str) -> Done:
        notes = self.home.with_name(f"{self.home.name}-said")
        done = hub_command([*map(str, arguments)], {**self.environment, **extra}, notes=notes)
        assert done.returncode == code, f"{arguments}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    @property
    def keys(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.home / FILE).read_text())
        return found


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    home = tmp_path_factory.mktemp("registry") / "home"
    home.mkdir()
    with running(home) as one:
        yield one


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("adapters")
    base = write_base(root / "base")
    one = write_golden(write_lora(root / "one", base, seed=1))
    (one / "metrics.json").write_text('{"eval_loss": 0.5}')
    return one, write_lora(root / "two", base, seed=2, lora_alpha=32)


def test_from_the_first_key_to_the_last_blob_as_a_team_does_it(
    registry: Registry, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    operator, ada = Person(registry.home), Person(tmp_path / "ada", HUB_URL=registry.url)
    secret = operator("key", "create", "ada", "--scope", "admin").stdout.strip()
    assert re.fullmatch(KEY, secret)

    login = ada("login", registry.url, "--key", secret)
    assert login.stdout == f"{registry.url} knows you as ada, who may admin; stored in {ada.home / FILE}\n"
    assert ada.keys == {registry.url: secret}
    assert stat.S_IMODE((ada.home / FILE).stat().st_mode) == 0o600

    first = ada("push", adapters[0], "team/legal", "--alias", "prod", "--note", "first try").stdout
    assert re.fullmatch(rf"team/legal@1 {DIGEST}\n", first)
    second = ada("push", adapters[1], "team/legal").stdout
    assert re.fullmatch(rf"team/legal@2 {DIGEST}\n", second)
    digests = [line.split()[1] for line in (first, second)]
    assert ada("ls", "-q").stdout == "team/legal\n"
    assert "first try" in ada("show", "team/legal@prod").stdout
    assert re.search(r"config\.lora_alpha +8 +32", ada("diff", "team/legal@1", "team/legal@2").stdout)
    assert ada("alias", "team/legal@2", "prod", "--expect", "1").stdout == (f"team/legal@prod: 1 -> 2 {digests[1]}\n")
    lost = ada("alias", "team/legal@2", "prod", "--expect", "1", code=1)
    assert lost.stderr == (
        "hub: alias prod of team/legal points to version 2, not to version 1 as expected; nothing was moved\n"
    )
    assert ada("rollback", "team/legal", "prod").stdout == f"team/legal@prod: 2 -> 1 {digests[0]}\n"
    assert re.search(r"ada +rolled back prod 2 -> 1", ada("log", "team/legal").stdout)
    assert ada("pull", "team/legal@prod", tmp_path / "out").stdout == first
    assert ada("verify").stdout.count("whole:") == 2
    assert ada("rm", "team/legal@1", code=1).stderr.startswith("hub: team/legal@1 is in use: prod points there")
    ada("alias", "team/legal@2", "prod")
    assert ada("rm", "team/legal@1").stdout.startswith(f"removed team/legal@1 {digests[0]}")
    assert re.fullmatch(r"freed 5 blobs, \d+ bytes\n", ada("gc").stdout)

    ada("logout", registry.url)
    assert ada.keys == {}
    assert "asks for a key" in ada("ls", code=1).stderr


def test_keys_are_made_listed_and_revoked_from_afar(registry: Registry, tmp_path: Path) -> None:
    admin = Person(tmp_path / "admin", HUB_URL=registry.url, HUB_TOKEN=ADMIN_KEY)
    made = admin("key", "create", "ci", "--scope", "read", "--scope", "push", "--names", "team/*", "--days", "30")
    assert re.fullmatch(rf"{KEY}\n", made.stdout)
    id_ = made.stdout.split("_")[1]
    assert made.stderr == f"key {id_} of ci: push, read\n"
    ci = Person(tmp_path / "ci", HUB_URL=registry.url, HUB_TOKEN=made.stdout.strip())
    ci("ls")

    (listed,) = [key for key in json.loads(admin("key", "ls", "--json").stdout) if key["key"] == id_]
    assert (listed["name"], listed["scopes"], listed["names"]) == ("ci", ["push", "read"], ["team/*"])
    assert listed["expires_at"] > listed["at"] and listed["revoked_at"] is None
    assert made.stdout.strip() not in admin("key", "ls").stdout
    assert admin("key", "revoke", id_).stdout == f"revoked key {id_} of ci\n"
    assert ci("ls", code=1).stderr == "hub: this key is unknown, revoked or expired\n"
    assert admin("key", "revoke", id_, code=1).stderr == f"hub: there is no key {id_} that could be revoked\n"
    assert admin("key", "create", "x", "--scope", "owner", code=1).stderr.startswith("hub: scope owner: known are")


def test_what_a_key_may_not_do_is_said_in_one_line(
    registry: Registry, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    hub = registry.hub()
    hub.push(adapters[0], "scopes/bot")
    pusher = hub.create_key("pusher", ["read", "push"], names=["scopes/*"]).secret
    anybody = Person(tmp_path / "home", HUB_URL=registry.url)
    refusals: list[tuple[str | None, list[str | Path], str]] = [
        (None, ["ls"], "this hub asks for a key: hub login, HUB_TOKEN or Authorization: Bearer KEY"),
        ("mgk_no", ["ls"], "this key is unknown, revoked or expired"),
        (READ_KEY, ["push", adapters[1], "scopes/bot"], "this needs the scope push; key reader has read"),
        (READ_KEY, ["rm", "scopes/bot@1"], "this needs the scope admin; key reader has read"),
        (READ_KEY, ["key", "ls"], "this needs the scope admin; key reader has read"),
        (pusher, ["alias", "scopes/bot@1", "prod"], "this needs the scope promote; key pusher has push, read"),
        (pusher, ["push", adapters[1], "scopes/bot", "--alias", "prod"], "moving prod needs the scope promote; key"),
        (pusher, ["push", adapters[1], "other/bot"], "key pusher is for the names scopes/*, not for other/bot"),
        (pusher, ["log", "team/legal"], "there is no adapter team/legal"),
    ]
    for key, arguments, words in refusals:
        done = anybody(*arguments, code=1, **({} if key is None else {"HUB_TOKEN": key}))
        assert done.stdout == ""
        assert done.stderr.startswith(f"hub: {words}")
        assert done.stderr.count("\n") == 1
    assert [version.version for version in hub.adapters("scopes/bot")[0].versions] == [1]
    assert hub.adapters("other/bot") == []


def test_a_hub_that_is_away_or_none_is_said_in_one_line(registry: Registry, tmp_path: Path) -> None:
    person = Person(tmp_path / "home", HUB_TOKEN="some-key", HUB_PATIENCE="0.2")
    away = f"http://127.0.0.1:{free_port()}"
    with answering(answer("404 Not Found", "<html>It works!</html>")) as (other, _):
        addresses = {
            away: f"{away} cannot be reached: ",
            f"{registry.url}/elsewhere/": "no route GET /elsewhere/api/v1/",
            "hub.example:8080": "hub.example:8080 is no address of a hub such as https://",
            "ftp://hub.example": "ftp://hub.example is no address of a hub such as https://",
            "http://ada:pw@hub.example": "a hub's address holds no user and no password: use hub login or HUB_TOKEN",
            other: f"{other} answers 404 and is no hub, or something stands before it",
        }
        for url, words in addresses.items():
            key = ADMIN_KEY if registry.url in url else "some-key"
            done = person("--hub", url, "ls", code=1, HUB_TOKEN=key)
            assert done.stderr.startswith(f"hub: {words}"), done.stderr
            assert (done.stdout, done.stderr.count("\n")) == ("", 1)
        refused = person("login", other, code=1)
        assert refused.stderr.startswith(f"hub: {other} answers 404 and is no hub")
        assert not (person.home / FILE).exists()
    assert person("--hub", away, "ls", code=1, HUB_PATIENCE="soon").stderr == (
        "hub: HUB_PATIENCE is seconds from 0 to 86400, not soon\n"
    )


def test_a_wrong_key_is_refused_and_what_was_stored_stays(registry: Registry, tmp_path: Path) -> None:
    person = Person(tmp_path / "home")
    assert "no key: give --key, set HUB_TOKEN" in person("login", registry.url, code=1).stderr
    assert person("login", registry.url, "--key", "wrong", code=1).stderr == (
        "hub: this key is unknown, revoked or expired\n"
    )
    assert not (person.home / FILE).exists()
    person("login", registry.url, "--key", READ_KEY)
    person("login", registry.url, "--key", "wrong", code=1)
    assert person.keys == {registry.url: READ_KEY}
    assert "this needs the scope admin" in person("gc", code=1, HUB_URL=registry.url).stderr
    person("gc", HUB_URL=registry.url, HUB_TOKEN=ADMIN_KEY)  # what is said now goes before what is stored


def test_a_stored_key_goes_to_its_own_address_only(registry: Registry, tmp_path: Path) -> None:
    person = Person(tmp_path / "home", HUB_PATIENCE="0")
    person("login", registry.url, "--key", READ_KEY)
    with answering(answer("401 Unauthorized", '{"error": {"code": "unauthorized", "message": "who?"}}')) as (
        url,
        asked,
    ):
        assert person("--hub", url, "ls", code=1).stderr == "hub: who?\n"
        assert person("--hub", url.replace("127.0.0.1", "localhost"), "ls", code=1).stderr == "hub: who?\n"
    assert len(asked) == 2
    assert not any(READ_KEY.encode() in request or b"authorization" in request.lower() for request in asked)


Run = Callable[..., "Outcome"]


class Outcome:
    """What a command has said; times are told apart by their order alone."""

    def __init__(self, result: Any, *hidden: str) -> None:
        times: dict[str, str] = {}

        def told(text: str) -> str:
            for word in hidden:
                text = text.replace(word, "HOME")
            return re.sub(r'"(\d{4}-\d\d-\d\dT[\d:.+]+)"', lambda at: times.setdefault(at[1], "a time"), text)

        self.code, self.out, self.err = result.exit_code, told(result.stdout), told(result.stderr)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcome) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"exit {self.code}\n{self.out}{self.err}"


def runner(home: Path, **environment: str | None) -> Run:
    """Run commands in this process, as somebody called ada."""
    kept: dict[str, str | None] = {"HUB_URL": None, "HUB_TOKEN": None, "HF_HUB_OFFLINE": "1"}
    user = {"LOGNAME": "ada", "USER": "ada", "MULTIGRAFT_HOME": str(home)}

    def run(*arguments: str | Path) -> Outcome:
        result = CliRunner().invoke(cli.app, [*map(str, arguments)], env={**kept, **user, **environment})
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        return Outcome(result, str(home))

    return run


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Run, Run]]:
    """A hub on this machine and one behind a service, both empty, and somebody called ada at each."""
    served = LocalHub(tmp_path / "served")
    key = served.keys.create("ada", ["admin"], actor="ada").secret
    with threaded(served) as url:
        yield runner(tmp_path / "near"), runner(tmp_path / "far", HUB_URL=url, HUB_TOKEN=key)


def test_a_program_reads_the_same_from_afar_as_from_here(
    both: tuple[Run, Run], adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    digest = LocalHub(tmp_path / "third").push(adapters[0], "team/legal").digest
    one, two = adapters
    commands: list[tuple[str | Path, ...]] = [
        ("ls", "--json"),
        ("push", one, "team/legal", "--alias", "prod", "--note", "first try", "--json"),
        ("push", two, "team/legal", "-q"),
        ("push", one, "team/legal", "--json"),
        ("push", one, "tone"),
        ("ls", "--json"),
        ("ls", "team/*", "--json"),
        ("ls", "nothing*"),
        ("show", "team/legal@prod", "--json"),
        ("show", f"team/legal@{digest}", "--json"),
        ("show", f"team/legal@{digest[:19]}", "--json"),
        ("alias", "team/legal@2", "prod", "--expect", "1", "--note", "better", "--json"),
        ("alias", "team/legal@2", "prod", "--expect", "1", "--json"),
        ("alias", "team/legal@2", "prod", "--json"),
        ("alias", "team/legal@2", "prod"),
        ("alias", "team/legal@9", "prod"),
        ("alias", "team/legal@2", "7"),
        ("log", "team/legal", "--json"),
        ("log", "nobody", "--json"),
        ("diff", "team/legal@1", "team/legal@2", "--json"),
        ("rollback", "team/legal", "prod", "--note", "worse", "--json"),
        ("rollback", "team/legal", "prod"),
        ("verify", "--json"),
        ("verify", "team/legal@prod"),
        ("verify", "nobody", "--json"),
        ("rm", "team/legal@1"),
        ("rm", "team/legal@prod"),
        ("alias", "team/legal@2", "latest"),
        ("alias", "team/legal@2", "prod"),
        ("rm", "team/legal@1", "--json"),
        ("rm", "tone@1", "--json"),
        ("gc", "--json"),
        ("show", "team/legal@1", "--json"),
        ("log", "team/legal", "--json"),
        ("push", one, "team/legal", "--json"),
        ("ls", "--json"),
        ("push", one, "Team/legal"),
        ("push", tmp_path / "nowhere", "team/legal"),
    ]
    for arguments in commands:
        near, far = (run(*arguments) for run in both)
        assert far == near, arguments
    pulled = [
        run("pull", "team/legal@2", tmp_path / name, "--json") for name, run in zip(("a", "b"), both, strict=True)
    ]
    assert pulled[0] == pulled[1]
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]


def test_what_the_registry_refuses_is_told_with_every_problem(tmp_path: Path, adapters: tuple[Path, Path]) -> None:
    """Its limits are its own: a folder that is good here may be too much there."""
    small = LocalHub(tmp_path / "served", limits=Limits(max_rank=2))
    with threaded(small, RegistryConfig(admin_key=ADMIN_KEY)) as url:
        refused = runner(tmp_path / "far", HUB_URL=url, HUB_TOKEN=ADMIN_KEY)("push", adapters[0], "team/legal")
    assert refused.code == 1
    assert refused.err.startswith("hub: team/legal was refused: 1 problem\n  adapter_config.json: r: ")
    assert small.adapters() == []
