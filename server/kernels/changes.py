"""What adapters do beside low-rank terms, by the native functions, where the numbers are.

At a Linear x becomes x + sum_k g_k (s_k x + (R_k - I) x + b_k) before the base product, and y likewise behind it; at a
norm y += sum_k g_k dw_k * n, with n the normalised x. Only tokens that carry an adapter are touched; everything is fp32
inside and rounded once. Like low-rank terms (`server.kernels.gathered`), an adapter's tensors stay where they are: a
table says where they lie, and a step has the tables of its adapters.

K adapters active in the step, J numbers of the Linears and norms of the base, T tokens, F features, S size of a block,
B = F / S.
Law: what the plain loops of `server.primitives.scale`, `rotate`, `bias` and `gain` give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels.native import LIBRARY, TYPES

# As change_t and site_t in native.c.
CHANGE = np.dtype(
    [*((name, "u8") for name in ("scale", "bias", "blocks")), *((name, "i8") for name in ("size", "stride"))]
)
SITE = np.dtype([("before", CHANGE), ("behind", CHANGE), ("gain", "u8")])


@dataclass(frozen=True, slots=True)
class Change:
    """What one adapter does at one side of one Linear. R - I by blocks, each (inputs, outputs), `stride` apart."""

    scale_F: Tensor | None = None
    bias_F: Tensor | None = None
    blocks_BSS: Tensor | None = None
    stride: int = 1


NOTHING = Change()


@dataclass(frozen=True, slots=True)
class SiteChange:
    """What one adapter does at one Linear, or at one norm (`gain_F`). All in the activations' dtype."""

    before: Change = NOTHING
    behind: Change = NOTHING
    gain_F: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        sides = [(one.scale_F, one.bias_F, one.blocks_BSS) for one in (self.before, self.behind)]
        return [tensor for own in (*sides, (self.gain_F,)) for tensor in own if tensor is not None]


@dataclass(frozen=True, slots=True)
class ChangeTable:
    """Where all that one adapter changes lies, number by number: (J) of SITE. It keeps that alive."""

    sites: npt.NDArray[np.void]
    held: tuple[SiteChange, ...]
    before_J: npt.NDArray[np.bool_]  # whether it changes there what the Linear is given
    behind_J: npt.NDArray[np.bool_]
    gain_J: npt.NDArray[np.bool_]
    dtypes: frozenset[torch.dtype]


def tabulate_changes(changes: Mapping[int, SiteChange], count: int) -> ChangeTable:
    """By the number of the Linear or norm, of which there are so many."""
    sites = np.zeros(count, SITE)
    dtypes = frozenset(tensor.dtype for change in changes.values() for tensor in change.tensors)
    for number, change in changes.items():
        sites[number] = _places(change.before), _places(change.behind), _place(change.gain_F)
    return ChangeTable(
        sites, tuple(changes.values()), _acts(sites["before"]), _acts(sites["behind"]), sites["gain"] != 0, dtypes
    )


class Changes:
    """What the step's adapters change; one table for each column of the gates, None where it has none.

    `runs` of its methods are the places of a `server.kernels.gathered.Runs` over the T tokens.
    """

    def __init__(self, tables: Sequence[ChangeTable | None]) -> None:
        self._tables = tables
        self._held = np.array([0 if table is None else table.sites.ctypes.data for table in tables], np.uint64)
        self._dtypes = {dtype for table in tables if table is not None for dtype in table.dtypes}
        known = [(column, table) for column, table in enumerate(tables) if table is not None]
        self._columns = np.array([column for column, _ in known])
        self._before_KJ = np.array([table.before_J for _, table in known])
        self._behind_J = np.any([table.behind_J for _, table in known], axis=0)
        self._gain_J = np.any([table.gain_J for _, table in known], axis=0)

    def address(self, dtype: torch.dtype) -> int:
        """Where the addresses of the tables lie, column by column. All numbers have the activations' `dtype`."""
        assert self._dtypes <= {dtype}
        return self._held.ctypes.data

    def columns_before(self, number: int) -> tuple[int, ...]:
        """Those that change what this Linear is given."""
        return tuple(self._columns[self._before_KJ[:, number]].tolist())

    def change_input(self, number: int, x_TF: Tensor, runs: tuple[int, int, int]) -> None:
        """What the Linear is given, where it is; rows may lie apart. Raises: MemoryError."""
        self._change(number, x_TF, runs, behind=False)

    def change_output(self, number: int, y_TF: Tensor, runs: tuple[int, int, int]) -> None:
        """What the Linear has made, where it is; rows may lie apart. Raises: MemoryError."""
        if self._behind_J[number]:
            self._change(number, y_TF, runs, behind=True)

    def change_norm(
        self,
        number: int,
        x_TF: Tensor,
        y_TF: Tensor,
        runs: tuple[int, int, int],
        weight_F: Tensor,
        offset: float,
        eps: float,
    ) -> None:
        """y, where it is: what an RMSNorm gives for x, which both lie side by side. Raises: MemoryError."""
        assert LIBRARY is not None and x_TF.is_contiguous() and y_TF.is_contiguous()
        if not self._gain_J[number]:
            return
        failed = LIBRARY.mg_gain(
            x_TF.data_ptr(),
            x_TF.shape[1],
            weight_F.data_ptr(),
            offset,
            eps,
            y_TF.data_ptr(),
            TYPES[x_TF.dtype],
            *runs,
            self.address(x_TF.dtype),
            number,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for a norm of {x_TF.shape[1]} features")

    def _change(self, number: int, x_TF: Tensor, runs: tuple[int, int, int], *, behind: bool) -> None:
        assert LIBRARY is not None and x_TF.stride(1) == 1
        failed = LIBRARY.mg_change(
            x_TF.data_ptr(),
            x_TF.stride(0),
            x_TF.shape[1],
            TYPES[x_TF.dtype],
            *runs,
            self.address(x_TF.dtype),
            number,
            behind,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for what adapters change in {x_TF.shape[1]} features")


def _acts(changes: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    acts: npt.NDArray[np.bool_] = (changes["scale"] | changes["bias"] | changes["blocks"]) != 0
    return acts


def _places(change: Change) -> tuple[int, int, int, int, int]:
    size = 0 if change.blocks_BSS is None else change.blocks_BSS.shape[-1]
    return _place(change.scale_F), _place(change.bias_F), _place(change.blocks_BSS), size, change.stride


def _place(tensor: Tensor | None) -> int:
    assert tensor is None or tensor.is_contiguous()
    return 0 if tensor is None else tensor.data_ptr()
