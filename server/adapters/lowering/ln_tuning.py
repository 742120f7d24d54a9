"""LN tuning: the weights and biases of norms are trained, and nothing else.

F features.
Source: Zhao et al. 2023 (arXiv:2312.11420); peft 0.21.2, tuners/ln_tuning/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from server.adapters.lowering.linears import ROOT, expect
from server.adapters.lowering.target import Lowered, Target
from server.adapters.lowering.whole import norm_value
from server.errors import AdapterIncompatible

INNER = ".ln_tuning_layers."


def lower_ln_tuning(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """Each norm with the weight, and the bias where it has one, that the file holds whole."""
    given: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, inner, part = name.removeprefix(ROOT).partition(INNER)
        if module not in target.norms or not inner:
            raise AdapterIncompatible(f"tensor {name} belongs to no norm of this base")
        given.setdefault(module, {})[part] = tensor
    sites = {}
    for module, parts in given.items():
        shape = target.norms[module]
        wanted = {"weight"} if shape.bias_F is None else {"weight", "bias"}
        if parts.keys() != wanted:
            raise AdapterIncompatible(f"{module} has {sorted(parts)} where {sorted(wanted)} are expected")
        for part, tensor in parts.items():
            expect(module, part, tensor, (len(shape.weight_F),))
        bias_F = parts["bias"].float() if "bias" in parts else None
        sites[module] = norm_value(shape, parts["weight"].float(), bias_F, target)
    return Lowered(sites)
