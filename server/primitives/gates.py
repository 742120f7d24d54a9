"""Which adapters each token of a step carries, and with what weight: one matrix for the whole forward pass.

T tokens in the step, K adapters active in it. A row of zeros is a token of the bare base.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Gates:
    """The matrix G (T, K), and its columns spread over an operand's rows, computed once per layout and step."""

    def __init__(self, gates_TK: Tensor) -> None:
        self.gates_TK = gates_TK
        self._spread: dict[tuple[int, ...], Tensor] = {}

    def spread(self, layout: tuple[int, ...], columns: Tensor) -> Tensor:
        """(T, len(columns)): column j is the gate of the adapter that owns row j of an operand.

        `layout` names `columns`: operands of the same layout share the result.
        """
        found = self._spread.get(layout)
        if found is None:
            found = self._spread[layout] = self.gates_TK.index_select(1, columns)
        return found


def gates_from_rows(rows: Sequence[tuple[int, Sequence[tuple[int, float]]]], columns: int, like: Tensor) -> Gates:
    """Gates from (token count, [(column, weight), ...]) per chunk, in the order of the packed tokens."""
    table = torch.zeros(len(rows), columns, dtype=torch.float32)
    counts = torch.tensor([count for count, _ in rows])
    for row, (_, terms) in enumerate(rows):
        for column, weight in terms:
            table[row, column] += weight
    return Gates(table.repeat_interleave(counts, 0).to(device=like.device, dtype=like.dtype))
