"""The weight of a base Linear as a matrix (O, I) in fp32, whatever it is stored as. Reads only: requests go on.

bitsandbytes keeps NF4 weights as indices into a table of 16 values with a scale per block; on CPUs with AVX512-BF16 it
packs both anew in the first product (the scales in bfloat16), after which its own dequantisation gives garbage.
int8 weights have a scale per row. What is read here is what the product multiplies with, after either.

O out, I in.
Source: bitsandbytes 0.50.2, functional.py `_convert_weight_packed_for_cpu`, `int8_vectorwise_dequant`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PACKED_ROWS = 32
INT8_MAX = 127


class Stock:
    """The product of a module as it is: transposed (Conv1D), or quantized by a library of its own; its bias is gone."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.bytes = sum(part.nbytes for part in module.state_dict().values() if isinstance(part, Tensor))

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self._module, Conv1D):
            return x @ self._module.weight
        y: Tensor = self._module(x)
        return y

    def weight(self) -> Tensor:
        return base_weight(self._module)


def base_weight(base: nn.Module) -> Tensor:
    """Not to be written to: an fp32 weight is given as it is."""
    weight: Any = base.weight
    if isinstance(base, Conv1D):
        return weight.detach().t().float()
    if type(base) is nn.Linear:
        return weight.detach().float()
    state = getattr(weight, "quant_state", None)
    if state is None:
        return _int8(base)
    return _packed_nf4(weight.detach(), state) if getattr(state, "packing_format_for_cpu", False) else _nf4(weight)


def _nf4(weight: Any) -> Tensor:
    """Asked for with a block a row: on CPUs with AVX-512 rows that are no whole blocks would come back wrong."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(weight.quant_state)
    if state.shape.numel() % state.blocksize == 0:
        state.shape = torch.Size((state.shape.numel() // state.blocksize, state.blocksize))
    return dequantize_4bit(weight.detach(), state).float().view(weight.quant_state.shape)


def _packed_nf4(packed: Tensor, state: Any) -> Tensor:
    """Each 32 bytes hold one pair of columns of 32 rows: the first half of the 64 indices in their low bits."""
    rows, columns = state.shape
    halves = packed.reshape(-1, PACKED_ROWS)
    indices = torch.cat([halves & 0xF, halves >> 4], dim=1)
    indices = indices.view(rows // PACKED_ROWS, columns // 2, PACKED_ROWS, 2).transpose(1, 2).reshape(rows, columns)
    scales = state.absmax.t().float().repeat_interleave(state.blocksize, dim=1)
    return state.code.float()[indices.long()] * scales


def _int8(base: Any) -> Tensor:
    scales = base.weight.SCB if base.state.SCB is None else base.state.SCB
    return base.weight.detach().float() * (scales.float() / INT8_MAX)[:, None]
