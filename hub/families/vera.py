"""VeRA: two random matrices that all Linears share, and two learned vectors at each.

The shared pair is as large as the largest adapted Linear. It is saved with the adapter unless save_projection is false;
then it is made anew from projection_prng_key.
Source: peft 0.21.2, tuners/vera/config.py, model.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import TARGETS, bias_field, linear_layout, pattern_ranks
from hub.families.method import Config, Field, Layout, Method, Part
from hub.targets import target_modules

FIELDS: Mapping[str, Field] = {
    **{key: field for key, field in TARGETS.items() if key != "exclude_modules"},
    "r": Field(fields.positive, shapes_tensors=True),
    "projection_prng_key": Field(fields.seed),
    "save_projection": Field(fields.boolean, shapes_tensors=True),
    "bias": bias_field("vera_only"),
    "fan_in_fan_out": Field(fields.boolean),  # follows from the base's own layers
    # Inert: they act while training, or before it.
    "vera_dropout": Field(fields.number),
    "d_initial": Field(fields.number),
    "init_weights": Field(fields.boolean),
}


def part(config: Config, module: str, linear: Linear) -> Part:
    return Part({"vera_lambda_b": (linear.outputs,), "vera_lambda_d": (config["r"],)}, config["r"])


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    layout = linear_layout(config, base, modules, part=part)
    adapted = [modules.linears[module] for module in target_modules(config, modules)]
    if not adapted or not config.get("save_projection", True):
        return layout
    shared = {
        "base_model.vera_A": (config["r"], max(linear.inputs for linear in adapted)),
        "base_model.vera_B": (max(linear.outputs for linear in adapted), config["r"]),
    }
    return replace(layout, shapes={**layout.shapes, **shared})


VERA = Method("vera", "VERA", FIELDS, required=("r", "target_modules"), layout=_layout, ranks=pattern_ranks)
