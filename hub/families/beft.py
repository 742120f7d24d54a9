"""BEFT: a bias is learned and nothing else.

Source: peft 0.21.2, tuners/beft/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import Part, linear_layout
from hub.families.method import COMMON, Config, Field, Layout, Method

FIELDS: Mapping[str, Field] = {
    **COMMON,
    "target_modules": Field(fields.module_names, shapes_tensors=True),
    "init_weights": Field(fields.boolean),  # inert
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    return Part({"beft_bias": (1, linear.outputs)})


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    return linear_layout(config, base, modules, part=_part, conv1d=False)


BEFT = Method("beft", "BEFT", FIELDS, required=("target_modules",), layout=_layout)
