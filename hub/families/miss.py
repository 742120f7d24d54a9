"""MiSS: sums of the input's features, spread over the output by a learned block; in its mini form a narrow one.

Source: peft 0.21.2, tuners/miss/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import TARGETS, Part, bias_field, linear_layout, pattern_ranks
from hub.families.method import Config, Field, Layout, Method
from hub.ref import printable


def _form(value: Any) -> str | None:
    """init_weights is no initialisation here: it says what the adapter computes."""
    if value == "bat":
        return "bat is not served (it multiplies blocks of the base's weight, a change of full rank)"
    return fields.one_of(True, False, "mini")(value)


FIELDS: Mapping[str, Field] = {
    **TARGETS,
    "r": Field(fields.positive, shapes_tensors=True),
    "init_weights": Field(_form, shapes_tensors=True),
    "mini_r": Field(fields.positive, shapes_tensors=True),
    "bias": bias_field("MiSS_only"),
    "miss_dropout": Field(fields.number),  # inert
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    rank, width = config["r"], linear.outputs
    if config.get("init_weights") == "mini":
        width = config.get("mini_r", 1)
    complaint = None
    if rank > linear.inputs:
        complaint = ("r", f"{rank} is above the {linear.inputs} inputs of {printable(module)}")
    elif linear.outputs % width:
        complaint = ("mini_r", f"{width} does not divide the {linear.outputs} outputs of {printable(module)}")
    return Part({"miss_block": (rank, width)}, rank, complaint)


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    return linear_layout(config, base, modules, part=_part, conv1d=False)


MISS = Method("miss", "MISS", FIELDS, required=("r", "target_modules"), layout=_layout, ranks=pattern_ranks)
