"""BOFT: as OFT, by a product of butterfly factors, and a learned length for each output.

PEFT without its CUDA extension trains and loads one factor, whatever the config says. Such a file misfits its config
and is refused by the shape of its tensors.
Source: peft 0.21.2, tuners/boft/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import TARGETS, Part, bias_field, linear_layout
from hub.families.method import Complaint, Config, Field, Layout, Method
from hub.ref import printable

MAX_FACTORS = 32

FIELDS: Mapping[str, Field] = {
    **TARGETS,
    "boft_block_size": Field(fields.whole, shapes_tensors=True),
    "boft_block_num": Field(fields.whole, shapes_tensors=True),
    "boft_n_butterfly_factor": Field(fields.one_of(*range(1, MAX_FACTORS + 1)), shapes_tensors=True),
    "bias": bias_field("boft_only"),
    "fan_in_fan_out": Field(fields.boolean),  # of Conv1D layers, on which PEFT has no BOFT
    # Inert: they act while training, or before it.
    "boft_dropout": Field(fields.number),
    "init_weights": Field(fields.boolean),
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    size, count = config["boft_block_size"], config["boft_block_num"]
    factors = config.get("boft_n_butterfly_factor", 1)
    key, given = ("boft_block_size", size) if size else ("boft_block_num", count)
    if given == 0 or linear.inputs % given:
        return Part({}, None, (key, f"{given} does not divide the {linear.inputs} inputs of {printable(module)}"))
    size, count = size or linear.inputs // count, count or linear.inputs // size
    complaint = None
    if factors > 1 and (size % 2 or linear.inputs % (size << (factors - 1))):
        complaint = (
            "boft_n_butterfly_factor",
            f"{factors} needs blocks of an even size, and {linear.inputs} inputs to be a multiple of {size} * 2 ** "
            f"{factors - 1} at {printable(module)}",
        )
    return Part({"boft_R": (factors, count, size, size), "boft_s": (linear.outputs, 1)}, None, complaint)


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    return linear_layout(config, base, modules, part=_part, conv1d=False)


def _contradictions(config: Config) -> list[Complaint]:
    size, count = config.get("boft_block_size"), config.get("boft_block_num")
    if type(size) is int and type(count) is int and (size == 0) == (count == 0):
        return [("boft_block_size", f"{size} beside boft_block_num {count}: exactly one of the two must be 0")]
    return []


BOFT = Method(
    "boft",
    "BOFT",
    FIELDS,
    required=("boft_block_size", "boft_block_num", "target_modules"),
    layout=_layout,
    contradictions=_contradictions,
)
