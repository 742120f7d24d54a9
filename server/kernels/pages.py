"""Memory for what is read from end to end at every step: in huge pages, where the system has them.

Pages of 4 KB are looked up one by one while a weight streams by: up to 7 % of its products (docs/performance.md).
What is taken lies side by side in large pieces; a piece goes when all that was taken of it has gone.
"""

from __future__ import annotations

import mmap
import threading
from contextlib import suppress

import torch
from torch import Tensor

PIECE = 64 << 20  # bytes
HUGE = 2 << 20
LINE = 64

_lock = threading.Lock()
_piece = torch.empty(0, dtype=torch.uint8)
_used = 0


def take(numbers: int, dtype: torch.dtype) -> Tensor:
    """(numbers), of anything, on a CPU. Raises: OSError where there is no memory."""
    global _piece, _used
    size = numbers * dtype.itemsize
    with _lock:
        if _used + size > len(_piece):
            _piece, _used = _map(max(size, PIECE)), 0
        start, _used = _used, -(-(_used + size) // LINE) * LINE
        return _piece[start : start + size].view(dtype)


def _map(size: int) -> Tensor:
    """So many bytes from the start of a huge page on."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    mapped = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of kernels without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + size]
