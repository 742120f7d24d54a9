"""A safetensors file in memory as the tensors that lie in it: nothing is copied, and its header is read once.

Adapters of one shape and config have one and the same header, so what it says is remembered by its bytes.
Law: the tensors are those that the safetensors library gives.
Source: the format section of the safetensors README; `hub.tensors` reads the header, and is the stricter reader.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from hub.tensors import BYTES_OF, MAX_HEADER_BYTES, TensorEntry, read_header

MAX_HEADERS = 64
PREAMBLE_BYTES = 8
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class TensorFiles:
    """Threads may share it."""

    def __init__(self) -> None:
        self._headers: OrderedDict[tuple[bytes, int], tuple[TensorEntry, ...]] = OrderedDict()

    def read(self, content: memoryview) -> dict[str, Tensor]:
        """The tensors keep the memory that they lie in. Raises: BadTensors."""
        length = min(int.from_bytes(content[:PREAMBLE_BYTES], "little"), MAX_HEADER_BYTES)
        start = PREAMBLE_BYTES + length
        entries = self._entries(bytes(content[:start]), len(content))
        flat = {dtype: _flat(content, start, dtype) for dtype in {entry.dtype for entry in entries}}
        return {entry.name: _tensor(content, start, entry, flat[entry.dtype]) for entry in entries}

    def _entries(self, header: bytes, size: int) -> tuple[TensorEntry, ...]:
        found = self._headers.get((header, size))
        if found is None:
            found = read_header(io.BytesIO(header), size).entries
            self._headers[header, size] = found
            if len(self._headers) > MAX_HEADERS:
                self._headers.popitem(last=False)
        return found


def _flat(content: memoryview, start: int, dtype: str) -> Tensor | None:
    """All that follows the header as numbers of one dtype; None where they would not stand at their own places."""
    count = (len(content) - start) // BYTES_OF[dtype]
    if not count or start % BYTES_OF[dtype]:
        return None
    return torch.frombuffer(content, dtype=DTYPES[dtype], count=count, offset=start)


def _tensor(content: memoryview, start: int, entry: TensorEntry, flat: Tensor | None) -> Tensor:
    width = BYTES_OF[entry.dtype]
    if flat is not None and entry.begin % width == 0:
        return flat.as_strided(entry.shape, _strides(entry.shape), entry.begin // width)
    own = bytearray(content[start + entry.begin : start + entry.end])
    if not own:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(own, dtype=DTYPES[entry.dtype]).view(entry.shape)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for place in range(len(shape) - 1, 0, -1):
        strides[place - 1] = strides[place] * max(shape[place], 1)
    return tuple(strides)
