"""A folder in, a Manifest or all its problems out: good folders of every kind, and hostile ones."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub.digest import sha256_of
from hub.errors import NotFound, Refused
from hub.manifest import parse_manifest
from hub.methods import Limits
from hub.validate import config_bytes, open_regular, validate
from hub.weights import scan_weights
from tests.unit.hub.makers import (
    Array,
    lora_config,
    lora_tensors,
    raw_safetensors,
    tensor,
    write_adapter,
    write_base,
    write_golden,
    write_ia3,
    write_lora,
    write_prompt,
)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def problems(folder: Path, **options: Any) -> str:
    """All problems of a folder as text; fails when there are none."""
    with pytest.raises(Refused) as refusal:
        validate(folder, **options)
    return "\n".join(map(str, refusal.value.problems))


def with_tensors(folder: Path, change: Callable[[dict[str, Array]], object]) -> Path:
    """The good adapter's tensors, changed."""
    tensors = lora_tensors()
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_a_lora_adapter_gives_its_manifest(adapter: Path, base: Path) -> None:
    (adapter / "recipe.json").write_text(json.dumps({"seed": 1, "data": {"digest": "sha256:ab", "rows": 5}}))
    (adapter / "metrics.json").write_text(json.dumps({"eval_loss": 0.5}))
    manifest = validate(write_golden(adapter))
    assert (manifest.kind, manifest.rank, manifest.targets) == ("lora", 4, ("q_proj", "v_proj"))
    assert manifest.parameters == sum(array.size for array in lora_tensors().values())
    assert manifest.bytes == (adapter / WEIGHTS).stat().st_size
    assert manifest.base.name == "tiny-llama"
    assert manifest.data_digest == "sha256:ab"
    assert manifest.metrics == {"eval_loss": 0.5}
    for entry in manifest.files:
        data = config_bytes(manifest) if entry.path == CONFIG else (adapter / entry.path).read_bytes()
        assert (entry.size, entry.sha256) == (len(data), sha256_of(data))
    assert parse_manifest(manifest.model_dump_json(), manifest.digest) == manifest


@pytest.mark.parametrize(
    ("kind", "peft_type"), [("prefix", "PREFIX_TUNING"), ("prompt", "PROMPT_TUNING"), ("p-tuning", "P_TUNING")]
)
def test_virtual_tokens_give_their_manifest(tmp_path: Path, base: Path, kind: str, peft_type: str) -> None:
    manifest = validate(write_prompt(tmp_path / "a", base, kind=peft_type, tokens=5))
    assert (manifest.kind, manifest.virtual_tokens, manifest.rank) == (kind, 5, None)


def write_multitask(folder: Path, base: Path, tasks: int = 3, **changes: Any) -> Path:
    write_prompt(folder, base, kind="MULTITASK_PROMPT_TUNING", tokens=5, num_tasks=tasks, num_ranks=2, **changes)
    hidden = json.loads((base / "config.json").read_text())["hidden_size"]
    factors = {"prefix_task_cols": (tasks, 5, 2), "prefix_task_rows": (tasks, 2, hidden)}
    shapes = {"prompt_embeddings": (5, hidden), **factors}
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, folder / WEIGHTS)
    return folder


def test_a_multitask_prompt_answers_as_one_task(tmp_path: Path, base: Path) -> None:
    versions = [validate(write_multitask(tmp_path / "a", base, task_id=task)) for task in (0, 2)]
    assert {(one.kind, one.virtual_tokens) for one in versions} == {("multitask-prompt", 5)}
    assert versions[0].digest != versions[1].digest
    assert validate(write_multitask(tmp_path / "a", base, tasks=1)).config["num_ranks"] == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "task_id: is missing: the file holds 3 tasks and an adapter answers as one; write the number of the task"),
        ({"task_id": 3}, "task_id: 3 is not among the 3 tasks, which are numbered from 0"),
        ({"task_id": "1"}, "task_id: must be a whole number, not 1"),
        ({"task_id": 0, "num_tasks": 0}, "num_tasks: must be a whole number above 0, not 0"),
        ({"task_id": 0, "num_ranks": 3}, "prefix_task_cols: has shape (3, 5, 2), but the config and the base demand"),
    ],
)
def test_a_multitask_prompt_of_no_task_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path, base: Path
) -> None:
    folder = write_multitask(tmp_path / "a", base)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    assert reason in problems(folder)


def test_an_ia3_adapter_gives_its_manifest(tmp_path: Path, base: Path) -> None:
    assert validate(write_ia3(tmp_path / "a", base)).kind == "ia3"


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_is_served(adapter: Path, dtype: str) -> None:
    if dtype == "F16":
        save_file(lora_tensors(dtype=np.float16), adapter / WEIGHTS)
    else:
        write_bf16(adapter, bits=0x3F80)
    assert validate(adapter).rank == 4


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80, 0xFFFF])
def test_nan_and_infinity_are_found_in_bfloat16(adapter: Path, bits: int) -> None:
    write_bf16(adapter, bits=bits)
    assert "NaN or infinite" in problems(adapter)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nan_and_infinity_are_found_wherever_they_hide(adapter: Path, value: float, dtype: Any) -> None:
    tensors = lora_tensors(dtype=dtype)
    tensors[f"{Q0}.lora_B.weight"][-1, -1] = value
    save_file(tensors, adapter / WEIGHTS)
    assert problems(adapter) == f"{WEIGHTS}: {Q0}.lora_B.weight: holds 1 NaN or infinite of 128 values"


def write_bf16(folder: Path, *, bits: int) -> None:
    """numpy has no bfloat16, so the file is put together by hand; one value of the last tensor has the given bits."""
    header, payload = {}, b""
    for name, array in lora_tensors().items():
        data = np.full(array.size, 0x3F80, "<u2").tobytes()
        header[name] = tensor("BF16", array.shape, len(payload), len(payload) + len(data))
        payload += data
    (folder / WEIGHTS).write_bytes(raw_safetensors(header, payload[:-2] + bits.to_bytes(2, "little")))


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no folder"):
        validate(tmp_path / "nothing")


def test_an_empty_folder_lacks_both_files(tmp_path: Path) -> None:
    assert problems(tmp_path) == f"{CONFIG}: is missing\n{WEIGHTS}: is missing"


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "training_args.bin", "optimizer.pt", "x.pkl", "model.PTH", "rng.pickle", "a.npz"]
)
def test_a_pickle_is_refused_and_never_opened(adapter: Path, name: str) -> None:
    (adapter / name).write_bytes(pickle.dumps(Bomb()))
    assert "pickle" in problems(adapter)


class Bomb:
    """Ends the test run if anybody ever unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (99,)


@pytest.mark.parametrize("name", [CONFIG, "README.md", "chat_template.jinja", "recipe.json", WEIGHTS])
def test_a_pickle_under_another_name_is_refused(adapter: Path, name: str) -> None:
    (adapter / name).write_bytes(pickle.dumps(Bomb()))
    assert name in problems(adapter)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("notes.txt", "no part of an adapter"),
        ("tokenizer.json", "belongs to the base"),
        (".hidden", "no part of an adapter"),
        ("evil\n.json", "no part of an adapter"),
        ("..x", "no part of an adapter"),
    ],
)
def test_a_file_that_is_no_part_of_an_adapter_is_refused(adapter: Path, name: str, reason: str) -> None:
    (adapter / name).write_text("x")
    text = problems(adapter)
    assert reason in text
    assert len(text.splitlines()) == 1


def test_links_folders_and_pipes_are_refused(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (adapter / "metrics.json").symlink_to(tmp_path / "secret")
    (adapter / "checkpoint-100").mkdir()
    os.mkfifo(adapter / "recipe.json")
    text = problems(adapter)
    assert "metrics.json: is a symbolic link" in text
    assert "checkpoint-100: is a folder" in text
    assert "recipe.json: is no plain file" in text


def test_a_file_that_becomes_a_link_or_a_pipe_after_it_was_listed_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError):
            open_regular(tmp_path / name)


def test_weights_that_are_a_link_are_refused(adapter: Path, tmp_path: Path) -> None:
    (adapter / WEIGHTS).rename(tmp_path / "elsewhere")
    (adapter / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    assert problems(adapter) == f"{WEIGHTS}: is a symbolic link; copy the file itself here"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[]", "must be a JSON object"),
        (b"{", "no usable JSON"),
        (b'{"peft_type": "LORA", "peft_type": "IA3"}', "stands twice"),
        (b'{"a": NaN}', "no JSON number"),
        (b'"' + b"x" * (1 << 20) + b'"', "above the limit of 1048576"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a":' * 50_000, "nested too deeply"),
    ],
)
def test_a_config_that_is_no_usable_json_is_refused(adapter: Path, data: bytes, reason: str) -> None:
    (adapter / CONFIG).write_bytes(data)
    assert reason in problems(adapter)


def test_tensors_that_are_missing_extra_or_misnamed_are_each_named(adapter: Path) -> None:
    def change(tensors: dict[str, Array]) -> None:
        del tensors[f"{Q0}.lora_A.weight"]
        tensors[f"{Q0.replace('.0.', '.9.')}.lora_A.weight"] = np.zeros((4, 32), np.float32)
        tensors[f"{Q0.replace('q_proj', 'k_proj')}.lora_A.weight"] = np.zeros((4, 32), np.float32)
        tensors["model.layers.0.self_attn.v_proj.lora_A.weight"] = np.zeros((4, 32), np.float32)
        tensors[f"{Q0}.lora_magnitude_vector"] = np.zeros(32, np.float32)
        tensors["base_model.model.lm_head.base_layer.weight"] = np.zeros((64, 32), np.float32)
        tensors["../../etc/passwd"] = np.zeros(1, np.float32)
        tensors["\x1b[31m\n"] = np.zeros(1, np.float32)

    text = problems(with_tensors(adapter, change))
    for expected in (
        f"{Q0}.lora_A.weight: is missing",
        "model.layers.9.self_attn.q_proj, which is no Linear layer of the base",
        "k_proj, which the config does not target",
        "model.layers.0.self_attn.v_proj.lora_A.weight: does not start with base_model.model.",
        "lora_magnitude_vector: a magnitude of DoRA, but use_dora is not true",
        "a copy of the base's own weight",
        "../../etc/passwd: does not start",
    ):
        assert expected in text
    assert len(text.splitlines()) == 8
    assert "\x1b" not in text


def test_shapes_are_demanded_by_config_and_base(adapter: Path) -> None:
    def change(tensors: dict[str, Array]) -> None:
        tensors[f"{Q0}.lora_A.weight"] = np.zeros((5, 32), np.float32)
        tensors[f"{Q0}.lora_B.weight"] = np.zeros((32, 4, 1), np.float32)

    text = problems(with_tensors(adapter, change))
    assert "lora_A.weight: has shape (5, 32), but the config and the base demand (4, 32)" in text
    assert "lora_B.weight: has shape (32, 4, 1), but the config and the base demand (32, 4)" in text


def test_patterns_change_the_rank_of_the_modules_that_they_fit(tmp_path: Path, base: Path) -> None:
    folder = write_lora(tmp_path / "a", base, rank_pattern={"layers.0.self_attn.q_proj": 2})
    assert "has shape (4, 32), but the config and the base demand (2, 32)" in problems(folder)


def test_an_adapter_for_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", hidden_size=64, head_dim=8)
    assert "prompt_embeddings: has shape (3, 32)" in problems(write_prompt(tmp_path / "p", other, token_dim=None))
    mistake = problems(write_prompt(tmp_path / "q", other))
    assert "token_dim: is 32, but base other has 64" in mistake


def test_an_adapter_without_a_base_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    nameless = write_adapter(tmp_path / "b", lora_config(base, base_model_name_or_path=None), lora_tensors())
    assert problems(nameless) == f"{CONFIG}: base_model_name_or_path: names no base; name one with --base"
    assert validate(nameless, base=base).rank == 4
    lost = write_lora(tmp_path / "c", base, base_model_name_or_path="no-such-base-anywhere")
    assert "no-such-base-anywhere is no embedded base" in problems(lost)


def test_halves_without_partners_are_told_even_without_a_base(tmp_path: Path, base: Path) -> None:
    tensors = lora_tensors()
    del tensors[f"{Q0}.lora_B.weight"]
    folder = write_adapter(tmp_path / "a", lora_config(base, base_model_name_or_path="nowhere/nothing"), tensors)
    assert f"{Q0}.lora_A.weight: has no partner {Q0}.lora_B.weight" in problems(folder)


def test_a_dtype_that_is_not_served_is_refused(adapter: Path) -> None:
    save_file(lora_tensors(dtype=np.float64), adapter / WEIGHTS)
    assert "dtype F64 is not served; served are F32, F16, BF16" in problems(adapter)


@pytest.mark.parametrize("cut", [0, 4, 100, -1, -4096])
def test_a_truncated_file_is_refused(adapter: Path, cut: int) -> None:
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:cut])
    assert WEIGHTS in problems(adapter)


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(adapter: Path) -> None:
    data = (adapter / WEIGHTS).read_bytes()
    scan = scan_weights(BytesIO(data[:-4]), len(data), layout=None, modules=None)
    assert "became shorter while it was read" in str(scan.problems[0])


def test_a_header_above_the_limit_is_refused(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes(raw_safetensors(b"{" + b" " * (9 << 20) + b"}"))
    assert "above the limit of 8388608" in problems(adapter)


def test_problems_of_every_sort_come_in_one_round(tmp_path: Path, base: Path) -> None:
    tensors = lora_tensors()
    tensors[f"{Q0}.lora_A.weight"][0, 0] = np.nan
    del tensors[f"{Q0}.lora_B.weight"]
    config = lora_config(base, use_qalora=True, lora_dropot=1, rank_pattern={"none": 300})
    folder = write_adapter(tmp_path / "a", config, tensors)
    (folder / "x.bin").write_bytes(b"")
    (folder / "golden.json").write_text("{}")
    text = problems(folder)
    for expected in (
        "x.bin",
        "use_qalora",
        "lora_dropot",
        "rank 300 is above max_rank 256",
        "NaN",
        "is missing",
        "golden",
    ):
        assert expected in text


def test_the_limits_hold(adapter: Path, base: Path) -> None:
    assert "above the limit of 100" in problems(adapter, limits=Limits(max_weights_bytes=100))
    assert "rank 4 is above max_rank 2" in problems(adapter, limits=Limits(max_rank=2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"0.logits": np.zeros(63, np.float32)}, "is F32 (63), must be F32 (64)"),
        ({"0.logits": np.zeros(64, np.float16)}, "is F16 (64), must be F32 (64)"),
        ({"0.logits": np.full(64, np.nan, np.float32)}, "NaN"),
        ({"0.input_ids": np.zeros(4, np.int64)}, "is I64 (4), must be I64 (5)"),
        ({"0.input_ids": np.full(5, 64, np.int64)}, "outside 0 to 63"),
        ({"0.input_ids": np.full(5, -1, np.int64)}, "outside 0 to 63"),
        ({"5.logits": np.zeros(64, np.float32)}, "no row's"),
    ],
)
def test_golden_rows_must_fit_the_base(adapter: Path, change: dict[str, Array], reason: str) -> None:
    write_golden(adapter)
    tensors = {f"{row}.input_ids": np.arange(5) for row in (0, 1)}
    tensors |= {f"{row}.logits": np.zeros(64, np.float32) for row in (0, 1)}
    save_file({**tensors, **change}, adapter / "golden.safetensors")
    assert reason in problems(adapter)


@pytest.mark.parametrize(
    "rows",
    [None, [], [{"prompt": "x"}], [{"prompt": 1, "tokens": 5}], [{"prompt": "x", "tokens": 0}], [1] * 300, "rows"],
)
def test_golden_rows_of_a_wrong_form_are_refused(adapter: Path, rows: Any) -> None:
    write_golden(adapter)
    (adapter / "golden.json").write_text(json.dumps({"schema_version": 1, "rows": rows}))
    assert "golden.json" in problems(adapter)


def test_golden_rows_may_tell_how_their_base_was_held(adapter: Path) -> None:
    told = json.loads((write_golden(adapter) / "golden.json").read_text())
    (adapter / "golden.json").write_text(json.dumps({**told, "quantize": "nf4"}))
    validate(adapter)
    (adapter / "golden.json").write_text(json.dumps({**told, "quantize": "fp4"}))
    assert problems(adapter).startswith("golden.json: quantize: must be nf4 or int8")


def test_golden_files_come_in_pairs(adapter: Path) -> None:
    write_golden(adapter)
    (adapter / "golden.safetensors").unlink()
    assert problems(adapter) == "golden.safetensors: is missing beside golden.json"


@pytest.mark.parametrize("recipe", [{"parents": ["x"]}, {"parents": "sha256:"}, {"data": 5}, {"data": {"digest": 5}}])
def test_what_the_manifest_takes_from_a_recipe_must_have_its_form(adapter: Path, recipe: dict[str, Any]) -> None:
    (adapter / "recipe.json").write_text(json.dumps(recipe))
    assert "recipe.json" in problems(adapter)


def test_parents_of_a_recipe_are_lineage(adapter: Path) -> None:
    parent = "sha256:" + "0" * 64
    (adapter / "recipe.json").write_text(json.dumps({"parents": [parent]}))
    assert validate(adapter).parents == (parent,)


def test_the_manifest_of_an_earlier_pull_is_made_anew(adapter: Path) -> None:
    before = validate(adapter)
    (adapter / "manifest.json").write_text("anything")
    assert validate(adapter) == before
