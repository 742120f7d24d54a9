"""Sparse changes (LT-SFT, diff pruning): at each named Linear so many entries, in a format of our own.

The config names modules whole, with how many entries each has; there is no `target_modules`. An entry's place is its
row times the inputs plus its column, and places ascend.

N entries.
Source: docs/decisions/0018-the-format-of-sparse-changes.md; Ansell et al. 2022 (arXiv:2110.07560); Guo et al. 2021
(arXiv:2012.07463).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hub import fields
from hub.base import Base, Linear, Modules
from hub.errors import TensorsUnusable
from hub.families.change import Change, Entries, Found
from hub.families.linears import leaves
from hub.families.method import (
    COMMON,
    NOTHING_SAVED,
    TENSOR_PREFIX,
    AtLinear,
    Complaint,
    Config,
    Field,
    Layout,
    Method,
    Part,
)
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


def _part(config: Config, module: str, linear: Linear | None) -> Part:
    count = config["entries"].get(module, 0)
    shapes = {"sparse_indices": (count,), "sparse_values": (count,)}
    return Part(shapes, None, _misfit(module, count, linear), frozenset({"sparse_indices"}))


def _change(config: Config, found: Found) -> Change:
    """y += D x, D[p // I, p % I] = value for each place p."""
    places_N = found.tensors["sparse_indices"]
    if not (places_N.diff() > 0).all():
        raise TensorsUnusable("sparse_indices do not ascend strictly")
    rows_N, columns_N = places_N // found.inputs, places_N % found.inputs
    return Change(entries=Entries(rows_N, columns_N, found.tensors["sparse_values"]))


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    parts = {module: _part(config, module, modules.linears.get(module)) for module in config["entries"]}
    complaint = next((part.complaint for part in parts.values() if part.complaint is not None), None)
    named = {f"{TENSOR_PREFIX}{module}.": part for module, part in parts.items()}
    shapes = {start + name: shape for start, part in named.items() for name, shape in part.shapes.items()}
    integers = frozenset(start + name for start, part in named.items() for name in part.integers)
    return Layout(shapes, () if complaint is None else (complaint,), None, leaves(parts), integers=integers)


def _misfit(module: str, count: int, linear: Linear | None) -> Complaint | None:
    if linear is None:
        return "entries", f"{printable(module)} is no Linear layer of the base"
    weights = linear.inputs * linear.outputs
    if weights >= MAX_WEIGHTS:
        return "entries", f"{printable(module)} has {weights} weights, and places of 32 bits name {MAX_WEIGHTS - 1}"
    if count > weights:
        return "entries", f"{printable(module)} has {weights} weights, not {count}"
    return None


AT_LINEAR = AtLinear(_part, _change)
SPARSE = Method("sparse", "SPARSE", FIELDS, required=("entries",), layout=_layout)
