"""A product in tiles and all that a step's adapters do at its Linears, in one native call.

What it gives is what the product, `server.kernels.changes` and `server.kernels.gathered` give one after the other, but
that the low-rank terms of many neighbouring tokens are added before the product is rounded.

T tokens, I in, O out, M Linears that read the same input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels import native
from server.kernels.gathered import Gathered, Runs
from server.kernels.native import LIBRARY
from server.kernels.products import Tiled
from server.kernels.quantized import SMALLEST, Int8Tiled

# As weight_t and adapters_t in native_adapted.h.
WEIGHT = np.dtype(
    [
        ("weight", "u8"),
        ("coded", "i8"),
        *((name, "u8") for name in ("scales", "sums")),
        *((name, "i8") for name in ("group", "first")),
    ]
)
ADAPTERS = np.dtype(
    [
        ("tokens", "i8"),
        ("runs", "u8"),
        ("run_count", "i8"),
        *((name, "u8") for name in ("pairs", "held")),
        *((name, "i8") for name in ("groups", "columns")),
        ("sites", "u8"),
    ]
)

Entry = tuple[int, ...]


def weight_entry(product: Tiled | Int8Tiled, group: int, number: int) -> Entry:
    """As WEIGHT. `number` is that of the first Linear."""
    if isinstance(product, Tiled):
        return product.packed.data_ptr(), native.is_coded(product.packed), 0, 0, group, number
    return product.packed.data_ptr(), 0, product.scales_O.data_ptr(), product.sums_O.data_ptr(), group, number


def adapters_entry(tokens: int, gathered: Gathered | None, runs: Runs | None) -> Entry:
    """As ADAPTERS."""
    if gathered is None or runs is None:
        return tokens, 0, 0, 0, 0, 0, 0, 0
    sites = 0 if gathered.changes is None else gathered.changes.address
    return tokens, *runs.places, *gathered.places, sites


class Adapted:
    """The product of M Linears, whose outputs are its columns from `firsts` on, and behind them their number."""

    def __init__(self, product: Tiled | Int8Tiled, group: int, number: int, firsts: Sequence[int]) -> None:
        self._product = product  # its weight is read
        self._weight = np.array([weight_entry(product, group, number)], WEIGHT)
        self._firsts: npt.NDArray[np.int64] = np.array(firsts)
        self._members = len(firsts) - 1

    def __call__(self, x_TI: Tensor, gathered: Gathered, runs: Runs) -> Tensor:
        """y (T, O). x is in bf16. Raises: MemoryError."""
        assert LIBRARY is not None and x_TI.dtype == torch.bfloat16
        tokens, inputs = x_TI.shape
        rows, changed_TI = tokens, x_TI.new_empty(0)
        x_TI = x_TI.contiguous()
        if gathered.changes is not None and self._members == 1:
            changed_TI = torch.empty_like(x_TI)
        elif gathered.changes is not None:
            rows = tokens * (1 + self._members)
            x_TI = torch.cat([x_TI, x_TI.new_empty(rows - tokens, inputs)])
        y_TO = x_TI.new_empty(rows, int(self._firsts[-1]))
        spare = torch.empty(rows * (inputs + 4), dtype=torch.uint8)
        step = np.array([adapters_entry(tokens, gathered, runs)], ADAPTERS)
        failed = LIBRARY.mg_multiply_with_adapters(
            step.ctypes.data,
            x_TI.data_ptr(),
            inputs,
            self._firsts.ctypes.data,
            self._members,
            self._weight.ctypes.data,
            SMALLEST,
            y_TO.data_ptr(),
            changed_TI.data_ptr(),
            spare.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for a product of {tokens} tokens and their adapters")
        return y_TO[:tokens]
