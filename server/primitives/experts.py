"""Low-rank delta of experts: y += sum_k g_k B_ke A_ke x, for each pair of a token and an expert e that it was sent to.

E experts, K adapters active in the step, R rank of one adapter, P the sum of the active ranks, N rows, I in, O out.
A row is one pair; the rows of one expert stand together, and each carries the gates of its token. The weights of all
experts of a layer are one fused parameter, so an adapter has an A and a B for every expert of it.
Laws: those of `lowrank`, row by row: a row whose gates are zero is bit-identical to one without adapters; an overflow
stays with the rows that carry it; a fusion is exactly the weighted sum of the deltas.
Source: peft 0.21.2, tuners/lora/layer.py `ParamWrapper`; Shazeer et al. 2017 (arXiv:1701.06538).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from server.primitives import lowrank
from server.primitives.gates import Gates


@dataclass(frozen=True, slots=True)
class ParameterShape:
    """What an adapter must fit: the weight of a router, which is one product, or that of all experts of a layer."""

    experts: int  # 1 for a router
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class ExpertsLowRank:
    """One adapter at one fused parameter. The method's scaling is already inside B."""

    A_ERI: Tensor
    B_EOR: Tensor

    @property
    def bytes(self) -> int:
        return self.A_ERI.nbytes + self.B_EOR.nbytes


@dataclass(frozen=True, slots=True)
class ExpertsOperand:
    A_EIP: Tensor
    B_EPO: Tensor
    layout: tuple[int, ...]  # the owning column of every row of the middle
    columns_P: Tensor

    def of(self, expert: int) -> lowrank.LowRankOperand:
        return lowrank.LowRankOperand(self.A_EIP[expert], self.B_EPO[expert], self.layout, self.columns_P)


class Group(NamedTuple):
    """The rows from `first` up to `end` belong to one expert."""

    expert: int
    first: int
    end: int


def pack(values: Sequence[tuple[int, ExpertsLowRank]]) -> ExpertsOperand:
    """Lay the given (column, value) pairs side by side."""
    layout = tuple(column for column, value in values for _ in range(value.A_ERI.shape[1]))
    A_EPI = torch.cat([value.A_ERI for _, value in values], dim=1)
    B_EOP = torch.cat([value.B_EOR for _, value in values], dim=2)
    columns = torch.tensor(layout, device=A_EPI.device)
    return ExpertsOperand(A_EPI.transpose(1, 2), B_EOP.transpose(1, 2).contiguous(), layout, columns)


def apply(y_NO: Tensor, x_NI: Tensor, gates: Gates, operand: ExpertsOperand, groups: Sequence[Group]) -> Tensor:
    """y + sum_k g_k B_ke A_ke x, expert by expert; the gates are those of the rows."""
    parts = []
    for expert, first, end in groups:
        own = Gates(gates.gates_TK[first:end])
        parts.append(lowrank.apply(y_NO[first:end], x_NI[first:end], own, operand.of(expert)))
    return torch.cat(parts)


def apply_loop(
    y_NO: Tensor, x_NI: Tensor, gates_NK: Tensor, values: Sequence[tuple[int, ExpertsLowRank]], experts_N: Sequence[int]
) -> Tensor:
    """The same, row by row and adapter by adapter: what tests compare `apply` with."""
    y_NO = y_NO.clone()
    for row, expert in enumerate(experts_N):
        for column, value in values:
            gate = gates_NK[row, column]
            if gate != 0:
                y_NO[row] += gate * (value.B_EOR[expert] @ (value.A_ERI[expert] @ x_NI[row]))
    return y_NO
