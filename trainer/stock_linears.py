"""The base's own weights and biases, one Linear at a time, read from its files when they are asked for.

Memory holds what is asked for and nothing else. I in, O out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hub.base import Linear, StoredTensor, conv1d_layers, stored_tensors
from trainer.errors import BaseUnfit


@dataclass(frozen=True)
class StockLinears:
    """The Linears inside the network, without its head, and where the base's tensors lie."""

    linears: Mapping[str, Linear]
    tensors: Mapping[str, StoredTensor]
    transposed: frozenset[str]  # the last parts of the names of those that are stored (I, O)

    def weight(self, module: str) -> Tensor:
        """(O, I) in fp32, as the network multiplies with it. Raises: BaseUnfit."""
        entry, linear = self.tensors.get(f"{module}.weight"), self.linears[module]
        if entry is None:
            raise BaseUnfit(f"the base stores no {module}.weight, which this adapter is computed from")
        weight = _read(entry)
        weight_OI = weight.mT if module.rpartition(".")[2] in self.transposed else weight
        assert weight_OI.shape == (linear.outputs, linear.inputs), "the shapes were told from these very tensors"
        return weight_OI

    def bias(self, module: str) -> Tensor | None:
        """(O) in fp32, where the Linear has one. Raises: BaseUnfit."""
        entry = self.tensors.get(f"{module}.bias")
        return None if entry is None else _read(entry)


def stock_linears(folder: Path, model_type: str, linears: Mapping[str, Linear]) -> StockLinears:
    """Raises: BaseUnusable."""
    return StockLinears(linears, stored_tensors(folder), conv1d_layers(model_type))


def _read(entry: StoredTensor) -> Tensor:
    with safe_open(entry.file, framework="pt") as source:
        tensor: Tensor = source.get_tensor(entry.name)
    if not tensor.is_floating_point():
        raise BaseUnfit(f"the base stores {entry.name} as {entry.dtype}, which is no floating-point number")
    return tensor.to(torch.float32)
