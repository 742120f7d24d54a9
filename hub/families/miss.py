"""MiSS: the input's features, r apart, are summed into r sums, and a learned block spreads those over the output.

In its mini form the block is narrower than the output, and is repeated along it.

r rank, D width of the block, I in, O out.
Source: Kang and Yin 2024 (arXiv:2409.15371); peft 0.21.2, tuners/miss/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hub import fields
from hub.base import Linear
from hub.families.change import Change, Found, identity
from hub.families.linears import TARGETS, bias_field, linear_method, pattern_ranks
from hub.families.method import Config, Field, Part
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


def _change(config: Config, found: Found) -> Change:
    """y += D' S x, where S adds feature i of x to sum i mod r."""
    block_rD = found.tensors["miss_block"]
    rank, width = block_rD.shape
    S_rI = identity(rank, block_rD).repeat(1, found.inputs // rank + 1)[:, : found.inputs]
    return Change(S_rI, block_rD.repeat(1, found.outputs // width).t())


MISS = linear_method(
    "miss", "MISS", FIELDS, required=("r", "target_modules"), part=_part, change=_change, ranks=pattern_ranks
)
