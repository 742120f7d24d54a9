"""Delta: y += sum_k g_k D_k x, with D_k a whole matrix, dense or sparse: for changes that have no small rank.

T tokens in the step, n of them that carry one adapter, K active adapters, O out, I in, N entries of a sparse D.
A D is as large as the base's weight, so it meets only the tokens that carry it. Which those are the host knows; nothing
waits for the device. A sparse D is in fp32 whatever the base is in: CPUs have no sparse product in half precision.
Laws: a token that does not carry an adapter is never touched by it, so it is bit-identical to one without, whatever
overflows; a fusion is exactly the weighted sum of the deltas; the price is the bytes that D really takes.
Source: Bhardwaj et al. 2024 (arXiv:2406.13175); Ansell et al. 2022 (arXiv:2110.07560); Guo et al. 2021
(arXiv:2012.07463).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.primitives.gates import Gates


@dataclass(frozen=True, slots=True)
class Delta:
    """One adapter at one Linear: strided in the base's dtype, or compressed sparse rows in fp32. See `sparse`."""

    matrix_OI: Tensor

    @property
    def bytes(self) -> int:
        """Memory that it really takes, a sparse one's indices included."""
        D_OI = self.matrix_OI
        if D_OI.layout != torch.sparse_csr:
            return D_OI.nbytes
        return sum(part.nbytes for part in (D_OI.values(), D_OI.crow_indices(), D_OI.col_indices()))


@dataclass(frozen=True, slots=True)
class DeltaOperand:
    """The matrices stay where they are: laying them side by side would copy as much as the base."""

    values: tuple[tuple[int, Delta], ...]


def sparse(rows_N: Tensor, columns_N: Tensor, values_N: Tensor, *, shape: tuple[int, int]) -> Delta:
    """D with values_N at (rows_N, columns_N) and zeros elsewhere; entries of one place add. On the device of values_N.

    Its indices take 32 bits, which the CPU's product wants too.
    """
    entries = torch.sparse_coo_tensor(torch.stack([rows_N, columns_N]), values_N.float(), shape, check_invariants=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")  # beta, says torch, since 2021
        D_OI = entries.coalesce().to_sparse_csr()
        offsets, places = D_OI.crow_indices().int(), D_OI.col_indices().int()
        return Delta(torch.sparse_csr_tensor(offsets, places, D_OI.values(), shape, check_invariants=True))


def pack(values: Sequence[tuple[int, Delta]]) -> DeltaOperand:
    return DeltaOperand(tuple(values))


def apply(y_TO: Tensor, x_TI: Tensor, gates: Gates, operand: DeltaOperand) -> Tensor:
    """y + sum_k g_k D_k x."""
    carried = [(column, value.matrix_OI, gates.carriers(column)) for column, value in operand.values]
    carried = [(column, D_OI, tokens_n) for column, D_OI, tokens_n in carried if len(tokens_n)]
    if not carried:
        return y_TO
    y_TO = y_TO.clone()
    for column, D_OI, tokens_n in carried:
        product_nO = _product(D_OI, x_TI.index_select(0, tokens_n))
        gate_n1 = gates.gates_TK.index_select(0, tokens_n)[:, column, None]
        y_TO.index_add_(0, tokens_n, product_nO.to(y_TO.dtype) * gate_n1)
    return y_TO


def apply_loop(y_TO: Tensor, x_TI: Tensor, gates_TK: Tensor, values: Sequence[tuple[int, Delta]]) -> Tensor:
    """The same, token by token and adapter by adapter, every D dense: what tests compare `apply` with."""
    y_TO = y_TO.clone()
    for token in range(x_TI.shape[0]):
        for column, value in values:
            gate = gates_TK[token, column]
            if gate != 0:
                y_TO[token] += gate * (value.matrix_OI.to_dense().to(x_TI.dtype) @ x_TI[token])
    return y_TO


def _product(D_OI: Tensor, x_nI: Tensor) -> Tensor:
    if D_OI.layout == torch.sparse_csr:
        return (D_OI @ x_nI.to(D_OI.dtype).t()).t()
    return x_nI @ D_OI.t()
