"""Sparse changes: our own format names modules whole, with how many entries each has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hub.errors import Refused
from hub.validate import validate
from tests.unit.hub.makers import Array, write_adapter

ROOT = "base_model.model."
Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
ENTRIES = {Q0: 5, DOWN1: 1}


def config(base: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "peft_type": "SPARSE", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "entries": ENTRIES,
        "density": 0.01, "algorithm": "lt-sft", **changes,
    }  # fmt: skip
    return {key: value for key, value in given.items() if value is not Ellipsis}


def tensors(**changes: Array) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for module, count in ENTRIES.items():
        found[f"{ROOT}{module}.sparse_indices"] = np.arange(count, dtype=np.int32)
        found[f"{ROOT}{module}.sparse_values"] = np.ones(count, np.float16)
    return {**found, **{f"{ROOT}{Q0}.{part}": array for part, array in changes.items()}}


def problems(folder: Path) -> list[str]:
    with pytest.raises(Refused) as refusal:
        validate(folder)
    return [str(problem) for problem in refusal.value.problems]


def test_a_sparse_change_gives_its_manifest(tmp_path: Path, base: Path) -> None:
    manifest = validate(write_adapter(tmp_path / "a", config(base), tensors()))
    assert (manifest.kind, manifest.rank, manifest.targets) == ("sparse", None, ("down_proj", "q_proj"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"entries": ...}, "entries: is missing"),
        ({"entries": {}}, "entries: must be an object of 1 to 4096 modules"),
        ({"entries": [Q0]}, "entries: must be an object of 1 to 4096 modules"),
        ({"entries": {**ENTRIES, Q0: 0}}, f"entries: {Q0} must be a whole number above 0, not 0"),
        ({"entries": {**ENTRIES, Q0: True}}, f"entries: {Q0} must be a whole number above 0, not true"),
        ({"entries": {**ENTRIES, "model.norm": 1}}, "entries: model.norm is no Linear layer of the base"),
        ({"entries": {**ENTRIES, "q_proj": 1}}, "entries: q_proj is no Linear layer of the base"),
        ({"entries": {**ENTRIES, Q0: 1025}}, f"entries: {Q0} has 1024 weights, not 1025"),
        ({"density": 0}, "density: must be a number above 0 and at most 1, not 0"),
        ({"density": "1"}, "density: must be a number above 0 and at most 1, not 1"),
        ({"algorithm": "magic"}, "algorithm: magic is not served; served are lt-sft, diff-pruning, null"),
        ({"target_modules": ["q_proj"]}, "target_modules: is no field of SPARSE"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_its_config_must_not_say_is_refused_by_name(
    changes: dict[str, Any], reason: str, tmp_path: Path, base: Path
) -> None:
    assert reason in "\n".join(problems(write_adapter(tmp_path / "a", config(base, **changes), tensors())))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sparse_indices": np.arange(5, dtype=np.int64)}, "dtype I64 is not served; served are I32"),
        ({"sparse_indices": np.ones(5, np.float32)}, "dtype F32 is not served; served are I32"),
        ({"sparse_values": np.ones(5, np.int32)}, "dtype I32 is not served; served are F32, F16, BF16"),
        ({"sparse_values": np.ones(4, np.float32)}, "has shape (4), but the config and the base demand (5)"),
        ({"sparse_values": np.full(5, np.nan, np.float32)}, "holds 5 NaN or infinite of 5 values"),
        ({"sparse_bias": np.ones(5, np.float32)}, "is no tensor of this kind of adapter"),
    ],
)
def test_what_its_tensors_must_not_be_is_refused_by_name(
    changes: dict[str, Array], reason: str, tmp_path: Path, base: Path
) -> None:
    [problem] = problems(write_adapter(tmp_path / "a", config(base), tensors(**changes)))
    assert reason in problem
