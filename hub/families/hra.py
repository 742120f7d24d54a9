"""HRA: the base's weight times a chain of Householder reflections.

Source: peft 0.21.2, tuners/hra/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import TARGETS, Part, bias_field, linear_layout, pattern_ranks
from hub.families.method import Config, Field, Layout, Method

FIELDS: Mapping[str, Field] = {
    **TARGETS,
    "r": Field(fields.positive, shapes_tensors=True),
    "apply_GS": Field(fields.boolean),
    "bias": bias_field("hra_only"),
    "init_weights": Field(fields.boolean),  # inert
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    return Part({"hra_u": (linear.inputs, config["r"])}, config["r"])


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    return linear_layout(config, base, modules, part=_part, conv1d=False)


HRA = Method("hra", "HRA", FIELDS, required=("r", "target_modules"), layout=_layout, ranks=pattern_ranks)
