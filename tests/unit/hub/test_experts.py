"""Mixtures of experts: what a checkpoint holds becomes what is loaded, and LoRA on its weights fits or is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hub.base import Modules, describe_base, modules
from hub.errors import BaseUnusable, Refused
from hub.experts import Parameter
from hub.ref import parse_reference
from hub.registry import LocalHub
from hub.validate import validate, validate_kept
from hub.wire import CommitBody, commit_body
from tests.unit.hub.makers import Array, write_adapter

HIDDEN, INNER, EXPERTS, RANK = 8, 12, 3, 2
LAYER = "model.layers.0.mlp"
ROOT = f"base_model.model.{LAYER}"
CONFIG: Mapping[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
    "intermediate_size": INNER, "vocab_size": 10,
}  # fmt: skip
LORA: Mapping[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "x", "r": RANK, "lora_alpha": 4,
    "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
}  # fmt: skip


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def stored(model_type: str, experts: int = EXPERTS) -> dict[str, Array]:
    """A layer's weights as checkpoints of this type keep them."""
    tensors = {
        "model.embed_tokens.weight": zeros(10, HIDDEN),
        "model.layers.0.self_attn.q_proj.weight": zeros(8, HIDDEN),
    }
    if model_type == "gpt_oss":
        tensors |= {
            f"{LAYER}.router.weight": zeros(experts, HIDDEN),
            f"{LAYER}.router.bias": zeros(experts),
            f"{LAYER}.experts.gate_up_proj": zeros(experts, HIDDEN, 2 * INNER),
            f"{LAYER}.experts.gate_up_proj_bias": zeros(experts, 2 * INNER),
            f"{LAYER}.experts.down_proj": zeros(experts, INNER, HIDDEN),
        }
        return tensors
    block = "model.layers.0.block_sparse_moe" if model_type == "mixtral" else LAYER
    gate, up, down = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    tensors[f"{block}.gate.weight"] = zeros(experts, HIDDEN)
    for number in range(experts):
        for part in (gate, up):
            tensors[f"{block}.experts.{number}.{part}.weight"] = zeros(INNER, HIDDEN)
        tensors[f"{block}.experts.{number}.{down}.weight"] = zeros(HIDDEN, INNER)
    return tensors


def write_mixture(folder: Path, model_type: str, tensors: Mapping[str, Array]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **CONFIG}))
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("model_type", "router"), [("mixtral", "gate"), ("qwen3_moe", "gate"), ("gpt_oss", "router")])
def test_experts_have_the_names_and_sizes_of_the_loaded_base(model_type: str, router: str, tmp_path: Path) -> None:
    base = write_mixture(tmp_path, model_type, stored(model_type))
    found = modules(base)
    assert list(found.parameters.items()) == [
        (f"{LAYER}.experts.gate_up_proj", Parameter(EXPERTS, HIDDEN, 2 * INNER)),
        (f"{LAYER}.experts.down_proj", Parameter(EXPERTS, INNER, HIDDEN)),
        (f"{LAYER}.{router}.weight", Parameter(1, HIDDEN, EXPERTS)),
    ]
    assert found.linears.keys() == {"model.layers.0.self_attn.q_proj", "lm_head"}
    assert {f"{LAYER}.experts", f"{LAYER}.{router}"} <= found.others
    assert describe_base(base).experts == EXPERTS


def test_packed_experts_have_the_sizes_that_they_are_unpacked_to(tmp_path: Path) -> None:
    """MXFP4: (experts, out, blocks of 32 inputs, 16 bytes)."""
    tensors = stored("gpt_oss")
    del tensors[f"{LAYER}.experts.gate_up_proj"]
    tensors[f"{LAYER}.experts.gate_up_proj_blocks"] = np.zeros((EXPERTS, 24, 2, 16), np.uint8)
    tensors[f"{LAYER}.experts.gate_up_proj_scales"] = np.zeros((EXPERTS, 24, 2), np.uint8)
    found = modules(write_mixture(tmp_path, "gpt_oss", tensors)).parameters
    assert next(iter(found)) == f"{LAYER}.experts.gate_up_proj"
    assert found[f"{LAYER}.experts.gate_up_proj"] == Parameter(EXPERTS, 64, 24)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        (f"{LAYER}.gate.weight", None, "has no router gate beside it"),
        (f"{LAYER}.experts.1.up_proj.weight", None, "the up_proj of .* are not alike, or some are missing"),
        (f"{LAYER}.experts.1.down_proj.weight", (HIDDEN, INNER + 1), "the down_proj of .* are not alike"),
        (f"{LAYER}.experts.3.down_proj.weight", (HIDDEN, INNER), None),
        (f"{LAYER}.experts.4.down_proj.weight", (HIDDEN, INNER), "some are missing"),
        (f"{LAYER}.experts.gate_up_proj", (EXPERTS, HIDDEN), "not one of all experts"),
    ],
)
def test_experts_that_do_not_fit_each_other_are_refused(
    name: str, shape: tuple[int, ...] | None, reason: str | None, tmp_path: Path
) -> None:
    tensors = stored("qwen3_moe")
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = zeros(*shape)
    base = write_mixture(tmp_path, "qwen3_moe", tensors)
    if reason is None:
        assert modules(base).parameters[f"{LAYER}.experts.down_proj"].experts == EXPERTS + 1
        return
    with pytest.raises(BaseUnusable, match=reason):
        modules(base)


def test_another_number_of_experts_is_another_base(tmp_path: Path) -> None:
    three, four = (write_mixture(tmp_path / str(n), "mixtral", stored("mixtral", n)) for n in (3, 4))
    assert describe_base(three).fingerprint != describe_base(four).fingerprint


def lora_tensors(**changes: tuple[int, ...] | None) -> dict[str, Array]:
    """The last weight of a module is wrapped outermost."""
    shapes: dict[str, tuple[int, ...] | None] = {
        "experts.base_layer.lora_A": (RANK * EXPERTS, HIDDEN),
        "experts.base_layer.lora_B": (2 * INNER, RANK * EXPERTS),
        "experts.lora_A": (RANK * EXPERTS, INNER),
        "experts.lora_B": (HIDDEN, RANK * EXPERTS),
        "gate.lora_A": (RANK, HIDDEN),
        "gate.lora_B": (EXPERTS, RANK),
    }
    return {
        f"{ROOT}.{name}.weight": zeros(*shape) for name, shape in {**shapes, **changes}.items() if shape is not None
    }


def test_lora_on_experts_is_accepted_here_and_by_a_registry_that_is_told_of_the_base(tmp_path: Path) -> None:
    base = write_mixture(tmp_path / "base", "mixtral", stored("mixtral"))
    folder = write_adapter(tmp_path / "adapter", LORA, lora_tensors())
    manifest = validate(folder, base=base)
    assert (manifest.rank, manifest.targets) == (RANK, ("down_proj", "gate.weight", "gate_up_proj"))
    told = CommitBody.model_validate(commit_body(describe_base(base), modules(base), aliases=[], note=""))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}

    def opened(name: str) -> Any:
        return (folder / name).open("rb"), sizes[name]

    kept = validate_kept("x", sizes, opened, base=told.base.record(), modules=told.modules.record())
    assert kept.digest == manifest.digest
    before = Modules(told.modules.record().linears, told.modules.record().others)
    with pytest.raises(Refused, match="is no weight of a router or of experts of the base, which has none"):
        validate_kept("x", sizes, opened, base=told.base.record(), modules=before)


def test_the_same_weights_in_another_order_are_the_same_adapter(tmp_path: Path) -> None:
    """PEFT writes target_parameters from a set."""
    base = write_mixture(tmp_path / "base", "mixtral", stored("mixtral"))
    turned = {**LORA, "target_parameters": LORA["target_parameters"][::-1]}
    one, other = (
        validate(write_adapter(tmp_path / name, config, lora_tensors()), base=base)
        for name, config in (("one", LORA), ("other", turned))
    )
    assert one.digest == other.digest


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"target_parameters": ["experts.up_proj"]},
            "experts.up_proj is no weight of a router or of experts of the base",
        ),
        (
            {"target_parameters": ["q_proj.weight"]},
            "is the weight of a Linear layer, .*q_proj; name that in target_modules",
        ),
        ({"target_parameters": ["embed_tokens.weight"]}, "embed_tokens.weight, no weight of a router or of experts"),
        ({"use_dora": True}, "use_dora: true cannot stand beside target_parameters"),
        ({"lora_bias": True}, "lora_bias: true cannot stand beside target_parameters"),
        ({"lora_dropout": 0.1}, "lora_dropout: 0.1 cannot stand beside target_parameters"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: true cannot stand beside target_parameters"),
        ({"bias": "lora_only"}, "bias: lora_only cannot stand beside target_parameters; only none can"),
        ({"target_modules": ["w1"]}, "w1 is what a router or an expert was called before transformers 5"),
        ({"target_modules": ["q_proj", "mlp.gate"]}, "mlp.gate is what a router or an expert was called before"),
        ({"target_modules": ["experts"]}, "mlp.experts is no Linear layer"),
        ({"rank_pattern": {"gate_up_proj": 300}}, "rank 300 is above max_rank"),
        ({"rank_pattern": {"experts.down_proj": 1}}, r"experts.lora_A.weight.* demand \(3, 12\)"),
        ({"target_parameters": None}, "target_modules: must be a list of module names"),
        ({"target_modules": ["q_proj"], "target_parameters": []}, "experts.lora_A.weight"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    base = write_mixture(tmp_path / "base", "mixtral", stored("mixtral"))
    with pytest.raises(Refused, match=reason):
        validate(write_adapter(tmp_path / "adapter", {**LORA, **changes}, lora_tensors()), base=base)


@pytest.mark.parametrize("part", ["experts.base_layer.lora_A", "experts.lora_B", "gate.lora_A"])
def test_a_tensor_that_is_missing_or_misfits_is_named(part: str, tmp_path: Path) -> None:
    base = write_mixture(tmp_path / "base", "mixtral", stored("mixtral"))
    for changes, reason in (({part: None}, "is missing"), ({part: (1, 1)}, r"has shape \(1, 1\)")):
        folder = write_adapter(tmp_path / reason[:3], LORA, lora_tensors(**changes))
        with pytest.raises(Refused, match=f"{part}.weight.*{reason}"):
            validate(folder, base=base)


def test_it_is_pushed_and_comes_back_byte_by_byte(tmp_path: Path) -> None:
    base = write_mixture(tmp_path / "base", "qwen3_moe", stored("qwen3_moe"))
    folder = write_adapter(tmp_path / "adapter", {**LORA, "base_model_name_or_path": str(base)}, lora_tensors())
    hub = LocalHub(tmp_path / "home")
    hub.push(folder, "experts")
    hub.pull(parse_reference("experts"), tmp_path / "pulled")
    pulled = load_file(tmp_path / "pulled" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in pulled.items()} == {
        name: tensor.shape for name, tensor in lora_tensors().items()
    }
