"""Delta: y += sum_k g_k D_k x, with D_k a whole matrix, dense or sparse: for changes that have no small rank.

T tokens in the step, n of them that carry one adapter, K active adapters, O out, I in, N entries of a sparse D or rows
of it that are not zero, V vocabulary, E embedding size.
At an embedding a token's input is its id, and D, of the shape of the embedding's weight (V, E), is looked up in.
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
    """One adapter at one Linear or embedding: strided in the base's dtype, or compressed sparse rows in fp32.

    With `rows_N`, which rise, the matrix is (N, I): those rows of D, and all others are zero. See `sparse`.
    """

    matrix_OI: Tensor
    rows_N: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory that it really takes, indices included."""
        D_OI = self.matrix_OI
        if D_OI.layout != torch.sparse_csr:
            return D_OI.nbytes + (0 if self.rows_N is None else self.rows_N.nbytes)
        return sum(part.nbytes for part in (D_OI.values(), D_OI.crow_indices(), D_OI.col_indices()))

    def whole(self, outputs: int) -> Tensor:
        """D itself, dense, of at least so many rows: for the plain loops."""
        D_OI = self.matrix_OI.to_dense()
        if self.rows_N is None:
            return D_OI
        outputs = max(outputs, int(self.rows_N[-1]) + 1)
        return D_OI.new_zeros(outputs, D_OI.shape[1]).index_copy_(0, self.rows_N, D_OI)


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
    carried = _carried(gates, operand)
    if not carried:
        return y_TO
    y_TO = y_TO.clone()
    for column, value, tokens_n in carried:
        product_nN = _product(value.matrix_OI, x_TI.index_select(0, tokens_n)).to(y_TO.dtype)
        gated_nN = product_nN * gates.gates_TK.index_select(0, tokens_n)[:, column, None]
        if value.rows_N is None:
            y_TO.index_add_(0, tokens_n, gated_nN)
        else:
            y_TO.index_put_((tokens_n[:, None], value.rows_N), gated_nN, accumulate=True)
    return y_TO


def look_up(y_TE: Tensor, ids_T: Tensor, gates: Gates, operand: DeltaOperand) -> Tensor:
    """y + sum_k g_k D_k[id], at an embedding."""
    carried = _carried(gates, operand)
    if not carried:
        return y_TE
    y_TE = y_TE.clone()
    for column, value, tokens_n in carried:
        found_nE = _rows_of(value, ids_T.index_select(0, tokens_n))
        y_TE.index_add_(0, tokens_n, found_nE * gates.gates_TK.index_select(0, tokens_n)[:, column, None])
    return y_TE


def apply_loop(y_TO: Tensor, x_TI: Tensor, gates_TK: Tensor, values: Sequence[tuple[int, Delta]]) -> Tensor:
    """The same, token by token and adapter by adapter, every D dense: what tests compare `apply` with."""
    y_TO = y_TO.clone()
    for token in range(x_TI.shape[0]):
        for column, value in values:
            gate = gates_TK[token, column]
            if gate != 0:
                y_TO[token] += gate * (value.whole(y_TO.shape[1]).to(x_TI.dtype) @ x_TI[token])
    return y_TO


def look_up_loop(y_TE: Tensor, ids_T: Tensor, gates_TK: Tensor, values: Sequence[tuple[int, Delta]]) -> Tensor:
    """The same for `look_up`."""
    y_TE = y_TE.clone()
    for token, id_ in enumerate(ids_T.tolist()):
        for column, value in values:
            y_TE[token] += gates_TK[token, column] * value.whole(id_ + 1)[id_]
    return y_TE


def _carried(gates: Gates, operand: DeltaOperand) -> list[tuple[int, Delta, Tensor]]:
    """The deltas that some token carries, with those tokens."""
    found = [(column, value, gates.carriers(column)) for column, value in operand.values]
    return [(column, value, tokens_n) for column, value, tokens_n in found if len(tokens_n)]


def _product(D_OI: Tensor, x_nI: Tensor) -> Tensor:
    if D_OI.layout == torch.sparse_csr:
        return (D_OI @ x_nI.to(D_OI.dtype).t()).t()
    return x_nI @ D_OI.t()


def _rows_of(value: Delta, ids_n: Tensor) -> Tensor:
    if value.rows_N is None:
        return value.matrix_OI.index_select(0, ids_n)
    places_n = torch.searchsorted(value.rows_N, ids_n).clamp(max=len(value.rows_N) - 1)
    strange_n = value.rows_N.index_select(0, places_n) != ids_n
    return value.matrix_OI.index_select(0, places_n).masked_fill(strange_n[:, None], 0)
