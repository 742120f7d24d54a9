"""Bias: y += sum_k g_k b_k, after everything that scales y.

T tokens, K active adapters, N of them with a bias here, O out. b_k is what adapter k adds to the base's own bias, which
the base product leaves out and the Site adds at the end: an IA3 vector must scale the base bias, a DoRA one must not.
Law: a token whose gates are zero is bit-identical to one without adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.primitives.gates import Gates


@dataclass(frozen=True, slots=True)
class Bias:
    bias_O: Tensor

    @property
    def bytes(self) -> int:
        return self.bias_O.nbytes


@dataclass(frozen=True, slots=True)
class BiasOperand:
    bias_NO: Tensor
    layout: tuple[int, ...]
    columns_N: Tensor


def pack(values: Sequence[tuple[int, Bias]]) -> BiasOperand:
    layout = tuple(column for column, _ in values)
    bias_NO = torch.stack([value.bias_O for _, value in values])
    return BiasOperand(bias_NO, layout, torch.tensor(layout, device=bias_NO.device))


def apply(y_TO: Tensor, gates: Gates, operand: BiasOperand) -> Tensor:
    """y + sum_k g_k b_k."""
    return torch.addmm(y_TO, gates.spread(operand.layout, operand.columns_N), operand.bias_NO)


def apply_loop(y_TO: Tensor, gates_TK: Tensor, values: Sequence[tuple[int, Bias]]) -> Tensor:
    """The same, token by token: what tests compare `apply` with."""
    y_TO = y_TO.clone()
    for token in range(y_TO.shape[0]):
        for column, value in values:
            y_TO[token] += gates_TK[token, column] * value.bias_O
    return y_TO
