"""C3A: every block of the change is circulant, by a learned kernel; served as the closest change of low rank.

S block size, M blocks of the output, N blocks of the input, O out, I in.
Source: Chen et al. 2024 (arXiv:2407.19342); peft 0.21.2, tuners/c3a/layer.py and utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering.approximate import closest
from server.adapters.lowering.linears import Change, Found, dotted_pattern_value, lower_linears
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible


def lower_c3a(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += D x, in each block D[o, i] = kernel[(i - o) mod S] / I: what PEFT's Fourier transforms come to."""

    def change(found: Found) -> Change:
        size = int(dotted_pattern_value(config.get("block_size_pattern"), found.module, config["block_size"]))
        if found.inputs % size or found.outputs % size:
            raise AdapterIncompatible(
                f"block_size {size} does not divide the {found.inputs} inputs and {found.outputs} outputs of "
                f"{found.module}"
            )
        kernel_MNS = found.take("c3a_kernel", found.outputs // size, found.inputs // size, size)
        places = torch.arange(size)
        blocks_MNSS = kernel_MNS[:, :, (places[None, :] - places[:, None]) % size]
        delta_OI = blocks_MNSS.permute(0, 2, 1, 3).reshape(found.outputs, found.inputs) / found.inputs
        A_RI, B_OR, error = closest(delta_OI, found.module, target)
        return Change(A_RI, B_OR, error=error)

    return lower_linears(config, tensors, target, change=change)
