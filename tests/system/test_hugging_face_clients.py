"""Hugging Face's own clients, unmodified, fetch adapters from a registry: HF_ENDPOINT and HF_TOKEN are all they need.

Each client is a process of its own, with a cache of its own, and a real `hub registry` answers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from hub.digest import sha256_of
from hub.manifest import CONFIG_FILE, WEIGHTS_FILE
from tests.large import MB, write_large
from tests.networks import Relay
from tests.registries import ADMIN_KEY, READ_KEY, Registry, running
from tests.unit.hub.makers import write_base, write_lora

ROOT = Path(__file__).parents[2]
CLIENT = Path(__file__).with_name("hugging_face_client.py")
HF = Path(sys.executable).with_name("hf")
COMMIT_DIGITS = 40
FILES = [CONFIG_FILE, WEIGHTS_FILE]
RESUME_MB = 10  # huggingface_hub keeps what it has fetched in steps of this size


class Refused(Exception):
    """What a client raised: the names of its class and of those above it."""

    def __init__(self, kinds: list[str], message: str) -> None:
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds = kinds


@dataclass
class Client:
    """A process with Hugging Face's libraries."""

    process: subprocess.Popen[str]
    cache: Path

    def __call__(self, call: str, *args: Any, **options: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"call": call, "args": args, "options": options}) + "\n")
        self.process.stdin.flush()
        told = json.loads(self.process.stdout.readline() or '{"error": ["it has ended"], "message": ""}')
        if "error" in told:
            raise Refused(told["error"], told["message"])
        return told["result"]


def environment(url: str, home: Path, key: str | None) -> Mapping[str, str]:
    """What a user exports, and nothing of what may stand in the environment of the tests."""
    ours = ("HF_", "HUGGING", "TRANSFORMERS_", "HUB_", "MULTIGRAFT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    token = {} if key is None else {"HF_TOKEN": key}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "NO_COLOR": "1"}
    return {**kept, **token, **quiet, "HF_ENDPOINT": url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}


@contextmanager
def client(url: str, home: Path, key: str | None = READ_KEY) -> Iterator[Client]:
    with (home.parent / f"{home.name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, str(CLIENT)],
            env=environment(url, home, key),
            cwd=home.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield Client(process, home / "hub")
    finally:
        process.kill()
        process.communicate()


@dataclass
class Team:
    """A registry with team/bot (three versions; prod is 1) and solo (one), and the folders that were pushed."""

    registry: Registry
    folders: list[Path]
    digests: list[str]

    @property
    def commits(self) -> list[str]:
        return [digest.removeprefix("sha256:")[:COMMIT_DIGITS] for digest in self.digests]

    def gets(self) -> float:
        """How many files were asked for."""
        metrics = httpx.get(f"{self.registry.url}/metrics").text
        asked = r'^multigraft_registry_requests_total{method="GET",route="[^"]*/resolve/[^"]*",status="\d+"} (\S+)'
        return sum(float(count) for count in re.findall(asked, metrics, re.MULTILINE))


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    root = tmp_path_factory.mktemp("team")
    base = write_base(root / "base")
    folders = [write_lora(root / str(seed), base, seed=seed) for seed in range(3)]
    (root / "home").mkdir()
    with running(root / "home") as registry:
        hub = registry.hub()
        digests = [hub.push(folder, "team/bot").digest for folder in folders]
        hub.move_alias("team/bot", 1, "prod")
        hub.push(folders[1], "solo", aliases=["prod"])
        hub.push(folders[0], "other/secret")
        yield Team(registry, folders, digests)


@pytest.fixture(scope="module")
def reader(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One process for what leaves no trace in its cache that another test minds."""
    with client(team.registry.url, tmp_path_factory.mktemp("reader") / "hf") as one:
        yield one


def is_copy(snapshot: Path, folder: Path) -> bool:
    """The weights are the same bytes; the config is kept in its canonical form."""
    assert sorted(path.name for path in snapshot.iterdir()) == FILES
    configs = [json.loads((place / CONFIG_FILE).read_text()) for place in (snapshot, folder)]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0].items() <= configs[1].items()
    return (snapshot / WEIGHTS_FILE).read_bytes() == (folder / WEIGHTS_FILE).read_bytes()


def test_a_snapshot_is_found_by_alias_version_digest_and_commit(team: Team, reader: Client) -> None:
    wanted = {"prod": 0, "latest": 2, "main": 2, None: 2, "1": 0, "2": 1, "3": 2}
    wanted |= {digest: index for index, digest in enumerate(team.digests)}
    wanted |= {commit: index for index, commit in enumerate(team.commits)}
    wanted |= {team.digests[1][:19]: 1}
    for revision, index in wanted.items():
        snapshot = Path(reader("snapshot_download", "team/bot", revision=revision))
        assert snapshot == reader.cache / "models--team--bot" / "snapshots" / team.commits[index], revision
        assert is_copy(snapshot, team.folders[index])


def test_a_name_without_a_namespace_is_a_repository_too(team: Team, reader: Client) -> None:
    for revision in (None, "prod", "1", team.digests[1], team.commits[1]):
        assert is_copy(Path(reader("snapshot_download", "solo", revision=revision)), team.folders[1])
    assert reader("model_info", "solo", revision="prod")["sha"] == team.commits[1]
    assert reader("list_repo_files", "solo") == FILES
    assert [entry["path"] for entry in reader("list_repo_tree", "solo", revision="1")] == FILES
    assert reader("get_paths_info", "solo", [WEIGHTS_FILE])[0]["path"] == WEIGHTS_FILE
    assert reader("file_exists", "solo", CONFIG_FILE, revision="prod") is True
    assert reader("repo_exists", "solo") is True
    assert [ref["name"] for ref in reader("list_repo_refs", "solo")["branches"]] == ["main", "latest", "prod"]


def test_one_file_is_fetched_alone(team: Team, reader: Client, tmp_path: Path) -> None:
    found = Path(reader("hf_hub_download", "team/bot", WEIGHTS_FILE, revision="prod"))
    assert found.read_bytes() == (team.folders[0] / WEIGHTS_FILE).read_bytes()
    here = reader("hf_hub_download", "team/bot", WEIGHTS_FILE, revision="2", local_dir=str(tmp_path))
    assert Path(here) == tmp_path / WEIGHTS_FILE
    assert Path(here).read_bytes() == (team.folders[1] / WEIGHTS_FILE).read_bytes()


def test_a_repository_tells_what_it_is_and_what_it_holds(team: Team, reader: Client) -> None:
    info = reader("model_info", "team/bot", revision="prod", files_metadata=True)
    assert (info["id"], info["author"], info["sha"], info["private"]) == ("team/bot", "team", team.commits[0], True)
    assert (info["library_name"], info["pipeline_tag"], info["gated"]) == ("peft", "text-generation", False)
    assert {"peft", "lora", "base_model:adapter:base"} <= set(info["tags"])
    weights = (team.folders[0] / WEIGHTS_FILE).read_bytes()
    (sibling,) = [one for one in info["siblings"] if one["rfilename"] == WEIGHTS_FILE]
    assert (sibling["size"], sibling["lfs"]["sha256"]) == (len(weights), sha256_of(weights))

    assert reader("list_repo_files", "team/bot", revision="2") == FILES
    (entry,) = [one for one in reader("list_repo_tree", "team/bot", revision="prod") if one["path"] == WEIGHTS_FILE]
    assert (entry["size"], entry["lfs"]["sha256"]) == (len(weights), sha256_of(weights))
    assert reader("get_paths_info", "team/bot", [WEIGHTS_FILE, "no.json"], revision="prod") == [entry]

    refs = reader("list_repo_refs", "team/bot")
    assert {ref["name"]: ref["target_commit"] for ref in refs["branches"]} == {
        "main": team.commits[2], "latest": team.commits[2], "prod": team.commits[0],
    }  # fmt: skip
    assert [(ref["name"], ref["target_commit"]) for ref in refs["tags"]] == [
        (str(number), commit) for number, commit in enumerate(team.commits, 1)
    ]


def test_what_is_there_and_what_is_not_is_told_without_fetching(team: Team, reader: Client) -> None:
    before = team.gets()
    assert reader("repo_exists", "team/bot") is True
    assert reader("repo_exists", "team/nobody") is False
    assert reader("revision_exists", "team/bot", "prod") is True
    assert reader("revision_exists", "team/bot", "staging") is False
    assert reader("file_exists", "team/bot", WEIGHTS_FILE, revision="prod") is True
    assert reader("file_exists", "team/bot", "README.md") is False
    assert reader("file_exists", "team/nobody", WEIGHTS_FILE) is False
    assert reader("file_exists", "team/bot", WEIGHTS_FILE, revision="9") is False
    assert team.gets() == before


@pytest.mark.parametrize(
    ("call", "args", "options", "kind"),
    [
        ("model_info", ["team/nobody"], {}, "RepositoryNotFoundError"),
        ("model_info", ["nobody"], {}, "RepositoryNotFoundError"),
        ("snapshot_download", ["team/nobody"], {}, "RepositoryNotFoundError"),
        ("list_repo_refs", ["team/nobody"], {}, "RepositoryNotFoundError"),
        ("hf_hub_download", ["team/nobody", CONFIG_FILE], {}, "RepositoryNotFoundError"),
        ("model_info", ["team/bot"], {"revision": "staging"}, "RevisionNotFoundError"),
        ("snapshot_download", ["team/bot"], {"revision": "9"}, "RevisionNotFoundError"),
        ("hf_hub_download", ["team/bot", CONFIG_FILE], {"revision": "0" * 40}, "RevisionNotFoundError"),
        ("hf_hub_download", ["team/bot", CONFIG_FILE], {"revision": "refs/pr/1"}, "RevisionNotFoundError"),
        ("hf_hub_download", ["team/bot", "README.md"], {}, "EntryNotFoundError"),
        ("hf_hub_download", ["solo", "deep/README.md"], {"revision": "prod"}, "EntryNotFoundError"),
    ],
)
def test_what_is_not_there_is_the_clients_own_error(
    reader: Client, call: str, args: list[str], options: dict[str, str], kind: str
) -> None:
    with pytest.raises(Refused) as caught:
        reader(call, *args, **options)
    assert kind in caught.value.kinds, caught.value


def test_models_are_listed_and_searched(reader: Client) -> None:
    def found(**options: str) -> list[str]:
        return [model["id"] for model in reader("list_models", **options)]

    assert found() == ["other/secret", "solo", "team/bot"]
    assert found(search="BOT") == ["team/bot"]
    assert found(author="team") == ["team/bot"]
    assert found(search="nothing") == []


def test_a_key_sees_its_names_and_nothing_of_others(team: Team, tmp_path: Path) -> None:
    """What it may not see is not found, in the same words as what is not there."""
    ours = team.registry.hub().create_key("ours", ["read"], names=["team/*", "solo"]).secret
    with client(team.registry.url, tmp_path / "hf", ours) as bounded:
        assert bounded("whoami")["name"] == "ours"
        assert [model["id"] for model in bounded("list_models")] == ["solo", "team/bot"]
        assert is_copy(Path(bounded("snapshot_download", "team/bot", revision="prod")), team.folders[0])
        told = []
        for name in ("other/secret", "other/nobody"):
            assert bounded("repo_exists", name) is False
            with pytest.raises(Refused) as caught:
                bounded("snapshot_download", name, revision=team.digests[0])
            assert "RepositoryNotFoundError" in caught.value.kinds
            told.append(re.sub(r"req-[0-9a-f]+", "", str(caught.value)).replace(name, "NAME"))
        assert told[0] == told[1]


@pytest.mark.parametrize(("key", "words"), [(None, "this hub asks for a key"), (ADMIN_KEY + "x", "key is unknown")])
def test_without_a_key_that_is_known_nothing_is_told(team: Team, tmp_path: Path, key: str | None, words: str) -> None:
    with client(team.registry.url, tmp_path / "hf", key) as stranger:
        with pytest.raises(Refused, match=words) as caught:
            stranger("snapshot_download", "team/bot")
        assert "HfHubHTTPError" in caught.value.kinds
        with pytest.raises(Refused):
            stranger("whoami")


def test_an_alias_that_moves_changes_what_is_fetched_and_what_is_there_is_not_fetched_again(
    team: Team, tmp_path: Path
) -> None:
    hub = team.registry.hub()
    hub.push(team.folders[0], "team/moving", aliases=["prod"])
    hub.push(team.folders[1], "team/moving")
    with client(team.registry.url, tmp_path / "hf") as one:
        before = team.gets()
        first = Path(one("snapshot_download", "team/moving", revision="prod"))
        assert is_copy(first, team.folders[0])
        assert team.gets() == before + len(FILES)
        assert Path(one("snapshot_download", "team/moving", revision="prod")) == first
        assert Path(one("snapshot_download", "team/moving", revision="1")) == first
        assert Path(one("snapshot_download", "team/moving", revision=team.commits[0])) == first
        assert team.gets() == before + len(FILES), "the cache had it"
        hub.move_alias("team/moving", 2, "prod")
        second = Path(one("snapshot_download", "team/moving", revision="prod"))
        assert is_copy(second, team.folders[1])
        hub.rollback("team/moving", "prod")
        assert Path(one("snapshot_download", "team/moving", revision="prod")) == first
    team.registry.kill()
    try:
        with client(team.registry.url, tmp_path / "hf") as later:
            assert Path(later("snapshot_download", "team/moving", revision="prod")) == first, "the registry is away"
    finally:
        team.registry.start()


def test_a_download_that_breaks_off_goes_on_where_it_was(team: Team, tmp_path: Path) -> None:
    folder = write_large(tmp_path, megabytes=24)
    team.registry.hub().push(folder, "team/large")
    size = (folder / WEIGHTS_FILE).stat().st_size
    with Relay(team.registry.url) as relay, client(relay.url, tmp_path / "hf") as one:
        relay.break_at("down", after=17 * MB)
        found = Path(one("hf_hub_download", "team/large", WEIGHTS_FILE))
        assert sha256_of(found.read_bytes()) == sha256_of((folder / WEIGHTS_FILE).read_bytes())
        assert relay.passed["down"] < size + RESUME_MB * MB
    metrics = httpx.get(f"{team.registry.url}/metrics").text
    assert re.search(r'_requests_total{method="GET",route="[^"]*/resolve/[^"]*",status="206"} 1\.0', metrics)


def hf(team: Team, home: Path, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [HF, *map(str, arguments)],
        env=environment(team.registry.url, home, READ_KEY),
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_the_hf_command_downloads_and_tells(team: Team, tmp_path: Path) -> None:
    home = tmp_path / "hf"
    told = hf(team, home, "download", "team/bot", "--revision", "prod").stdout
    assert is_copy(home / "hub" / "models--team--bot" / "snapshots" / team.commits[0], team.folders[0])
    assert team.commits[0] in told
    hf(team, home, "download", "solo", WEIGHTS_FILE, "--local-dir", tmp_path / "here")
    assert (tmp_path / "here" / WEIGHTS_FILE).read_bytes() == (team.folders[1] / WEIGHTS_FILE).read_bytes()
    assert "reader" in hf(team, home, "auth", "whoami").stdout
    info = json.loads(hf(team, home, "models", "info", "team/bot", "--revision", "2").stdout)
    assert (info["id"], info["sha"]) == ("team/bot", team.commits[1])
    assert "team/bot" in hf(team, home, "models", "ls", "--format", "json").stdout
    assert "'team/nobody' not found" in hf(team, home, "download", "team/nobody", code=1).stderr


@pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")
def test_peft_loads_from_the_registry_what_it_loads_from_the_folder(team: Team, tmp_path: Path) -> None:
    """The logits are equal to the bit, by alias and version, with and without a namespace, before and after a move."""
    base, folders = tmp_path / "base", [tmp_path / "one", tmp_path / "two"]
    hub = team.registry.hub()
    with client(team.registry.url, tmp_path / "hf") as one:
        for seed, folder in enumerate(folders):
            one("make_peft_adapter", str(base), str(folder), seed)
            (folder / "README.md").unlink(missing_ok=True)
            hub.push(folder, "team/peft")
        hub.push(folders[0], "peft")

        def serves(index: int, name: str, revision: str | None) -> bool:
            return bool(one("same_logits", str(base), name, revision, str(folders[index])))

        hub.move_alias("team/peft", 1, "prod")
        assert serves(0, "team/peft", "prod")
        assert serves(1, "team/peft", None)
        assert not serves(0, "team/peft", "2")
        assert serves(0, "peft", "1")
        hub.move_alias("team/peft", 2, "prod")
        assert serves(1, "team/peft", "prod")
