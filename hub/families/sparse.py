"""Sparse changes (LT-SFT, diff pruning): at each named Linear so many entries, in a format of our own.

The config names modules whole, with how many entries each has; there is no `target_modules`.
Source: docs/decisions/0018-the-format-of-sparse-changes.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import leaves
from hub.families.method import COMMON, NOTHING_SAVED, TENSOR_PREFIX, Complaint, Config, Field, Layout, Method
from hub.fields import MAX_NAMES, shown
from hub.ref import printable

MAX_WEIGHTS = 1 << 31  # what a place of 32 bits can name


def _entries(value: Any) -> str | None:
    if not isinstance(value, dict) or not 0 < len(value) <= MAX_NAMES:
        return f"must be an object of 1 to {MAX_NAMES} modules"
    wrong = next((name for name, count in value.items() if fields.positive(count)), None)
    return None if wrong is None else f"{printable(wrong)} {fields.positive(value[wrong])}"


def _density(value: Any) -> str | None:
    good = fields.number(value) is None and 0 < value <= 1
    return None if good else f"must be a number above 0 and at most 1, not {shown(value)}"


FIELDS: Mapping[str, Field] = {
    **COMMON,
    "modules_to_save": NOTHING_SAVED,
    "entries": Field(_entries, shapes_tensors=True),
    # Inert: what was changed is in the file.
    "density": Field(_density),
    "algorithm": Field(fields.one_of("lt-sft", "diff-pruning", None)),
}


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    entries: Mapping[str, int] = config["entries"]
    shapes = {
        f"{TENSOR_PREFIX}{module}.{part}": (count,)
        for module, count in entries.items()
        for part in ("sparse_indices", "sparse_values")
    }
    found = (_misfit(module, count, modules.linears.get(module)) for module, count in entries.items())
    complaint = next(filter(None, found), None)
    integers = frozenset(name for name in shapes if name.endswith(".sparse_indices"))
    return Layout(shapes, () if complaint is None else (complaint,), None, leaves(entries), integers=integers)


def _misfit(module: str, count: int, linear: Linear | None) -> Complaint | None:
    if linear is None:
        return "entries", f"{printable(module)} is no Linear layer of the base"
    weights = linear.inputs * linear.outputs
    if weights >= MAX_WEIGHTS:
        return "entries", f"{printable(module)} has {weights} weights, and places of 32 bits name {MAX_WEIGHTS - 1}"
    if count > weights:
        return "entries", f"{printable(module)} has {weights} weights, not {count}"
    return None


SPARSE = Method("sparse", "SPARSE", FIELDS, required=("entries",), layout=_layout)
