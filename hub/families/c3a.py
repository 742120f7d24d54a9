"""C3A: blocks of the change are circulant, each a learned kernel.

The change is of full rank: a server makes the closest of a rank that it serves, and measures the error.
Source: peft 0.21.2, tuners/c3a/config.py, model.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import TARGETS, Part, bias_field, linear_layout
from hub.families.method import Config, Field, Layout, Method
from hub.ref import printable
from hub.targets import dotted_pattern_value

FIELDS: Mapping[str, Field] = {
    **{key: field for key, field in TARGETS.items() if key != "exclude_modules"},
    "block_size": Field(fields.positive, shapes_tensors=True),
    "block_size_pattern": Field(fields.patterns_of(fields.positive), shapes_tensors=True),
    "bias": bias_field("c3a_only"),
    "init_weights": Field(fields.one_of(True, False, "gaussian", "kaiming_uniform", "xavier_uniform", None)),  # inert
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    size = dotted_pattern_value(config.get("block_size_pattern") or {}, module, config["block_size"])
    complaint = None
    if linear.inputs % size or linear.outputs % size:
        complaint = (
            "block_size",
            f"{size} does not divide the {linear.inputs} inputs and {linear.outputs} outputs of {printable(module)}",
        )
    return Part({"c3a_kernel": (linear.outputs // size, linear.inputs // size, size)}, None, complaint)


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    return linear_layout(config, base, modules, part=_part, conv1d=False)


C3A = Method("c3a", "C3A", FIELDS, required=("block_size", "target_modules"), layout=_layout)
