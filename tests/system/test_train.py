"""`hub train` as a person runs it: end to end into the hub, and through Ctrl-C and kill -9 without losing the run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.recipe import parse_recipe
from trainer.train import train

HUB = Path(sys.executable).with_name("hub")
RUN = [
    "train", "--method", "prompt", "--base", "seedling", "--data", "rows.jsonl", "--steps", "30", "--batch-size", "4",
    "--virtual-tokens", "4", "--checkpoint-steps", "5",
]  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path) -> Mapping[str, str]:
    alone = {"MULTIGRAFT_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **alone}


@pytest.fixture(autouse=True)
def rows(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} it is"}]}
        for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def hub(arguments: list[str], folder: Path, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [HUB, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def interrupted(arguments: list[str], folder: Path, environment: Mapping[str, str], at: str, number: int) -> Any:
    """Start a run, send it a signal as soon as it says `at`, and return its exit code with all that it said."""
    with subprocess.Popen(
        [HUB, *arguments], cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith(at):
                process.send_signal(number)
                break
        said += process.stderr.readlines()
    return process.returncode, "".join(said)


def test_a_trained_adapter_is_a_version_in_the_hub(tmp_path: Path, environment: Mapping[str, str]) -> None:
    arguments = [
        "train", "--method", "lora", "--base", "seedling", "--data", "rows.jsonl", "--steps", "3", "--rank", "2",
        "--push", "team/bot", "--alias", "prod", "--note", "first", "--json",
    ]  # fmt: skip
    done = hub(arguments, tmp_path, environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["pushed"]["reference"] == "team/bot@1"
    assert result["pushed"]["digest"].startswith("sha256:")
    listed = json.loads(hub(["ls", "--json"], tmp_path, environment).stdout)
    assert [(entry["name"], entry["aliases"]) for entry in listed] == [("team/bot", {"latest": 1, "prod": 1})]
    assert [version["kind"] for version in listed[0]["versions"]] == ["lora"]
    shown = json.loads(hub(["show", "team/bot@prod", "--json"], tmp_path, environment).stdout)
    assert result["metrics"]["eval_rows"] == 4
    assert json.dumps(result["metrics"]["eval_loss"]) in json.dumps(shown)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "rows.jsonl"]


def test_a_run_survives_ctrl_c_and_kill_9(
    tmp_path: Path, environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    recipe = {"method": "prompt", "base": "seedling", "data": "rows.jsonl", "options": {"virtual_tokens": 4}}
    train(parse_recipe({**recipe, "steps": 30, "batch_size": 4}, "test"), Path("whole"))
    broken = [*RUN, "--out", "broken"]
    code, said = interrupted(broken, tmp_path, environment, "step 6/30", signal.SIGINT)
    assert code == 1
    assert "the same command with --resume goes on from broken.run" in said
    code, said = interrupted([*broken, "--resume"], tmp_path, environment, "step 18/30", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert "from the start" not in said
    assert not (tmp_path / "broken").exists()
    done = hub([*broken, "--resume"], tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert "from step 15" in done.stderr
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "broken" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (tmp_path / "broken.run").exists()
