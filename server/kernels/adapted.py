"""A product of our own and all that a step's adapters do at its Linears, in one native call.

What it gives is what the product, `server.kernels.changes` and `server.kernels.gathered` give one after the other, but
that in tiles the low-rank terms of many neighbouring tokens are added before the product is rounded.

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
from server.kernels.products import Panels, Tiled
from server.kernels.quantized import SMALLEST, Int8Panels, Int8Tiled

# As weight_t and adapters_t in native_adapted.h.
WEIGHT = np.dtype(
    [
        ("weight", "u8"),
        ("form", "i8"),
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

TILED, CODED, IN_PANELS = range(3)

Entry = tuple[int, ...]
Native = Tiled | Int8Tiled | Panels | Int8Panels  # a row's answer is the same to the bit in any company


def activations_of(product: Native) -> torch.dtype:
    """Those that the native calls here take."""
    return torch.bfloat16 if isinstance(product, Tiled | Int8Tiled) else torch.float32


def weight_entry(product: Native, group: int, number: int) -> Entry:
    """As WEIGHT. `number` is that of the first Linear."""
    scales = sums = 0
    form = TILED if isinstance(product, Tiled | Int8Tiled) else IN_PANELS
    if isinstance(product, Tiled) and native.is_coded(product.packed):
        form = CODED
    if isinstance(product, Int8Tiled | Int8Panels):
        scales = product.scales_O.data_ptr()
    if isinstance(product, Int8Tiled):
        sums = product.sums_O.data_ptr()
    return product.packed.data_ptr(), form, scales, sums, group, number


def adapters_entry(tokens: int, gathered: Gathered | None, runs: Runs | None, dtype: torch.dtype) -> Entry:
    """As ADAPTERS. `dtype` is the activations'."""
    if gathered is None or runs is None:
        return tokens, 0, 0, 0, 0, 0, 0, 0
    sites = 0 if gathered.changes is None else gathered.changes.address(dtype)
    return tokens, *runs.places, *gathered.places, sites


class Adapted:
    """The product of M Linears, whose outputs are its columns from `firsts` on, and behind them their number."""

    def __init__(self, product: Native, group: int, number: int, firsts: Sequence[int]) -> None:
        self._product = product  # its weight is read
        self.dtype = activations_of(product)
        self._weight = np.array([weight_entry(product, group, number)], WEIGHT)
        self._firsts: npt.NDArray[np.int64] = np.array(firsts)
        self._members = len(firsts) - 1

    def __call__(self, x_TI: Tensor, gathered: Gathered, runs: Runs) -> Tensor:
        """y (T, O). x is of `dtype`. Raises: MemoryError."""
        assert LIBRARY is not None and x_TI.dtype == self.dtype
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
        step = np.array([adapters_entry(tokens, gathered, runs, self.dtype)], ADAPTERS)
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
