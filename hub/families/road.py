"""RoAd: pairs of outputs, half a group apart, are rotated and stretched, the base's bias with them.

Source: peft 0.21.2, tuners/road/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import Part, linear_layout
from hub.families.method import COMMON, Config, Field, Layout, Method
from hub.ref import printable

# How many angles and lengths a pair of outputs has.
ANGLES = {"road_1": 1, "road_2": 2, "road_4": 4}


def _even(value: Any) -> str | None:
    return fields.positive(value) or (f"must be even, not {value}" if value % 2 else None)


FIELDS: Mapping[str, Field] = {
    **COMMON,
    "target_modules": Field(fields.module_names, shapes_tensors=True),
    "variant": Field(fields.one_of(*ANGLES), shapes_tensors=True),
    "group_size": Field(_even, shapes_tensors=True),
    "init_weights": Field(fields.boolean),  # inert
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    group = config["group_size"]
    complaint = None
    if linear.outputs % group:
        complaint = ("group_size", f"{group} does not divide the {linear.outputs} outputs of {printable(module)}")
    shape = (linear.outputs * ANGLES[config["variant"]] // 2,)
    return Part({"road_theta": shape, "road_alpha": shape}, None, complaint)


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    return linear_layout(config, base, modules, part=_part, conv1d=False)


ROAD = Method("road", "ROAD", FIELDS, required=("variant", "group_size", "target_modules"), layout=_layout)
