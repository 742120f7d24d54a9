"""`hub train`: what it lists, how flags and recipes meet, and how it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hub.cli import app
from trainer.cli import RECIPES, find_recipe, merge
from trainer.errors import RecipeInvalid
from trainer.methods import METHODS
from trainer.recipe import parse_recipe, read_fields

WELL = ["--method", "lora", "--base", "seedling", "--data", "task:echo:40", "--steps", "1"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments])


def test_the_list_names_every_method_with_its_options() -> None:
    listed = json.loads(run("--list", "--json").stdout)
    assert [entry["method"] for entry in listed] == list(METHODS)
    for entry in listed:
        assert entry["summary"]
        assert [option["name"] for option in entry["options"]] == list(METHODS[entry["method"]].options.model_fields)
        assert all(option["description"] for option in entry["options"])
    text = run("--list").stdout
    assert all(f"{name}: " in text for name in METHODS)
    assert "    virtual_tokens = 16: " in text


def test_listing_needs_no_torch() -> None:
    script = "import sys, trainer.cli; trainer.cli.methods_text(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --out FOLDER, --push NAME or both"),
        (["--out", "x", "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--out", "x", "--option", "rank"], "NAME=VALUE is wanted"),
        (["--out", "x", "--alias", "prod"], "--alias and --note go with --push"),
        (["--out", "x", "--threads", "0"], "Invalid value for '--threads'"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], says: str) -> None:
    result = run(*WELL, *arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "x", "--method", "loar"], "hub: the flags is not a recipe that can be trained: method 'loar' is"),
        (["--out", "x", "--virtual-tokens", "4"], "method lora has no option virtual_tokens"),
        (["--out", "x", "--option", "rank=many"], "rank is 'many': input should be a valid integer"),
        (["--push", "Bad Name"], "Bad Name"),
        (["--push", "bot@3"], "a name is wanted, without a version or alias"),
        (["--push", "bot", "--rank", "1000"], "rank 1000 is above the hub's limit of 256"),
        (["--out", "x", "--base", "nowhere/at-all"], "hub: base nowhere/at-all"),
    ],
)
def test_a_refusal_is_one_clear_line_and_exits_with_1(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MULTIGRAFT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run(*WELL, *arguments)
    assert result.exit_code == 1
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "x").exists()


def test_flags_lie_over_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: lora\nbase: seedling\ndata: a.jsonl\nepochs: 2\noptions: {rank: 4, alpha: 3}\n")
    flags: dict[str, Any] = {"steps": 7, "seed": 3}
    recipe = merge(str(path), flags, {"rank": 2})
    assert (recipe.steps, recipe.epochs, recipe.seed) == (7, None, 3)
    assert recipe.options.model_dump(exclude_unset=True) == {"rank": 2, "alpha": 3}


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(RecipeInvalid, match="neither a file nor a recipe that ships with Multigraft"):
        find_recipe("nothing-like-it")


def test_every_recipe_that_ships_can_be_read_by_its_name() -> None:
    for path in RECIPES.glob("*.yaml"):
        assert find_recipe(path.stem) == path
        parse_recipe(read_fields(path), path.name)
