"""BOFT: a Linear's input is rotated by a product of butterfly factors, and each output has a learned length.

Every factor is block-diagonal in an order of its own, and that of factor i stays inside runs of S * 2 ** i features, so
a product of m factors is block-diagonal with blocks of S * 2 ** (m - 1). The base's bias keeps its length.

m factors, B blocks of a factor, S their size, P the size and C the count of the product's blocks, O out, I in.
Source: Liu et al. 2023 (arXiv:2311.06243); peft 0.21.2, tuners/boft/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering.linears import Change, Found, lower_linears
from server.adapters.lowering.oft import cayley
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.primitives.rotate import Rotate


def lower_boft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """x += (R - I) x, y *= s, in fp64 until they are placed."""
    factors = int(config.get("boft_n_butterfly_factor", 1))

    def change(found: Found) -> Change:
        size = int(config["boft_block_size"]) or found.inputs // int(config["boft_block_num"])
        if size == 0 or found.inputs % (size << (factors - 1)) or (factors > 1 and size % 2):
            raise AdapterIncompatible(
                f"boft_block_size {size} and boft_n_butterfly_factor {factors} do not fit the {found.inputs} inputs of "
                f"{found.module}"
            )
        blocks = found.inputs // size
        learned_mBSS = found.take("boft_R", factors, blocks, size, size).double()
        Q_mBSS = (learned_mBSS - learned_mBSS.transpose(2, 3)) / 2
        product_CPP = _product(cayley(Q_mBSS.flatten(0, 1)).view_as(Q_mBSS))
        # PEFT's x is a row: x' = x R.
        excess_CPP = (product_CPP - torch.eye(product_CPP.shape[-1], dtype=product_CPP.dtype)).transpose(1, 2)
        lengths_O = found.take("boft_s", found.outputs, 1).flatten()
        return Change(rotate_in=Rotate(excess_CPP.float()), excess_out_O=lengths_O - 1)

    return lower_linears(config, tensors, target, change=change)


def _product(R_mBSS: Tensor) -> Tensor:
    """The later factors from the left, each in its own order."""
    factors, blocks, size, _ = R_mBSS.shape
    together = 1 << (factors - 1)
    whole = size * together
    product_CPP = torch.eye(whole, dtype=R_mBSS.dtype).expand(blocks // together, -1, -1)
    for factor in range(factors):
        parts = R_mBSS[factor].view(-1, together, size, size)
        factor_CPP = torch.stack([torch.block_diag(*part) for part in parts])
        order = _order(size, factor).repeat(whole // (size << factor))
        starts = torch.arange(0, whole, size << factor).repeat_interleave(size << factor)
        order = order + starts
        product_CPP = factor_CPP[:, order][:, :, order] @ product_CPP
    return product_CPP


def _order(size: int, factor: int) -> Tensor:
    """Of a run of S * 2 ** factor features, in halves of a block: the even halves first, then the odd ones."""
    if factor == 0:
        return torch.arange(size)
    halves = torch.arange(2 << factor)
    half = size // 2
    return (torch.cat([halves[::2], halves[1::2]])[:, None] * half + torch.arange(half)).flatten()
