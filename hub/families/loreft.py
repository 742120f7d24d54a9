"""LoReFT: low-rank edits of the layers' outputs at the first and the last tokens of the prompt.

Source: Wu et al. 2024 (arXiv:2404.03592); pyreft 0.1.0, interventions.py; the format is ours: decision 17.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hub import fields
from hub.base import Base, Modules
from hub.families.method import COMMON, INERT, Complaint, Config, Field, Layout, Method
from hub.families.stream import LAYERS, NON_LINEARITY, meant_layers

POSITIONS = re.compile(r"f(?P<first>[0-9]{1,6})(?:\+l(?P<last>[0-9]{1,6}))?|l(?P<lone>[0-9]{1,6})")


def _positions(value: Any) -> str | None:
    if isinstance(value, str) and any(ends(value)):
        return None
    return f"must be f<number>, l<number> or f<number>+l<number>, not all of them 0, not {fields.shown(value)}"


def ends(positions: str) -> tuple[int, int]:
    """How many of the first and of the last tokens of the prompt; (0, 0) for a text that says nothing."""
    match = POSITIONS.fullmatch(positions)
    return (0, 0) if match is None else (int(match["first"] or 0), int(match["last"] or match["lone"] or 0))


FIELDS: Mapping[str, Field] = {
    **COMMON,
    "r": Field(fields.positive, shapes_tensors=True),
    "layers": LAYERS,
    "positions": Field(_positions, shapes_tensors=True),
    "tied_weights": Field(fields.boolean, shapes_tensors=True),
    "non_linearity": Field(lambda value: None if value is None else NON_LINEARITY.check(value)),
    "subtract_projection": Field(fields.boolean),
    "orthogonality": Field(fields.boolean),  # inert: the formula is the same for any R
    "dropout": INERT,
}


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    layers, complaints = meant_layers(config, base)
    rank, hidden = config["r"], base.hidden_size
    if rank > hidden:
        return Layout({}, (*complaints, ("r", f"{rank} is above the {hidden} features of the stream")))
    parts: dict[str, tuple[int, ...]] = {"rotate_layer.weight": (rank, hidden), "learned_source.weight": (rank, hidden)}
    parts |= {"learned_source.bias": (rank,)}
    halves = ("first.", "last.") if all(ends(config["positions"])) and not config.get("tied_weights") else ("",)
    shapes = {
        f"layers.{layer}.{half}{part}": shape for layer in layers for half in halves for part, shape in parts.items()
    }
    return Layout(shapes, tuple(complaints), rank, ("stream",))


def _ranks(config: Config) -> Iterable[tuple[str, int]]:
    return [("r", config["r"])] if type(config.get("r")) is int else []


def _contradictions(config: Config) -> Iterable[Complaint]:
    positions = config.get("positions")
    if isinstance(positions, str) and all(ends(positions)) and "tied_weights" not in config:
        return [("tied_weights", "is missing: positions names both ends")]
    return []


LOREFT = Method(
    "loreft",
    "LOREFT",
    FIELDS,
    required=("r", "positions"),
    layout=_layout,
    ranks=_ranks,
    contradictions=_contradictions,
)
