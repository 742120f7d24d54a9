"""Recipes: what is read, what is refused and how it is said, and that a record trains the same again."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import RecipeInvalid
from trainer.methods import METHODS, LoraOptions
from trainer.recipe import Recipe, changes, parse_recipe, read_fields, record

LEAST: dict[str, Any] = {"method": "lora", "base": "seedling", "data": "rows.jsonl", "steps": 10}


def test_the_least_recipe_takes_the_methods_defaults() -> None:
    recipe = parse_recipe(LEAST, "test")
    assert recipe.options == LoraOptions()
    assert recipe.learning_rate == METHODS["lora"].learning_rate
    assert recipe.data.path == "rows.jsonl"


def test_a_recipe_without_a_length_goes_through_the_data_three_times() -> None:
    recipe = parse_recipe({**LEAST, "steps": None}, "test")
    assert (recipe.steps, recipe.epochs) == (None, 3.0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "loar"}, r"method 'loar' is unknown \(nearest: lora\); known: lora, ia3"),
        ({"method": None}, "method"),
        ({"data": None}, "data"),
        ({"learning_rte": 1}, r"there is no field learning_rte \(nearest: learning_rate\)"),
        ({"options": {"rnak": 4}}, r"method lora has no option rnak \(nearest: rank\); known: rank, alpha"),
        ({"options": {"rank": 0}}, "rank is 0: input should be greater than or equal to 1"),
        ({"options": "rank 4"}, "options is 'rank 4': input should be a valid dictionary"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"steps": 10**9}, "steps is 1000000000: input should be less than or equal to 1000000"),
        ({"batch_size": 0}, "batch_size is 0: input should be greater than or equal to 1"),
        ({"epochs": 2}, "give steps or epochs, not both"),
        ({"steps": None, "epochs": 0}, "epochs is 0: input should be greater than 0"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"method": "prompt", "options": {"init": "text"}}, "init: text and init_text go together"),
        ({"method": "prompt", "options": {"init_text": "hi"}}, "init: text and init_text go together"),
        ({"method": "p-tuning", "options": {"encoder_layers": 3}}, "encoder_layers: only with encoder: lstm"),
        ({"method": "prefix", "options": {"projection_size": 3}}, "projection_size needs projection: true"),
        ({"method": "ia3", "options": {"feedforward": ["x"]}}, "feedforward needs targets"),
        ({"method": "ia3", "options": {"targets": ["a"], "feedforward": ["x"]}}, "x, which is not among the targets"),
    ],
)
def test_a_bad_field_is_named_with_its_value(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeInvalid, match=says):
        parse_recipe({**LEAST, **fields}, "test")


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(RecipeInvalid) as caught:
        parse_recipe({**LEAST, "batch_size": 0, "seed": -1, "typo": 1}, "my.yaml")
    assert len(caught.value.problems) == 3
    assert str(caught.value).startswith("my.yaml is not a recipe that can be trained:\n  ")


@pytest.mark.parametrize("method", METHODS)
def test_a_record_read_back_is_the_recipe(method: str, tmp_path: Path) -> None:
    needed = {"lora-moe": {"experts": ["a@1", "b@2"]}, "trainable-tokens": {"tokens": ["a", 7, "7"]}}
    recipe = parse_recipe({**LEAST, "method": method, "options": needed.get(method, {})}, "test")
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(record(recipe, {"peft": "1"})))
    assert parse_recipe(read_fields(path), "test") == recipe


def test_a_recipe_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: lora\nbase: seedling\ndata: rows.jsonl\nsteps: 10\noptions:\n  targets: [q_proj]\n")
    recipe = parse_recipe(read_fields(path), str(path))
    assert isinstance(recipe, Recipe)
    assert recipe.options == LoraOptions(targets=("q_proj",))


@pytest.mark.parametrize(
    ("content", "says"), [("- a\n", "holds list, not fields"), ("a: [", "while parsing"), (None, "No such file")]
)
def test_a_file_that_is_no_recipe_is_refused(content: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeInvalid, match=says):
        read_fields(path)


def test_changes_name_the_fields_that_differ() -> None:
    assert changes({"a": 1, "b": [2], "gone": 0}, {"a": 1, "b": [3], "new": 4}) == [
        "b was [2] and is [3]",
        "new was null and is 4",
        "gone was 0 and is null",
    ]
