"""LN tuning: the weights and biases of norms are trained, and nothing else.

Source: peft 0.21.2, tuners/ln_tuning/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import linear_layout
from hub.families.method import COMMON, TENSOR_PREFIX, Config, Field, Layout, Method, Part
from hub.targets import target_modules

FIELDS: Mapping[str, Field] = {
    **COMMON,
    "target_modules": Field(fields.module_names, shapes_tensors=True),
    "exclude_modules": Field(fields.optional_module_names, shapes_tensors=True),
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    return Part({"ln_tuning_layers.weight": (linear.outputs,)})


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    norms = replace(
        modules,
        linears={name: Linear(size, size) for name, size in modules.norms.items()},
        others=(modules.others | modules.linears.keys()) - modules.norms.keys(),
    )
    layout = linear_layout(config, base, norms, part=_part, what="norm")
    adapted = [name for name in target_modules(config, norms) if modules.biased is None or name in modules.biased]
    biases = {f"{TENSOR_PREFIX}{name}.ln_tuning_layers.bias": (modules.norms[name],) for name in adapted}
    if modules.biased is None:
        return replace(layout, optional={**layout.optional, **biases})
    return replace(layout, shapes={**layout.shapes, **biases})


LN_TUNING = Method("ln-tuning", "LN_TUNING", FIELDS, required=("target_modules",), layout=_layout)
