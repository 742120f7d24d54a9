"""MiSS: the input's features, r apart, are summed into r sums, and a learned block spreads those over the output.

In its mini form the block is narrower than the output, and is repeated along it.

r rank, I in, O out.
Source: Kang and Yin 2024 (arXiv:2409.15371); peft 0.21.2, tuners/miss/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering.linears import Change, Found, lower_linears
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible


def lower_miss(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += D' S x, where S adds feature i of x to sum i mod r and D is the block."""
    mini = config.get("init_weights") == "mini"

    def change(found: Found) -> Change:
        rank = found.check_rank(int(config["r"]))
        width = int(config.get("mini_r", 1)) if mini else found.outputs
        if rank > found.inputs or found.outputs % width:
            raise AdapterIncompatible(
                f"r {rank} and mini_r {width} do not fit the {found.inputs} inputs and {found.outputs} outputs of "
                f"{found.module}"
            )
        block_rO = found.take("miss_block", rank, width).repeat(1, found.outputs // width)
        features = torch.arange(found.inputs)
        A_rI = torch.zeros(rank, found.inputs)
        A_rI[features % rank, features] = 1
        return Change(A_rI, block_rO.t())

    return lower_linears(config, tensors, target, change=change)
