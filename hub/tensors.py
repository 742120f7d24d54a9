"""What a safetensors file declares, read without trusting it and without loading it.

Only the header is parsed, and no more of it than a limit; the payload is streamed once, when its values are checked.
Stricter than the format's own reader: no duplicate keys, a cap on the header, exact sizes, no gaps or overlaps.
Law: whatever this accepts, the safetensors library accepts.
Source: the format section of the safetensors README; FACTS measured against safetensors 0.8.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, BinaryIO

from hub.errors import BadTensors
from hub.ref import printable
from hub.strict_json import BadJson, parse

MAX_HEADER_BYTES = 8 << 20
MAX_DIMENSIONS = 8
_PREAMBLE_BYTES = 8

BYTES_OF = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as declared. Units: begin and end in bytes after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """All tensors in the order of their bytes, and the raw header as it stands in the file."""

    entries: tuple[TensorEntry, ...]
    raw: bytes


def read_header(source: BinaryIO, size: int, *, max_header_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Leaves the file at the first byte of the payload.

    Raises: BadTensors with every reason found.
    """
    if size < _PREAMBLE_BYTES:
        raise BadTensors([(None, f"the file has {size} bytes; a safetensors file has at least {_PREAMBLE_BYTES}")])
    preamble = source.read(_PREAMBLE_BYTES)
    length = int.from_bytes(preamble, "little")
    if length > max_header_bytes:
        raise BadTensors([(None, f"the header declares {length} bytes, above the limit of {max_header_bytes}")])
    if length > size - _PREAMBLE_BYTES:
        raise BadTensors([(None, f"the header declares {length} bytes, but the file has {size}: it is truncated")])
    raw = source.read(length)
    if not raw.startswith(b"{"):
        raise BadTensors([(None, 'the header does not start with "{": this is no safetensors file')])
    try:
        declared = parse(raw)
    except BadJson as error:
        raise BadTensors([(None, f"the header is no usable JSON: {error}")]) from error
    entries = _entries(declared, payload=size - _PREAMBLE_BYTES - length)
    return Header(entries, preamble + raw)


def _entries(declared: Any, *, payload: int) -> tuple[TensorEntry, ...]:
    reasons: list[tuple[str | None, str]] = []
    entries: list[TensorEntry] = []
    for name, value in declared.items():
        if name == "__metadata__":
            reasons += _metadata_reasons(value)
            continue
        shown = printable(name)
        found = _entry(name, value)
        if isinstance(found, str):
            reasons.append((shown, found))
        else:
            entries.append(found)
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    if not reasons:
        reasons += _layout_reasons(entries, payload)
    if reasons:
        raise BadTensors(reasons)
    return tuple(entries)


def _metadata_reasons(value: Any) -> list[tuple[str | None, str]]:
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return []
    return [("__metadata__", "must be an object of texts")]


def _entry(name: str, value: Any) -> TensorEntry | str:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return "must have exactly dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES_OF:
        return f"dtype {printable(str(dtype))} is unknown"
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        return f"shape must be at most {MAX_DIMENSIONS} whole numbers"
    if math.prod(max(size, 1) for size in shape) >= 2**60:
        return f"shape {shape} overflows"
    if not _naturals(offsets) or len(offsets) != 2:
        return "data_offsets must be two whole numbers"
    begin, end = offsets
    wanted = math.prod(shape) * BYTES_OF[dtype]
    if end - begin != wanted:
        return f"shape {shape} of {dtype} takes {wanted} bytes, but data_offsets span {end - begin}"
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _layout_reasons(entries: list[TensorEntry], payload: int) -> list[tuple[str | None, str]]:
    reasons: list[tuple[str | None, str]] = []
    position = 0
    for entry in entries:
        if entry.begin != position:
            what = "overlaps the one before" if entry.begin < position else "leaves a gap"
            reasons.append((printable(entry.name), f"starts at byte {entry.begin}, not {position}: it {what}"))
        position = entry.end
    if position != payload:
        what = "is truncated" if position > payload else "has bytes that no tensor owns"
        reasons.append((None, f"the tensors take {position} bytes, the file holds {payload}: it {what}"))
    return reasons
