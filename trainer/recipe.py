"""A recipe: everything that decides which bytes a training run makes, and nothing else.

Where the adapter goes, how many threads work on it and when it is saved are not in a recipe: they change no weight.
Read from YAML, from flags, or from the recipe.json of an adapter, which trains that adapter again.
Law: an exported recipe, read back, is equal to the recipe that was trained.
"""

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from trainer.errors import RecipeInvalid
from trainer.method import Method, Options
from trainer.methods import METHODS
from trainer.quantize import Quantize

SCHEMA_VERSION: Final = 1
DEFAULT_EPOCHS: Final = 3.0
MAX_STEPS: Final = 1_000_000
RECORD_FIELDS: Final = ("schema_version", "versions")  # of recipe.json, beside the recipe's own


class DataSource(BaseModel):
    """A file of chat JSON lines or `task:NAME[:ROWS]`; a digest that is given must be that of what is found there."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str = Field(min_length=1)
    digest: str | None = None
    rows: int | None = None

    @model_validator(mode="before")
    @classmethod
    def a_text_is_a_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class Recipe(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: str
    base: str = Field(min_length=1)
    data: DataSource
    eval_data: DataSource | None = None
    options: SerializeAsAny[Options]

    seed: int = Field(0, ge=0, lt=2**32)
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    epochs: float | None = Field(None, gt=0, le=10_000)
    batch_size: int = Field(16, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int | None = Field(None, ge=2)
    gradient_checkpointing: bool = False
    quantize: Quantize | None = None  # how the frozen base is held while it trains
    eval_fraction: float = Field(0.1, gt=0, lt=1)
    eval_rows: int = Field(200, ge=1)

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation

    @field_validator("quantize", mode="before")
    @classmethod
    def none_is_a_word_of_hub_serve(cls, value: Any) -> Any:
        return None if value == "none" else value

    @model_validator(mode="before")
    @classmethod
    def the_method_decides_options_and_rate(cls, value: Any) -> Any:
        """Read `options` by the method's own model; take its learning rate, and a few epochs, where none are given."""
        if not isinstance(value, Mapping) or value.get("method") not in METHODS:
            return value
        method = METHODS[value["method"]]
        options = value.get("options")
        if options is None or isinstance(options, Mapping):
            options = method.options.model_validate(dict(options or {}))
        rate = value.get("learning_rate")
        open_ended = value.get("steps") is None and value.get("epochs") is None
        length = {"epochs": DEFAULT_EPOCHS} if open_ended else {}
        return {**value, **length, "options": options, "learning_rate": method.learning_rate if rate is None else rate}

    @model_validator(mode="after")
    def steps_or_epochs(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


def method_of(recipe: Recipe) -> Method:
    return METHODS[recipe.method]


def parse_recipe(fields: Mapping[str, Any], source: str) -> Recipe:
    """Make a recipe of plain fields, or raise RecipeInvalid with every problem."""
    fields = {name: value for name, value in fields.items() if name not in RECORD_FIELDS}
    problems = unknown_method(fields)
    if problems:
        raise RecipeInvalid(source, problems)
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise RecipeInvalid(source, [describe(item, fields) for item in error.errors()]) from None


def read_fields(path: Path) -> dict[str, Any]:
    """Read a recipe file, YAML or JSON, as plain fields."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeInvalid(str(path), [f"cannot be read: {error.strerror}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeInvalid(str(path), [" ".join(str(error).split())]) from None
    if not isinstance(content, dict):
        raise RecipeInvalid(str(path), [f"holds {type(content).__name__}, not fields with values"])
    return {str(name): value for name, value in content.items()}


def record(recipe: Recipe, versions: Mapping[str, str]) -> dict[str, Any]:
    """Write a recipe out as the content of recipe.json, with the versions of the libraries that trained it."""
    return {"schema_version": SCHEMA_VERSION, **recipe.model_dump(mode="json"), "versions": dict(versions)}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Name each field in which two records differ."""
    fields = [*new, *(name for name in old if name not in new)]
    return [
        f"{name} was {json.dumps(old.get(name))} and is {json.dumps(new.get(name))}"
        for name in fields
        if old.get(name) != new.get(name)
    ]


def unknown_method(fields: Mapping[str, Any]) -> list[str]:
    method = fields.get("method")
    if method is None or method in METHODS:
        return []
    return [f"method {method!r} is unknown{nearest(str(method), METHODS)}; known: {', '.join(METHODS)}"]


def describe(item: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """Say in words what pydantic found wrong with one field."""
    place = [str(part) for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        method = METHODS[fields["method"]] if fields.get("method") in METHODS else None
        in_options = method is not None and place[-1] not in fields
        known = method.options.model_fields if method is not None and in_options else Recipe.model_fields
        owner = f"method {fields['method']} has no option" if in_options else "there is no field"
        return f"{owner} {place[-1]}{nearest(place[-1], known)}; known: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{'.'.join(place)} is missing"
    text = str(item["msg"]).removeprefix("Value error, ")
    if not place or item["type"] == "value_error":
        return text
    return f"{'.'.join(place)} is {item['input']!r}: {text[0].lower()}{text[1:]}"


def nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f" (nearest: {near[0]})" if near else ""
