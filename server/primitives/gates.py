"""Which adapters each token of a step carries, and with what weight: one matrix for the whole forward pass.

T tokens in the step, K adapters active in it. A row of zeros is a token of the bare base.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.kernels.gathered import Runs


class Gates:
    """The matrix G (T, K), and what follows from it, computed once per step: its columns spread over an operand's
    rows, and the tokens that carry an adapter.

    `host_TK` is G in the host's memory, so that nobody has to wait for the device to learn which gates are zero.
    `runs` is G once more, without its zeros, for the kernels that read it so.
    """

    def __init__(self, gates_TK: Tensor, host_TK: Tensor | None = None, runs: Runs | None = None) -> None:
        self.gates_TK = gates_TK
        self.host_TK = gates_TK.cpu() if host_TK is None else host_TK
        self._runs = runs
        self._spread: dict[tuple[int, ...], Tensor] = {}
        self._carriers: dict[int, Tensor] = {}
        self._carrying: dict[tuple[int, ...], tuple[Tensor, Gates]] = {}

    @property
    def runs(self) -> Runs:
        if self._runs is None:
            rows = self.host_TK.float().tolist()
            self._runs = Runs([(1, [(k, gate) for k, gate in enumerate(row) if gate]) for row in rows])
        return self._runs

    def spread(self, layout: tuple[int, ...], columns: Tensor) -> Tensor:
        """(T, len(columns)): column j is the gate of the adapter that owns row j of an operand.

        `layout` names `columns`: operands of the same layout share the result.
        """
        found = self._spread.get(layout)
        if found is None:
            found = self._spread[layout] = self.gates_TK.index_select(1, columns)
        return found

    def at(self, rows_R: Tensor, host_rows: Sequence[int]) -> Gates:
        """The gates of some tokens of the step, given on the device and to the host."""
        runs = None if self._runs is None else self._runs.at(host_rows)
        host_RK = self.host_TK[torch.tensor(host_rows, dtype=torch.long)]
        return Gates(self.gates_TK.index_select(0, rows_R), host_RK, runs)

    def carriers(self, column: int) -> Tensor:
        """(n,): the tokens whose gate for the adapter of `column` is not zero, in order."""
        found = self._carriers.get(column)
        if found is None:
            tokens = self.host_TK[:, column].nonzero().flatten()
            found = self._carriers[column] = tokens.to(self.gates_TK.device)
        return found

    def carrying(self, layout: tuple[int, ...]) -> tuple[Tensor, Gates]:
        """The tokens (n,) that carry any of the adapters in these columns, and their gates."""
        found = self._carrying.get(layout)
        if found is None:
            tokens = self.host_TK[:, list(dict.fromkeys(layout))].any(dim=1).nonzero().flatten()
            found = self._carrying[layout] = tokens, self.at(tokens.to(self.gates_TK.device), tokens.tolist())
        return found


def gates_from_rows(rows: Sequence[tuple[int, Sequence[tuple[int, float]]]], columns: int, like: Tensor) -> Gates:
    """Gates from (token count, [(column, weight), ...]) per chunk, in the order of the packed tokens."""
    table = torch.zeros(len(rows), columns, dtype=torch.float32)
    counts = torch.tensor([count for count, _ in rows])
    for row, (_, terms) in enumerate(rows):
        for column, weight in terms:
            table[row, column] += weight
    host_TK = table.repeat_interleave(counts, 0).to(dtype=like.dtype)
    return Gates(host_TK.to(device=like.device), host_TK, Runs(rows))
