"""LoRA with its options: rsLoRA, DoRA, activated LoRA, ranks and alphas by pattern, biases.

DoRA is m / ||W + s B A|| * (W + s B A), the norm over each row. The row's factor scales the base product and B; the
base's bias stays as it is. The norm is that of the weight that this server really multiplies with.

r rank, I in, O out.
Source: Hu et al. 2021 (arXiv:2106.09685); Kalajdzievski 2023 (arXiv:2312.03732); Liu et al. 2024 (arXiv:2402.09353);
Greenewald et al. 2025 (arXiv:2504.12397); peft 0.21.2, tuners/lora/layer.py and dora.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering import embedding
from server.adapters.lowering.linears import Change, Found, lower_linears, pattern_value
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.policy.reach import EVERYWHERE, FromLast


def lower_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += s B A x, and the same times m / ||W + s B A|| on all of W with `use_dora`."""
    own, rest = embedding.split(tensors, target.embedding)

    def change(found: Found) -> Change:
        rank = found.check_rank(int(pattern_value(config.get("rank_pattern"), found.module, config["r"])))
        scaling = _scaling(config, found.module, rank)
        A_rI = found.take("lora_A.weight", rank, found.inputs)
        B_Or = found.take("lora_B.weight", found.outputs, rank) * scaling
        bias_O = found.take("lora_B.bias", found.outputs) * scaling if config.get("lora_bias") else None
        if not config.get("use_dora"):
            return Change(A_rI, B_Or, bias_O=bias_O)
        return _dora(A_rI, B_Or, magnitude_O=found.take("lora_magnitude_vector", found.outputs), weight=found.weight())

    lowered = lower_linears(config, rest, target, change=change)
    invocation = config.get("alora_invocation_tokens")
    if invocation:
        lowered = replace(lowered, reach=FromLast(tuple(invocation)))
    return lowered if not own else _with_embedding(config, own, target, lowered=lowered)


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = float(pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _with_embedding(
    config: Mapping[str, Any], tensors: dict[str, Tensor], target: Target, *, lowered: Lowered
) -> Lowered:
    assert target.embedding is not None
    name = target.embedding.name
    rank = int(pattern_value(config.get("rank_pattern"), name, config["r"]))
    if lowered.reach != EVERYWHERE:
        raise AdapterIncompatible(f"{name} is adapted, and PEFT has no activated LoRA on an embedding")
    if rank > target.max_rank:
        raise AdapterIncompatible(f"rank {rank} of {name} is above max_rank {target.max_rank}")
    lower_rows = embedding.lower_dora_rows if config.get("use_dora") else embedding.lower_rows
    value = lower_rows(tensors, target, rank=rank, scaling=_scaling(config, name, rank))
    return replace(lowered, sites={**lowered.sites, name: value})


def _dora(A_rI: Tensor, B_Or: Tensor, *, magnitude_O: Tensor, weight: Tensor) -> Change:
    A_rI, B_Or, magnitude_O = (tensor.to(weight.device) for tensor in (A_rI, B_Or, magnitude_O))
    factor_O = magnitude_O / torch.linalg.vector_norm(weight + B_Or @ A_rI, dim=1)
    return Change(A_rI, factor_O[:, None] * B_Or, excess_out_O=factor_O - 1)
