"""HiRA: the base's weight times, element by element, a low-rank matrix, added to it.

The change is of full rank: a server makes the closest of a rank that it serves, and measures the error. So r does not
count against the ranks that a hub accepts.
Source: peft 0.21.2, tuners/hira/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import TARGETS, Part, linear_layout
from hub.families.method import Config, Field, Layout, Method

FIELDS: Mapping[str, Field] = {
    **TARGETS,
    "r": Field(fields.positive, shapes_tensors=True),
    "fan_in_fan_out": Field(fields.boolean),  # follows from the base's own layers
    # Inert: PEFT 0.21.2 makes rank r everywhere in spite of it; a file of any other rank is refused by its shapes.
    "rank_pattern": Field(fields.patterns_of(fields.positive)),
    # Inert: they act while training, or before it.
    "hira_dropout": Field(fields.number),
    "init_weights": Field(fields.one_of(True, False, "gaussian", None)),
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    return Part({"hira_A": (config["r"], linear.inputs), "hira_B": (linear.outputs, config["r"])})


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    return linear_layout(config, base, modules, part=_part)


HIRA = Method("hira", "HIRA", FIELDS, required=("r", "target_modules"), layout=_layout)
