"""Adapters of kinds that PEFT lacks and that change weights: sparse changes, and biases. Random files of both.

A sparse change is compared with the module that trains it; for biases there is no such module, and a stock network gets
those of the file. Formats: decision 18, and the head of hub/families/bitfit.py.

N entries of a Linear, O out, I in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROOT = "base_model.model."


def write_sparse(folder: Path, config: Mapping[str, Any], stock: nn.Module, targets: Sequence[str]) -> None:
    """The first target has one entry, its last; every other about `density` of its weights, so that some have none."""
    tensors: dict[str, Tensor] = {}
    for name in _named(stock, targets):
        weight = stock.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        places_N = (torch.rand(weight.numel()) < config["density"]).nonzero()[:, 0]
        if not tensors:
            places_N = torch.tensor([weight.numel() - 1])
        if len(places_N):
            tensors[f"{ROOT}{name}.sparse_indices"] = places_N.to(torch.int32)
            tensors[f"{ROOT}{name}.sparse_values"] = 0.5 * torch.randn(len(places_N))
    entries = {
        name.removeprefix(ROOT).removesuffix(".sparse_values"): len(tensor)
        for name, tensor in tensors.items()
        if name.endswith(".sparse_values")
    }
    _write(folder, {**config, "entries": entries}, tensors)


def write_biases(folder: Path, config: Mapping[str, Any], stock: nn.Module) -> None:
    """Another bias for every module with one, or for those that are named."""
    targets = config["target_modules"] or [""]
    biases = {name: parameter for name, parameter in stock.named_parameters() if name.endswith(".bias")}
    meant = {name: one for name, one in biases.items() if name.removesuffix(".bias").endswith(tuple(targets))}
    _write(folder, config, {ROOT + name: one.detach() + 0.2 * torch.randn_like(one) for name, one in meant.items()})


def with_biases(stock: nn.Module, folder: Path) -> nn.Module:
    """The network with the biases of the file in the place of its own."""
    for name, tensor in safetensors.torch.load_file(folder / "adapter_model.safetensors").items():
        stock.get_parameter(name.removeprefix(ROOT)).data.copy_(tensor)
    return stock


def _named(stock: nn.Module, ends: Sequence[str]) -> list[str]:
    linears = [name for name, module in stock.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name for name in linears if name.endswith(tuple(ends))]


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(dict(tensors), folder / "adapter_model.safetensors")
