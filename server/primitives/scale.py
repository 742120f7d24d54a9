"""Scale: x *= 1 + sum_k g_k (s_in - 1) before the base product, y *= 1 + sum_k g_k (s_out - 1) after it.

T tokens, K active adapters, N of them with a scale here, F features (of the input or of the output).
Laws: a token whose gates are zero is bit-identical to one without adapters; several adapters' scales add around one,
they do not multiply, so that a fusion is the weighted sum of the deltas.
Source: Liu et al. 2022 (arXiv:2205.05638).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels import native
from server.primitives.gates import Gates


@dataclass(frozen=True, slots=True)
class Scale:
    """One adapter at one side of one Linear: the learned vector minus one."""

    excess_F: Tensor

    @property
    def bytes(self) -> int:
        return self.excess_F.nbytes


@dataclass(frozen=True, slots=True)
class ScaleOperand:
    excess_NF: Tensor
    layout: tuple[int, ...]
    columns_N: Tensor
    rows_K: npt.NDArray[np.int64]  # of a column's excess; -1: it has none


def pack(values: Sequence[tuple[int, Scale]]) -> ScaleOperand:
    layout = tuple(column for column, _ in values)
    excess_NF = torch.stack([value.excess_F for _, value in values])
    assert len(set(layout)) == len(layout), "an adapter has one scale at one side of a Linear"
    rows_K = np.full(max(layout) + 1, -1, np.int64)
    rows_K[list(layout)] = np.arange(len(layout))
    return ScaleOperand(excess_NF, layout, torch.tensor(layout, device=excess_NF.device), rows_K)


def apply(x_TF: Tensor, gates: Gates, operand: ScaleOperand, *, here: bool = False) -> Tensor:
    """x * (1 + sum_k g_k (s_k - 1)). `here`: x may become the answer."""
    if native.serves(x_TF.device, x_TF.dtype) and operand.excess_NF.dtype == x_TF.dtype:
        made_TF = x_TF if here and x_TF.stride(1) == 1 else x_TF.clone(memory_format=torch.contiguous_format)
        native.stretch(made_TF, gates.runs.places, operand.excess_NF, operand.rows_K)
        return made_TF
    return x_TF * (1 + gates.spread(operand.layout, operand.columns_N) @ operand.excess_NF)


def apply_loop(x_TF: Tensor, gates_TK: Tensor, values: Sequence[tuple[int, Scale]]) -> Tensor:
    """The same, token by token: what tests compare `apply` with."""
    x_TF = x_TF.clone()
    for token in range(x_TF.shape[0]):
        factor_F = torch.ones_like(x_TF[token])
        for column, value in values:
            factor_F += gates_TK[token, column] * value.excess_F
        x_TF[token] *= factor_F
    return x_TF
