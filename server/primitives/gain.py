"""Gain: what adapters do to a norm's weight: y += (sum_k g_k dw_k) * n, with n the normalised x.

T tokens, K active adapters, N of them with a gain here, F features, the last axis of y and n. Their other axes are as
the network has them, a batch of one or the heads that share the norm; `axis` is that of the tokens.
dw_k is the adapter's weight minus the base's; n is what the base's norm gives at a weight of one.
Laws: a token whose gates are zero is bit-identical to one without adapters; a fusion is the norm with the weighted
sum of the differences.
Source: Zhao et al. 2023 (arXiv:2312.11420); peft 0.21.2, tuners/ln_tuning/layer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.primitives.gates import Gates


@dataclass(frozen=True, slots=True)
class Gain:
    weight_F: Tensor

    @property
    def bytes(self) -> int:
        return self.weight_F.nbytes


@dataclass(frozen=True, slots=True)
class GainOperand:
    weight_NF: Tensor
    layout: tuple[int, ...]
    columns_N: Tensor


def pack(values: Sequence[tuple[int, Gain]]) -> GainOperand:
    layout = tuple(column for column, _ in values)
    weight_NF = torch.stack([value.weight_F for _, value in values])
    return GainOperand(weight_NF, layout, torch.tensor(layout, device=weight_NF.device))


def apply(y: Tensor, n: Tensor, gates: Gates, operand: GainOperand, *, axis: int) -> Tensor:
    """y + (sum_k g_k dw_k) * n."""
    return y + along(gates.spread(operand.layout, operand.columns_N) @ operand.weight_NF, y, axis=axis) * n


def apply_loop(y: Tensor, n: Tensor, gates_TK: Tensor, values: Sequence[tuple[int, Gain]], *, axis: int) -> Tensor:
    """The same, token by token: what tests compare `apply` with."""
    y = y.clone()
    for token in range(y.shape[axis]):
        for column, value in values:
            y.select(axis, token).add_(gates_TK[token, column] * value.weight_F * n.select(axis, token))
    return y


def along(each_TF: Tensor, y: Tensor, *, axis: int) -> Tensor:
    """One value per token and feature, laid along the axes of y."""
    shape = [1] * y.dim()
    shape[axis], shape[-1] = each_TF.shape
    return each_TF.view(shape)
