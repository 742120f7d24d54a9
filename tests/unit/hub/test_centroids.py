"""Centroids at push: kept when they fit the base, refused with every reason when they do not, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub.base import describe_base
from hub.centroids import embedding_layer
from hub.errors import Refused
from hub.registry import LocalHub
from hub.validate import validate
from tests.unit.hub.makers import HIDDEN, LAYERS, Array, write_lora

COUNT = 3


def tensors() -> dict[str, Array]:
    random = np.random.default_rng(0)
    return {
        "mean": random.normal(size=HIDDEN).astype(np.float32),
        "scale": np.ones(HIDDEN, np.float32),
        "centroids": random.normal(size=(COUNT, HIDDEN)).astype(np.float32),
    }


def write_centroids(folder: Path, network: Path, *, values: dict[str, Array] | None = None, **changes: Any) -> Path:
    save_file({**tensors(), **(values or {})}, folder / "centroids.safetensors")
    said = {
        "schema_version": 1,
        "base": describe_base(network).fingerprint,
        "layer": embedding_layer(LAYERS),
        "pooling": "mean",
        "prompts": 40,
        "centroids": COUNT,
        "threshold": 0.5,
    }
    kept = {key: value for key, value in {**said, **changes}.items() if value is not Ellipsis}
    (folder / "centroids.json").write_text(json.dumps(kept))
    return folder


def problems(folder: Path) -> str:
    with pytest.raises(Refused) as caught:
        validate(folder)
    return str(caught.value)


def test_centroids_are_kept_and_are_part_of_the_digest(adapter: Path, base: Path, tmp_path: Path) -> None:
    before = validate(adapter)
    after = validate(write_centroids(adapter, base))
    assert {entry.path for entry in after.files} - {entry.path for entry in before.files} == {
        "centroids.json",
        "centroids.safetensors",
    }
    assert after.digest != before.digest
    hub = LocalHub(tmp_path / "home")
    hub.push(adapter, "bot")
    assert hub.read(after.digest, "centroids.safetensors") == (adapter / "centroids.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base": "0" * 64}, "the fingerprint of the base"),
        ({"layer": LAYERS}, f"must be {LAYERS // 2}, the middle of the base"),
        ({"layer": True}, "the middle of the base"),
        ({"pooling": "last"}, 'must be "mean"'),
        ({"prompts": 0}, "a number of prompts"),
        ({"centroids": 0}, "must be 1 to 256"),
        ({"centroids": 257}, "must be 1 to 256"),
        ({"centroids": 2}, f"is F32 ({COUNT}, {HIDDEN}), must be F32 (2, {HIDDEN})"),
        ({"threshold": 1.5}, "a number from -1 to 1"),
        ({"threshold": True}, "a number from -1 to 1"),
        ({"threshold": ...}, "must be an object of"),
        ({"secret": 1}, "must be an object of"),
        ({"schema_version": 2}, "schema_version 1"),
    ],
)
def test_what_centroids_say_must_fit_the_base(adapter: Path, base: Path, changes: dict[str, Any], reason: str) -> None:
    assert reason in problems(write_centroids(adapter, base, **changes))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"mean": np.full(HIDDEN, np.nan, np.float32)}, "mean: holds NaN or infinite"),
        ({"centroids": np.full((COUNT, HIDDEN), np.inf, np.float32)}, "centroids: holds NaN or infinite"),
        ({"scale": np.zeros(HIDDEN, np.float32)}, "scale: holds values that are not above 0"),
        ({"mean": np.zeros(HIDDEN + 1, np.float32)}, f"is F32 ({HIDDEN + 1}), must be F32 ({HIDDEN})"),
        ({"mean": np.zeros(HIDDEN, np.float16)}, f"is F16 ({HIDDEN}), must be F32 ({HIDDEN})"),
        ({"more": np.zeros(1, np.float32)}, "is none of mean, scale and centroids"),
    ],
)
def test_their_tensors_must_fit_what_they_say(adapter: Path, base: Path, values: dict[str, Array], reason: str) -> None:
    assert reason in problems(write_centroids(adapter, base, values=values))


@pytest.mark.parametrize("missing", ["centroids.json", "centroids.safetensors"])
def test_the_two_files_come_together(adapter: Path, base: Path, missing: str) -> None:
    write_centroids(adapter, base)
    (adapter / missing).unlink()
    assert f"{missing}: is missing beside" in problems(adapter)


def test_a_file_above_its_limit_is_refused_unread(adapter: Path, base: Path) -> None:
    write_centroids(adapter, base)
    with (adapter / "centroids.safetensors").open("r+b") as file:
        file.truncate((64 << 20) + 1)
    assert "above the limit of 67108864" in problems(adapter)


def test_centroids_of_another_base_do_not_come_through(tmp_path: Path, base: Path) -> None:
    folder = write_centroids(write_lora(tmp_path / "other", base), base)
    said = json.loads((folder / "centroids.json").read_text())
    (folder / "centroids.json").write_text(json.dumps({**said, "base": None}))
    assert "must be" in problems(folder)
