"""Rotation: x += sum_k g_k (R_k - I) x, with R_k block-diagonal: on a Linear's input or on its output.

R need not be orthogonal: any block-diagonal matrix will do, and a scale is the case of blocks of one (`scale`).
A block takes its features `stride` apart: of G * S * D features, member s of block (g, d) is feature
(g * S + s) * D + d. With stride 1 blocks are runs of neighbours; pairs half a group apart need no more than 2 x 2 each.

T tokens, K active adapters, N of them with blocks of one size and stride, F features, S block size, D stride,
B = F / S blocks, ordered by (g, d).
A token's features stand side by side once per adapter, weighted by its gate and zeroed where it is zero, so that any
number of adapters with blocks of one size are one batched product.
Laws: a token whose gates are zero is bit-identical to one without adapters; several adapters' rotations add around one,
each of the unrotated x; an overflow stays with the tokens that carry it.
Source: Qiu et al. 2023 (arXiv:2306.07280); Liao and Monz 2024 (arXiv:2409.00119).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.primitives.gates import Gates


@dataclass(frozen=True, slots=True)
class Rotate:
    """One adapter at one side of one Linear: R - I by blocks, of which row o is what feature o of a block gains."""

    excess_BSS: Tensor
    stride: int = 1

    @property
    def bytes(self) -> int:
        return self.excess_BSS.nbytes


@dataclass(frozen=True, slots=True)
class BlocksOperand:
    """The adapters whose blocks have one size and one stride; the blocks are stacked along their inputs, transposed."""

    stacked_BPS: Tensor  # P = N * S
    size: int
    stride: int
    layout: tuple[int, ...]
    columns_N: Tensor


@dataclass(frozen=True, slots=True)
class RotateOperand:
    groups: tuple[BlocksOperand, ...]


def pack(values: Sequence[tuple[int, Rotate]]) -> RotateOperand:
    """Lay the given (column, value) pairs side by side, those of one block size and stride together."""
    groups: dict[tuple[int, int], list[tuple[int, Rotate]]] = {}
    for column, value in values:
        groups.setdefault((value.excess_BSS.shape[-1], value.stride), []).append((column, value))
    return RotateOperand(tuple(_pack_group(*key, members) for key, members in groups.items()))


def apply(y_TF: Tensor, x_TF: Tensor, gates: Gates, operand: RotateOperand) -> Tensor:
    """y + sum_k g_k (R_k - I) x."""
    for group in operand.groups:
        x_TBS = _by_blocks(x_TF, group.size, group.stride)
        gates_TN = gates.spread(group.layout, group.columns_N)
        # Not a bare product: 0 * inf would be no number.
        weighed_TBNS = x_TBS[:, :, None, :] * gates_TN[:, None, :, None]
        weighed_TBNS = weighed_TBNS.masked_fill_((gates_TN == 0)[:, None, :, None], 0)
        gained_BTS = torch.bmm(weighed_TBNS.flatten(2).transpose(0, 1), group.stacked_BPS)
        y_TF = y_TF + _in_order(gained_BTS.transpose(0, 1), group.stride)
    return y_TF


def apply_loop(y_TF: Tensor, x_TF: Tensor, gates_TK: Tensor, values: Sequence[tuple[int, Rotate]]) -> Tensor:
    """The same, token by token, adapter by adapter and block by block: what tests compare `apply` with."""
    y_TF = y_TF.clone()
    for token in range(x_TF.shape[0]):
        for column, value in values:
            gate = gates_TK[token, column]
            size = value.excess_BSS.shape[-1]
            for block, excess_SS in enumerate(value.excess_BSS):
                first = block // value.stride * size * value.stride + block % value.stride
                members = torch.arange(size) * value.stride + first
                if gate != 0:
                    y_TF[token, members] += gate * (excess_SS @ x_TF[token, members])
    return y_TF


def _pack_group(size: int, stride: int, members: Sequence[tuple[int, Rotate]]) -> BlocksOperand:
    layout = tuple(column for column, _ in members)
    stacked_BPS = torch.cat([value.excess_BSS.transpose(1, 2) for _, value in members], dim=1)
    return BlocksOperand(stacked_BPS, size, stride, layout, torch.tensor(layout, device=stacked_BPS.device))


def _by_blocks(x_TF: Tensor, size: int, stride: int) -> Tensor:
    tokens, features = x_TF.shape
    groups = features // (size * stride)
    return x_TF.reshape(tokens, groups, size, stride).transpose(2, 3).reshape(tokens, groups * stride, size)


def _in_order(x_TBS: Tensor, stride: int) -> Tensor:
    """What `_by_blocks` did, undone."""
    tokens, blocks, size = x_TBS.shape
    return x_TBS.reshape(tokens, blocks // stride, stride, size).transpose(2, 3).reshape(tokens, blocks * size)
