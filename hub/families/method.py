"""One row of the table of adapter kinds: the keys of its config, the tensors that follow from it, what they compute.

A key stands in one of three classes. Served: we act on it. Inert: it steers training or initialisation only, and the
saved weights already hold its effect. Neutral: an option that we do not serve, accepted only at PEFT's default, which
switches it off. A key that stands nowhere in its row is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.change import Change, Found
from hub.fields import Check

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Complaint = tuple[str, str]  # (key of the config, reason)

TENSOR_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Field:
    """One key of a config: the complaint about a value, and whether the tensors' names and shapes follow from it."""

    check: Check
    shapes_tensors: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors that a config demands on a base, and what keeps them from being told.

    `optional` may be there: whether they are depends on what the base's description does not tell. `integers` are those
    that hold places and not weights.
    """

    shapes: Shapes
    complaints: tuple[Complaint, ...] = ()
    rank: int | None = None
    targets: tuple[str, ...] = ()
    optional: Shapes = field(default_factory=dict)
    integers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Part:
    """What a config demands at one Linear; `shapes` by what stands behind the module's name, `integers` among them.

    `rank` is that of the low-rank term that is served, where there is one. `as_stored` are the factors of that term
    that the kind takes as they are, so that they need not take more room than in the file.
    """

    shapes: Shapes
    rank: int | None = None
    complaint: Complaint | None = None
    integers: frozenset[str] = frozenset()
    as_stored: frozenset[str] = frozenset()


PartOf = Callable[[Config, str, Linear], Part]
ChangeOf = Callable[[Config, Found], Change]


@dataclass(frozen=True, slots=True)
class AtLinear:
    """A kind at one Linear: the tensors that it has there, and what they change."""

    part: PartOf
    change: ChangeOf


def no_ranks(config: Config) -> Iterable[tuple[str, int]]:
    return ()


def no_contradictions(config: Config) -> Iterable[Complaint]:
    return ()


def no_pins(config: Config) -> Iterable[str]:
    return ()


@dataclass(frozen=True, slots=True)
class Method:
    """One kind of adapter.

    `at_linear` is what it computes, where that is a change of each Linear by itself. What else a kind may be is lowered
    in `server.adapters.lowering`. With `full_rank` a server serves the closest that is of low rank.

    `ranks` are the ranks that a config asks for, by key, as they are served; `contradictions` are combinations of keys
    that PEFT itself refuses to load. Both must take a config that has other complaints. `pins` are the adapters without
    which this one is nothing, each as name@digest.
    """

    kind: str
    peft_type: str
    fields: Mapping[str, Field]
    required: tuple[str, ...]
    layout: Callable[[Config, Base, Modules], Layout]
    at_linear: AtLinear | None = None
    full_rank: bool = False
    ranks: Callable[[Config], Iterable[tuple[str, int]]] = no_ranks
    contradictions: Callable[[Config], Iterable[Complaint]] = no_contradictions
    pins: Callable[[Config], Iterable[str]] = no_pins


INERT = Field(fields.anything)

NOTHING_SAVED = Field(fields.neutral(None, [], why="this kind replaces no modules"))

COMMON: Mapping[str, Field] = {
    "peft_type": INERT,
    "peft_version": Field(fields.optional_text),
    "base_model_name_or_path": Field(fields.optional_text),
    "revision": Field(fields.optional_text),
    "inference_mode": Field(fields.boolean),
    "task_type": Field(fields.one_of("CAUSAL_LM", None)),
    "auto_mapping": Field(fields.auto_mapping),
    "modules_to_save": Field(fields.saved_names, shapes_tensors=True),
}
