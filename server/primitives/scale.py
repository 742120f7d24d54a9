"""Scale: x *= 1 + sum_k g_k (s_in - 1) before the base product, y *= 1 + sum_k g_k (s_out - 1) after it.

T tokens, K active adapters, N of them with a scale here, F features (of the input or of the output).
Laws: a token whose gates are zero is bit-identical to one without adapters; several adapters' scales add around one,
they do not multiply, so that a fusion is the weighted sum of the deltas.
Source: Liu et al. 2022 (arXiv:2205.05638).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


def pack(values: Sequence[tuple[int, Scale]]) -> ScaleOperand:
    layout = tuple(column for column, _ in values)
    excess_NF = torch.stack([value.excess_F for _, value in values])
    return ScaleOperand(excess_NF, layout, torch.tensor(layout, device=excess_NF.device))


def apply(x_TF: Tensor, gates: Gates, operand: ScaleOperand) -> Tensor:
    """x * (1 + sum_k g_k (s_k - 1))."""
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
