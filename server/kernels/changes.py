"""What adapters do at a Linear or a norm beside low-rank terms, where the numbers are, in one native pass.

At a Linear x becomes x * (1 + sum_k g_k s_k) + sum_k g_k (R_k - I) x + sum_k g_k b_k before the base product, and y
likewise behind it; at a norm y += sum_k g_k dw_k * n, with n the normalised x. Only tokens that carry an adapter are
touched; everything is fp32 inside and rounded once.

T tokens, K adapters active in the step, N of them with values at a place, F features, S size of a block, B = F / S.
Law: what the plain loops of `server.primitives.scale`, `rotate`, `bias` and `gain` give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels.gathered import Runs
from server.kernels.native import LIBRARY, TYPES

# As values_t, turn_t, change_t and site_t in native.c.
VALUES = np.dtype([("values", "u8"), ("row_of", "u8"), ("columns", "i8")])
TURN = np.dtype([("blocks", VALUES), *((name, "i8") for name in ("rows", "size", "stride"))])
CHANGE = np.dtype([("scale", VALUES), ("bias", VALUES), ("turns", "u8"), ("turn_count", "i8")])
SITE = np.dtype([("before", CHANGE), ("behind", CHANGE), ("gain", VALUES)])
BEHIND, GAIN = CHANGE.itemsize, 2 * CHANGE.itemsize  # where these stand in a site_t


@dataclass(frozen=True, slots=True)
class Values:
    """(N, F), or for a rotation (B, N * S, S), in the activations' dtype, and the columns that the N belong to."""

    values: Tensor
    layout: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """R - I by blocks, transposed and stacked along their inputs; a block takes its features `stride` apart."""

    blocks: Values
    size: int
    stride: int


@dataclass(frozen=True, slots=True)
class Change:
    """Nothing at all where it is empty."""

    scale: Values | None = None
    bias: Values | None = None
    turns: Sequence[Turn] = ()

    @property
    def values(self) -> list[Values]:
        return [one for one in (self.scale, self.bias, *(turn.blocks for turn in self.turns)) if one is not None]


@dataclass(slots=True)
class Changes:
    """All that is done at one Linear (`before` and `behind` its product), or at one norm (`gain`)."""

    before: Change
    behind: Change
    gain: Values | None
    _table: npt.NDArray[np.void] = field(init=False)
    _held: list[npt.NDArray[np.generic]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._table = np.zeros(1, SITE)
        for name, change in (("before", self.before), ("behind", self.behind)):
            turns = np.zeros(len(change.turns), TURN)
            for row, turn in zip(turns, change.turns, strict=True):
                row["blocks"] = self._places(turn.blocks)
                row["rows"], row["size"], row["stride"] = len(turn.blocks.layout), turn.size, turn.stride
            self._held.append(turns)
            places = self._places(change.scale), self._places(change.bias)
            self._table[name] = *places, turns.ctypes.data, len(turns)
        self._table["gain"] = self._places(self.gain)

    @property
    def values(self) -> list[Values]:
        return [*self.before.values, *self.behind.values, *([] if self.gain is None else [self.gain])]

    @property
    def address(self) -> int:
        """Where its site_t lies."""
        return self._table.ctypes.data

    def change_input(self, x_TF: Tensor, runs: Runs) -> None:
        """Where it is; rows may lie apart. Raises: MemoryError."""
        _change(x_TF, runs, self.address)

    def change_output(self, y_TF: Tensor, runs: Runs) -> None:
        """Where it is; rows may lie apart. Raises: MemoryError."""
        _change(y_TF, runs, self.address + BEHIND)

    def change_norm(
        self, x_TF: Tensor, y_TF: Tensor, runs: Runs, weight_F: Tensor, *, offset: float, eps: float
    ) -> None:
        """y, where it is: what an RMSNorm gives for x, which both lie side by side."""
        assert LIBRARY is not None and x_TF.is_contiguous() and y_TF.is_contiguous()
        LIBRARY.mg_gain(
            x_TF.data_ptr(),
            x_TF.shape[1],
            weight_F.data_ptr(),
            offset,
            eps,
            y_TF.data_ptr(),
            TYPES[x_TF.dtype],
            *runs.places,
            self.address + GAIN,
            torch.get_num_threads(),
        )

    def _places(self, values: Values | None) -> tuple[int, int, int]:
        if values is None:
            return 0, 0, 0
        assert values.values.is_contiguous() and len(set(values.layout)) == len(values.layout)
        row_of = np.full(max(values.layout) + 1, -1, np.int64)
        row_of[list(values.layout)] = np.arange(len(values.layout))
        self._held.append(row_of)
        return values.values.data_ptr(), row_of.ctypes.data, len(row_of)


def _change(x_TF: Tensor, runs: Runs, change: int) -> None:
    assert LIBRARY is not None and x_TF.stride(1) == 1 and x_TF.shape[0] == runs.tokens
    failed = LIBRARY.mg_change(
        x_TF.data_ptr(),
        x_TF.stride(0),
        x_TF.shape[1],
        TYPES[x_TF.dtype],
        *runs.places,
        change,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for what adapters change in {x_TF.shape[0]} tokens")
