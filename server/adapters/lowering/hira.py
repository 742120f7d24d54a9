"""HiRA: the base's weight times, element by element, a low-rank matrix; served as the closest change of low rank.

The weight is the one that this server really multiplies with.

r rank of the factor, O out, I in.
Source: Huang et al. 2025 (HiRA: parameter-efficient Hadamard high-rank adaptation, ICLR); peft 0.21.2,
tuners/hira/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from server.adapters.lowering.approximate import closest
from server.adapters.lowering.linears import Change, Found, lower_linears
from server.adapters.lowering.target import Lowered, Target


def lower_hira(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += (W * (B A)) x; PEFT does not act on rank_pattern."""
    rank = int(config["r"])

    def change(found: Found) -> Change:
        A_rI, B_Or = found.take("hira_A", rank, found.inputs), found.take("hira_B", found.outputs, rank)
        weight = found.weight()
        delta_OI = weight * (B_Or.to(weight.device) @ A_rI.to(weight.device))
        A_RI, B_OR, error = closest(delta_OI, found.module, target)
        return Change(A_RI, B_OR, error=error)

    return lower_linears(config, tensors, target, change=change)
