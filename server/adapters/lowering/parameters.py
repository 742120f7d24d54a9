"""LoRA on the weights of routers and experts, which belong to no Linear: `target_parameters`.

PEFT wraps a module once for each weight of it that is targeted, in the module's order, the last outermost; an inner
wrapper's tensors have `base_layer` in their names. A is (r * E, I) with an expert's rows together; B is (O, r * E) with
the columns of one rank together.

r rank, E experts, I in, O out.
Source: peft 0.21.2, tuners/lora/layer.py `ParamWrapper`, tuners/tuners_utils.py `_inject_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hub.families.linears import pattern_rank
from hub.families.lora import scaling
from server.adapters.lowering.linears import ROOT, expect
from server.adapters.lowering.target import Target
from server.errors import AdapterIncompatible
from server.primitives.experts import ExpertsLowRank
from server.primitives.lowrank import LowRank
from server.primitives.site import SiteValue

# What PEFT has not for such weights, and what would have no effect.
WITHOUT = {"use_dora": False, "lora_bias": False, "fan_in_fan_out": False, "bias": "none"}


def lower_parameters(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target
) -> tuple[dict[str, SiteValue], dict[str, Tensor]]:
    """W += s B A for every expert of every weight that is targeted, and the tensors that are left for Linears."""
    targets = config.get("target_parameters") or []
    for key, only in WITHOUT.items():
        if targets and config.get(key, only) != only:
            raise AdapterIncompatible(f"{key} {config[key]} cannot stand beside target_parameters")
    modules: dict[str, list[str]] = {}
    for asked in targets:
        if not any(_fits(name, asked) for name in target.parameters):
            raise AdapterIncompatible(f"target parameter {asked} is no weight of a router or of experts of this base")
    for name in target.parameters:
        if any(_fits(name, asked) for asked in targets):
            modules.setdefault(name.rpartition(".")[0], []).append(name)
    left = dict(tensors)
    sites = {}
    for module, names in modules.items():
        for depth, name in enumerate(reversed(names)):
            sites[name] = _lower(config, name, f"{ROOT}{module}{'.base_layer' * depth}", left, target)
    return sites, left


def _fits(name: str, asked: str) -> bool:
    return name == asked or name.endswith(f".{asked}")


def _lower(config: Mapping[str, Any], name: str, prefix: str, left: dict[str, Tensor], target: Target) -> SiteValue:
    shape = target.parameters[name]
    rank = pattern_rank(config, name)
    if rank > target.max_rank:
        raise AdapterIncompatible(f"rank {rank} of {name} is above max_rank {target.max_rank}")
    factor = scaling(config, name, rank)
    number = shape.experts
    A = _take(left, name, f"{prefix}.lora_A.weight", (rank * number, shape.in_features))
    B = _take(left, name, f"{prefix}.lora_B.weight", (shape.out_features, rank * number))
    if number == 1:
        return SiteValue(lowrank=LowRank(target.place(A), target.place(B * factor)))
    A_ErI = A.view(number, rank, shape.in_features)
    B_EOr = B.view(shape.out_features, rank, number).permute(2, 0, 1)
    return SiteValue(experts=ExpertsLowRank(target.place(A_ErI), target.place(B_EOr * factor)))


def _take(left: dict[str, Tensor], name: str, stored: str, shape: tuple[int, ...]) -> Tensor:
    """In fp32. Raises: AdapterIncompatible when it is missing or of another shape."""
    tensor = left.pop(stored, None)
    if tensor is None:
        raise AdapterIncompatible(f"{name} lacks {stored}")
    expect(name, stored, tensor, shape)
    return tensor.float()
