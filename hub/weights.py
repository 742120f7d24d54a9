"""The tensor files of an adapter, checked against what its config and its base demand.

One pass over each file: header, names, shapes, types, every value finite, and the sha256 on the way. Memory stays flat.
Never unpickles, never maps a file, never keeps a tensor, except the few ids of golden rows.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from hub.base import HEAD, Base, Modules
from hub.centroids import centroids_problems
from hub.digest import CHUNK_BYTES
from hub.errors import SHOWN_PROBLEMS, BadTensors, Problem
from hub.families.method import TENSOR_PREFIX, Layout
from hub.manifest import (
    CENTROID_TENSORS_FILE,
    GOLDEN_ROWS_FILE,
    GOLDEN_TENSORS_FILE,
    WEIGHTS_FILE,
)
from hub.ref import printable
from hub.tensors import BYTES_OF, TensorEntry, read_header

WEIGHT_DTYPES = ("F32", "F16", "BF16")
PLACE_DTYPE = "I32"
MAX_GOLDEN_ROWS = 256
MAX_GOLDEN_TOKENS = 4096

_HINTS = (
    (".lora_magnitude_vector", "a magnitude of DoRA, but use_dora is not true"),
    (".base_layer.bias", "a bias of the base's own that the config has not trained (its key bias says which)"),
    (".base_layer.", "a copy of the base's own weight; save with save_embedding_layers=False"),
    (".modules_to_save.", "a name of PEFT's own in memory; save with save_pretrained"),
    (".original_module.", "a name of PEFT's own in memory; save with save_pretrained"),
    (".default.", "the name of the adapter stands in the key; save with save_pretrained"),
)
RESIZED = "; a vocabulary of another size is not served"
_PAIRED = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight")

# The bits of the exponent: all of them set means NaN or infinite.
_EXPONENT = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}

Consume = Callable[[TensorEntry, bytes], None]


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass over a tensor file gave."""

    sha256: str
    size: int
    entries: Mapping[str, TensorEntry]
    problems: tuple[Problem, ...]


def scan_weights(source: BinaryIO, size: int, *, layout: Layout | None, modules: Modules | None) -> Scan:
    """Check adapter_model.safetensors; `layout` None when it could not be told, then names are checked in pairs."""
    non_finite: dict[str, int] = {}

    def consume(entry: TensorEntry, chunk: bytes) -> None:
        if entry.dtype in WEIGHT_DTYPES:
            non_finite[entry.name] = non_finite.get(entry.name, 0) + count_non_finite(chunk, entry.dtype)

    scan = _scan(WEIGHTS_FILE, source, size=size, consume=consume)
    reasons = [(entry.name, reason) for entry in scan.entries.values() if (reason := _wrong_dtype(entry, layout))]
    reasons += [
        (name, f"holds {count} NaN or infinite of {scan.entries[name].elements} values")
        for name, count in non_finite.items()
        if count
    ]
    if not scan.problems:
        reasons += _unpaired(scan.entries) if layout is None else _misfits(scan.entries, layout, modules)
    return _with(scan, WEIGHTS_FILE, reasons)


def scan_golden(source: BinaryIO, size: int, *, rows: Any, base: Base | None) -> Scan:
    """Check golden.safetensors against golden.json and the base's vocabulary."""
    reasons: list[tuple[str, str]] = []

    def consume(entry: TensorEntry, chunk: bytes) -> None:
        if entry.name.endswith(".logits") and entry.dtype == "F32" and count_non_finite(chunk, "F32"):
            reasons.append((entry.name, "holds NaN or infinite values"))
        if entry.name.endswith(".input_ids") and entry.dtype == "I64" and base is not None:
            ids = memoryview(chunk).cast("q").tolist()
            if not all(0 <= token < base.vocab_size for token in ids):
                reasons.append((entry.name, f"holds ids outside 0 to {base.vocab_size - 1}, the base's vocabulary"))

    scan = _scan(GOLDEN_TENSORS_FILE, source, size=size, consume=consume)
    lengths = _golden_lengths(rows)
    if scan.problems or lengths is None or base is None:
        return _with(scan, GOLDEN_TENSORS_FILE, reasons)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    for row, length in enumerate(lengths):
        wanted[f"{row}.input_ids"] = ("I64", (length,))
        wanted[f"{row}.logits"] = ("F32", (base.vocab_size,))
    missing = f"is missing: {GOLDEN_ROWS_FILE} has {len(lengths)} rows"
    reasons += _unlike(scan.entries, wanted, missing=missing, extra="is no row's input_ids or logits")
    return _with(scan, GOLDEN_TENSORS_FILE, reasons)


def scan_centroids(source: BinaryIO, size: int, *, said: Any, base: Base | None) -> Scan:
    """Check centroids.safetensors against centroids.json and the base's width."""
    reasons: list[tuple[str, str]] = []

    def consume(entry: TensorEntry, chunk: bytes) -> None:
        if entry.dtype != "F32":
            return
        if count_non_finite(chunk, "F32"):
            reasons.append((entry.name, "holds NaN or infinite values"))
        elif entry.name == "scale" and count_not_positive(chunk):
            reasons.append((entry.name, "holds values that are not above 0"))

    scan = _scan(CENTROID_TENSORS_FILE, source, size=size, consume=consume)
    if scan.problems or base is None or centroids_problems(said, base):
        return _with(scan, CENTROID_TENSORS_FILE, reasons)
    width = base.hidden_size
    wanted = {
        "mean": ("F32", (width,)),
        "scale": ("F32", (width,)),
        "centroids": ("F32", (said["centroids"], width)),
    }
    reasons += _unlike(scan.entries, wanted, missing="is missing", extra="is none of mean, scale and centroids")
    return _with(scan, CENTROID_TENSORS_FILE, reasons)


def _unlike(
    entries: Mapping[str, TensorEntry], wanted: Mapping[str, tuple[str, tuple[int, ...]]], *, missing: str, extra: str
) -> list[tuple[str, str]]:
    """What is missing, extra, or of another type or shape than wanted."""
    reasons = []
    for name in sorted(wanted.keys() | entries.keys()):
        found = entries.get(name)
        if found is None:
            reasons.append((name, missing))
        elif name not in wanted:
            reasons.append((name, extra))
        elif (found.dtype, found.shape) != wanted[name]:
            dtype, shape = wanted[name]
            reasons.append((name, f"is {found.dtype} {_shape(found.shape)}, must be {dtype} {_shape(shape)}"))
    return reasons


def _wrong_dtype(entry: TensorEntry, layout: Layout | None) -> str | None:
    """Weights are numbers with a point, places are not; without a layout nobody knows which are which."""
    served: tuple[str, ...]
    if layout is None:
        served = (*WEIGHT_DTYPES, PLACE_DTYPE)
    else:
        served = (PLACE_DTYPE,) if entry.name in layout.integers else WEIGHT_DTYPES
    return None if entry.dtype in served else f"dtype {entry.dtype} is not served; served are {', '.join(served)}"


def golden_problems(value: Any) -> list[Problem]:
    """Check golden.json by itself."""
    known = isinstance(value, dict) and set(value) - {"quantize"} == {"schema_version", "rows"}
    if not known or value["schema_version"] != 1:
        return [Problem(GOLDEN_ROWS_FILE, None, 'must be {"schema_version": 1, "rows": [...]}')]
    if value.get("quantize") not in (None, "nf4", "int8"):
        return [Problem(GOLDEN_ROWS_FILE, "quantize", "must be nf4 or int8, how the base was held, or not be there")]
    rows = value["rows"]
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_GOLDEN_ROWS:
        return [Problem(GOLDEN_ROWS_FILE, "rows", f"must be a list of 1 to {MAX_GOLDEN_ROWS} rows")]
    return [
        Problem(GOLDEN_ROWS_FILE, f"rows[{index}]", f'must be {{"prompt": text, "tokens": 1 to {MAX_GOLDEN_TOKENS}}}')
        for index, row in enumerate(rows)
        if not _is_row(row)
    ]


def count_non_finite(chunk: bytes, dtype: str) -> int:
    """How many values are NaN or infinite. Read as bits, because numpy has no bfloat16."""
    import numpy as np  # not at the top: listing the hub must not wait for it

    word, exponent = _EXPONENT[dtype]
    bits = np.frombuffer(chunk, dtype=word)
    return int(np.count_nonzero((bits & exponent) == exponent))


def count_not_positive(chunk: bytes) -> int:
    """How many values of an F32 tensor are 0 or below."""
    import numpy as np

    return int(np.count_nonzero(np.frombuffer(chunk, dtype="<f4") <= 0))


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and set(row) == {"prompt", "tokens"}
        and isinstance(row["prompt"], str)
        and type(row["tokens"]) is int
        and 1 <= row["tokens"] <= MAX_GOLDEN_TOKENS
    )


def _golden_lengths(value: Any) -> list[int] | None:
    return None if golden_problems(value) else [row["tokens"] for row in value["rows"]]


def _scan(file: str, source: BinaryIO, *, size: int, consume: Consume) -> Scan:
    hasher = hashlib.sha256()
    try:
        header = read_header(source, size)
    except BadTensors as error:
        return Scan("", size, {}, tuple(Problem(file, name, reason) for name, reason in error.reasons))
    hasher.update(header.raw)
    for entry in header.entries:
        left = entry.end - entry.begin
        step = CHUNK_BYTES - CHUNK_BYTES % BYTES_OF[entry.dtype]
        while left:
            chunk = source.read(min(step, left))
            if len(chunk) != min(step, left):
                problem = Problem(file, printable(entry.name), "the file became shorter while it was read")
                return Scan("", size, {}, (problem,))
            hasher.update(chunk)
            consume(entry, chunk)
            left -= len(chunk)
    return Scan(hasher.hexdigest(), size, {entry.name: entry for entry in header.entries}, ())


def _with(scan: Scan, file: str, reasons: Iterable[tuple[str, str]]) -> Scan:
    problems = tuple(Problem(file, printable(name), reason) for name, reason in dict.fromkeys(reasons))
    return Scan(scan.sha256, scan.size, scan.entries, scan.problems + problems)


def _misfits(entries: Mapping[str, TensorEntry], layout: Layout, modules: Modules | None) -> list[tuple[str, str]]:
    """Extra, missing and wrongly shaped tensors."""
    known = {**layout.shapes, **layout.optional}
    extra = [name for name in entries if name not in known]
    hints = {name: _hint(name, known) for name in extra[:SHOWN_PROBLEMS]}
    parts = _parts(known, modules) if extra else frozenset()
    reasons = [(name, _why_extra(name, known, modules, parts=parts, hint=hints.get(name, ""))) for name in extra]
    for name, shape in known.items():
        found = entries.get(name)
        if found is None:
            if name in layout.shapes:
                reasons.append((name, f"is missing; the config and the base demand it with shape {_shape(shape)}"))
        elif found.shape != shape:
            resized = "" if found.shape[1:] != shape[1:] or not _of_vocabulary(name, modules) else RESIZED
            reasons.append(
                (name, f"has shape {_shape(found.shape)}, but the config and the base demand {_shape(shape)}{resized}")
            )
    return reasons


def _of_vocabulary(name: str, modules: Modules | None) -> bool:
    table = modules.embedding.name if modules is not None and modules.embedding is not None else HEAD
    return name.startswith((f"{TENSOR_PREFIX}{table}.", f"{TENSOR_PREFIX}{HEAD}."))


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known)[:2000], n=1, cutoff=0.9)
    return f"; did you mean {near[0]}?" if near else ""


def _parts(known: Iterable[str], modules: Modules | None) -> frozenset[str]:
    """What stands behind a module's name in the tensors of this kind of adapter, such as lora_A.weight."""
    if modules is None:
        return frozenset()
    parts = set()
    for name in known:
        module, tail = name.removeprefix(TENSOR_PREFIX), ""
        while module and module not in modules.linears:
            module, _, leaf = module.rpartition(".")
            tail = f".{leaf}{tail}"
        if module:
            parts.add(tail)
    return frozenset(parts)


def _why_extra(
    name: str, known: Mapping[str, object], modules: Modules | None, *, parts: frozenset[str], hint: str
) -> str:
    for telling, reason in _HINTS:
        if telling in name:
            return reason
    if not name.startswith(TENSOR_PREFIX) and any(other.startswith(TENSOR_PREFIX) for other in known):
        return f"does not start with {TENSOR_PREFIX}{hint}"
    part = max((part for part in parts if name.endswith(part)), key=len, default=None)
    if part is not None and modules is not None:
        module = name.removeprefix(TENSOR_PREFIX).removesuffix(part)
        if module not in modules.linears:
            return f"belongs to {printable(module)}, which is no Linear layer of the base{hint}"
        return f"belongs to {module}, which the config does not target{hint}"
    return f"is no tensor of this kind of adapter{hint}"


def _unpaired(entries: Mapping[str, TensorEntry]) -> list[tuple[str, str]]:
    """What can be said of LoRA pairs when the base or the config is not usable."""
    reasons = []
    for name in entries:
        match = _PAIRED.fullmatch(name)
        if match is None:
            continue
        partner = f"{match['module']}.lora_{'B' if match['half'] == 'A' else 'A'}.weight"
        if partner not in entries:
            reasons.append((name, f"has no partner {printable(partner)}"))
    return reasons


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
