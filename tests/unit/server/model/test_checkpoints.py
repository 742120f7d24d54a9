"""Checkpoints in 4 bits, written here number by number as GPTQ and AWQ store them, are served as what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hub.base import modules
from server.config import ModelConfig
from server.errors import StartupRefused
from server.model.load import load_network
from tests.oracle.conftest import SMALL

GROUP = 32
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def wrapped(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number


def pack_rows(numbers: list[list[int]]) -> Tensor:
    """8 numbers that stand below each other in 32 bits, the first lowest."""
    columns = range(len(numbers[0]))
    packed = [
        [wrapped(sum(numbers[row + k][column] << 4 * k for k in range(8))) for column in columns]
        for row in range(0, len(numbers), 8)
    ]
    return torch.tensor(packed, dtype=torch.int32)


def pack_columns(numbers: list[list[int]], places: tuple[int, ...] = tuple(range(8))) -> Tensor:
    packed = [
        [wrapped(sum(row[column + places[k]] << 4 * k for k in range(8))) for column in range(0, len(row), 8)]
        for row in numbers
    ]
    return torch.tensor(packed, dtype=torch.int32)


def make(folder: Path, config: dict[str, Any], *, spread: bool = False) -> dict[str, Tensor]:
    """A checkpoint of random codes, and the weights that they mean. `spread`: the groups' inputs lie apart."""
    torch.manual_seed(0)
    shape = LlamaConfig(**{**SMALL, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96})
    network = LlamaForCausalLM(shape)
    tensors = dict(network.state_dict())
    meant = {}
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        outputs, inputs = module.weight.shape
        codes, zeros = torch.randint(0, 16, (inputs, outputs)), torch.randint(1, 16, (inputs // GROUP, outputs))
        scales = (torch.rand(inputs // GROUP, outputs) / 40).half()
        group_of = torch.arange(inputs) // GROUP
        if spread:
            group_of = group_of[torch.randperm(inputs)]
        meant[name] = ((codes - zeros[group_of]) * scales[group_of].float()).t()
        del tensors[f"{name}.weight"]
        if config["quant_method"] == "gptq":
            less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
            tensors[f"{name}.qweight"] = pack_rows(codes.tolist())
            tensors[f"{name}.qzeros"] = pack_columns((zeros - less).tolist())
            tensors[f"{name}.g_idx"] = group_of.int()
        else:
            tensors[f"{name}.qweight"] = pack_columns(codes.tolist(), (0, 2, 4, 6, 1, 3, 5, 7))
            tensors[f"{name}.qzeros"] = pack_columns(zeros.tolist(), (0, 2, 4, 6, 1, 3, 5, 7))
        tensors[f"{name}.scales"] = scales
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = {**json.loads(shape.to_json_string(use_diff=False)), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**told, "quantization_config": config}))
    return meant


@pytest.mark.parametrize(
    ("config", "spread"),
    [(GPTQ, False), (GPTQ, True), ({**GPTQ, "checkpoint_format": "gptq_v2", "desc_act": True}, True), (AWQ, False)],
)
def test_codes_are_served_as_the_weights_they_mean(config: dict[str, Any], spread: bool, tmp_path: Path) -> None:
    meant = make(tmp_path, config, spread=spread)
    network = load_network(ModelConfig(base="tiny", dtype="float32"), tmp_path, name="tiny")
    assert network.facts.quantized
    for name, linear in modules(tmp_path).linears.items():
        assert name == "lm_head" or (linear.outputs, linear.inputs) == meant[name].shape
    for name, weight in meant.items():
        assert torch.equal(network.weight(name), weight), name
    whole = sum(weight.nbytes for weight in meant.values())
    assert network.facts.weight_bytes < whole / 2 + 4 * 64 * 128 * 2 + 4096


@pytest.mark.parametrize(
    ("change", "asked", "refusal"),
    [
        ({"bits": 3}, "none", "bits 3"),
        ({"dynamic": {"x": {}}}, "none", "dynamic"),
        ({"checkpoint_format": "marlin"}, "none", "format marlin"),
        ({"quant_method": "hqq"}, "none", "quantized by 'hqq': known are gptq, awq, bitsandbytes"),
        ({}, "int8", "--quantize int8: the checkpoint is quantized by gptq already"),
        ({"group_size": 64}, "none", "in groups of 64"),
    ],
)
def test_what_is_not_served_is_refused_by_name(change: Any, asked: str, refusal: str, tmp_path: Path) -> None:
    make(tmp_path, GPTQ)
    told = json.loads((tmp_path / "config.json").read_text())
    told["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(StartupRefused, match=refusal):
        load_network(ModelConfig(base="tiny", dtype="float32", quantize=asked), tmp_path, name="tiny")


@pytest.mark.parametrize("change", ["gone", "strange", "wrapped"])
def test_a_checkpoint_that_does_not_fit_is_refused(change: str, tmp_path: Path) -> None:
    make(tmp_path, GPTQ)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    place = "model.layers.0.self_attn.q_proj"
    if change == "gone":
        del tensors["model.norm.weight"]
    elif change == "strange":
        tensors["model.other.weight"] = torch.zeros(2)
    else:
        tensors[f"{place}.qzeros"] = torch.full_like(tensors[f"{place}.qzeros"], -1)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StartupRefused, match="15" if change == "wrapped" else "does not fit the architecture"):
        load_network(ModelConfig(base="tiny", dtype="float32"), tmp_path, name="tiny")


def test_a_checkpoint_of_bitsandbytes_brings_its_own(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    torch.manual_seed(0)
    whole = LlamaForCausalLM(LlamaConfig(**{**SMALL, "hidden_size": 64, "intermediate_size": 128}))
    whole.save_pretrained(tmp_path / "whole")
    told = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=told, device_map="cpu", dtype=torch.float32
    ).save_pretrained(tmp_path / "base")
    network = load_network(ModelConfig(base="tiny", dtype="float32"), tmp_path / "base", name="tiny")
    asked = load_network(ModelConfig(base="tiny", dtype="float32", quantize="nf4"), tmp_path / "whole", name="tiny")
    place = "model.layers.0.self_attn.q_proj"
    assert network.facts.quantized
    torch.testing.assert_close(network.weight(place), asked.weight(place), rtol=1e-2, atol=1e-3)
