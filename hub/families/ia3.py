"""IA3: a vector per Linear that scales its input (feedforward modules) or its output.

Source: peft 0.21.2, tuners/ia3/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import Part, linear_layout
from hub.families.method import COMMON, Complaint, Config, Field, Layout, Method
from hub.targets import feedforward

FIELDS: Mapping[str, Field] = {
    **COMMON,
    "target_modules": Field(fields.module_names, shapes_tensors=True),
    "exclude_modules": Field(fields.optional_module_names, shapes_tensors=True),
    "feedforward_modules": Field(fields.feedforward_names, shapes_tensors=True),
    "fan_in_fan_out": Field(fields.boolean),
    "init_ia3_weights": Field(fields.boolean),
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    return Part({"ia3_l": (1, linear.inputs) if feedforward(config, module) else (linear.outputs, 1)})


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    return linear_layout(config, base, modules, part=_part)


def _contradictions(config: Config) -> list[Complaint]:
    wanted, scaled = config.get("target_modules"), config.get("feedforward_modules")
    if isinstance(wanted, list) and isinstance(scaled, list) and not {*map(str, scaled)} <= {*map(str, wanted)}:
        return [("feedforward_modules", "must be a subset of target_modules")]
    return []


IA3 = Method(
    "ia3",
    "IA3",
    FIELDS,
    required=("target_modules", "feedforward_modules"),
    layout=_layout,
    contradictions=_contradictions,
)
