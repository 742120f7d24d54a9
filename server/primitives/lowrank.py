"""Low-rank delta: y += sum_k g_k s_k B_k A_k x, for each of a token's adapters.

T tokens in the step, K adapters active in it, R rank of one adapter, P the sum of the active ranks, I in, O out.
The active A's and B's lie side by side, so that any number of adapters of any ranks are two products; a token's gates
mask the rows of the middle that are not its own. An adapter's own A and B may be in fewer bits than the activations
are: what is packed is in the activations' dtype.
Laws: a token whose gates are zero is bit-identical to one without adapters; an overflow in one adapter's product stays
with the tokens that carry it; a fusion is exactly the weighted sum of the deltas.
Source: Hu et al. 2021 (arXiv:2106.09685); batched form: Chen et al. 2023 (arXiv:2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.primitives.gates import Gates


@dataclass(frozen=True, slots=True)
class LowRank:
    """One adapter at one Linear. `scaling` is the method's (alpha / r or alpha / sqrt r), unless it is inside B."""

    A_RI: Tensor
    B_OR: Tensor
    scaling: float = 1.0

    @property
    def bytes(self) -> int:
        return self.A_RI.nbytes + self.B_OR.nbytes

    def scaled(self, dtype: torch.dtype) -> Tensor:
        """s B (O, R), rounded once."""
        if self.scaling == 1:
            return self.B_OR.to(dtype)
        return (self.B_OR.to(torch.promote_types(self.B_OR.dtype, torch.float32)) * self.scaling).to(dtype)


@dataclass(frozen=True, slots=True)
class LowRankOperand:
    A_IP: Tensor
    B_PO: Tensor
    layout: tuple[int, ...]  # the owning column of every row of the middle
    columns_P: Tensor


def pack(values: Sequence[tuple[int, LowRank]], dtype: torch.dtype | None = None) -> LowRankOperand:
    """Lay the given (column, value) pairs side by side, in the activations' dtype; None: the values have it."""
    dtype = dtype or values[0][1].A_RI.dtype
    layout = tuple(column for column, value in values for _ in range(value.A_RI.shape[0]))
    A_PI = torch.cat([value.A_RI.to(dtype) for _, value in values])
    B_OP = torch.cat([value.scaled(dtype) for _, value in values], dim=1)
    return LowRankOperand(A_PI.t(), B_OP.t().contiguous(), layout, torch.tensor(layout, device=A_PI.device))


def apply(y_TO: Tensor, x_TI: Tensor, gates: Gates, operand: LowRankOperand) -> Tensor:
    """y + sum_k g_k s_k B_k A_k x."""
    return _spread_out(y_TO, x_TI @ operand.A_IP, gates, operand)


def look_up(y_TE: Tensor, ids_T: Tensor, gates: Gates, operand: LowRankOperand) -> Tensor:
    """y + sum_k g_k s_k B_k A_k[:, id], at an embedding: the input is one-hot."""
    return _spread_out(y_TE, operand.A_IP.index_select(0, ids_T), gates, operand)


def _spread_out(y_TO: Tensor, middle_TP: Tensor, gates: Gates, operand: LowRankOperand) -> Tensor:
    gates_TP = gates.spread(operand.layout, operand.columns_P)
    # Not a bare product: 0 * inf would hand one adapter's overflow to every token of the batch.
    middle_TP = (middle_TP * gates_TP).masked_fill_(gates_TP == 0, 0)
    return torch.addmm(y_TO, middle_TP, operand.B_PO)


def apply_loop(y_TO: Tensor, x_TI: Tensor, gates_TK: Tensor, values: Sequence[tuple[int, LowRank]]) -> Tensor:
    """The same, token by token and adapter by adapter: what tests compare `apply` with."""
    y_TO = y_TO.clone()
    for token in range(x_TI.shape[0]):
        for column, value in values:
            gate = gates_TK[token, column]
            if gate != 0:
                middle_R = value.A_RI.to(x_TI.dtype) @ x_TI[token]
                y_TO[token] += gate * value.scaling * (value.B_OR.to(x_TI.dtype) @ middle_R)
    return y_TO
