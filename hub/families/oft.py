"""OFT: blocks of a Linear's input are rotated, each by the Cayley transform of a learned skew-symmetric matrix.

PEFT turns a size of blocks that does not divide the inputs into the nearest that does, with a warning; so do we. The
Cayley-Neumann series of PEFT before 0.18 was another one: a file that may be of those is refused.
Source: peft 0.21.2, tuners/oft/config.py and layer.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import TARGETS, Part, bias_field, divisors, linear_layout
from hub.families.method import Complaint, Config, Field, Layout, Method
from hub.ref import printable

NEUMANN_SINCE = (0, 18)

FIELDS: Mapping[str, Field] = {
    **TARGETS,
    "r": Field(fields.whole, shapes_tensors=True),
    "oft_block_size": Field(fields.whole, shapes_tensors=True),
    "block_share": Field(fields.boolean, shapes_tensors=True),
    "use_cayley_neumann": Field(fields.boolean),
    "num_cayley_neumann_terms": Field(fields.positive),
    "coft": Field(fields.boolean),
    "eps": Field(fields.number),
    "bias": bias_field("oft_only"),
    "fan_in_fan_out": Field(fields.boolean),  # of Conv1D layers, on which PEFT has no OFT
    # Inert: they act while training, or before it.
    "module_dropout": Field(fields.number),
    "init_weights": Field(fields.boolean),
}


def _block_size(config: Config, inputs: int) -> int:
    """By the size of the blocks, or by their count `r`: one of them is 0."""
    size: int = config["oft_block_size"]
    return fitting(inputs, size) if size else inputs // fitting(inputs, config.get("r", 0) or 1)


def fitting(inputs: int, wanted: int) -> int:
    """The divisor that is nearest, the smaller of two; all of it when more is wanted."""
    if wanted >= inputs:
        return inputs
    return min(divisors(inputs), key=lambda one: (abs(one - wanted), one))


def _part(config: Config, module: str, linear: Linear) -> Part:
    size = _block_size(config, linear.inputs)
    blocks = 1 if config.get("block_share") else linear.inputs // size
    return Part({"oft_R.weight": (blocks, size * (size - 1) // 2)})


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    return linear_layout(config, base, modules, part=_part, conv1d=False)


def _contradictions(config: Config) -> list[Complaint]:
    found: list[Complaint] = []
    count, size = config.get("r", 0), config.get("oft_block_size")
    if type(count) is int and type(size) is int and (count == 0) == (size == 0):
        found.append(("oft_block_size", f"{size} beside r {count}: exactly one of the two must be 0"))
    if config.get("use_cayley_neumann") is True and not _neumann_is_known(config.get("peft_version")):
        made = printable(str(config.get("peft_version") or "missing"))
        found.append(
            ("use_cayley_neumann", f"true is another series before PEFT 0.18; peft_version is {made}: train it anew")
        )
    return found


def _neumann_is_known(version: object) -> bool:
    match = re.match(r"(\d{1,6})\.(\d{1,6})", str(version))
    return match is not None and (int(match[1]), int(match[2])) >= NEUMANN_SINCE and "0.18.0.dev" not in str(version)


OFT = Method(
    "oft",
    "OFT",
    FIELDS,
    required=("oft_block_size", "use_cayley_neumann", "target_modules"),
    layout=_layout,
    contradictions=_contradictions,
)
