"""HiRA: the base's weight times, element by element, a low-rank matrix, added to it.

The change is of full rank: a server makes the closest of a rank that it serves, and measures the error. So r does not
count against the ranks that a hub accepts. The weight is the one that the server really multiplies with.

r rank of the factor, I in, O out.
Source: Huang et al. 2025 (HiRA: parameter-efficient Hadamard high-rank adaptation, ICLR); peft 0.21.2,
tuners/hira/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Linear
from hub.families.change import Change, Found
from hub.families.linears import TARGETS, linear_method
from hub.families.method import Config, Field, Part

FIELDS: Mapping[str, Field] = {
    **TARGETS,
    "r": Field(fields.positive, shapes_tensors=True),
    "fan_in_fan_out": Field(fields.boolean),  # follows from the base's own layers
    # Inert: PEFT 0.21.2 makes rank r everywhere in spite of it; a file of any other rank is refused by its shapes.
    "rank_pattern": Field(fields.patterns_of(fields.positive)),
    # Inert: they act while training, or before it.
    "hira_dropout": Field(fields.number),
    "init_weights": Field(fields.one_of(True, False, "gaussian", None)),
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    return Part({"hira_A": (config["r"], linear.inputs), "hira_B": (linear.outputs, config["r"])})


def _change(config: Config, found: Found) -> Change:
    """y += (W * (B A)) x."""
    weight_OI = found.weight()
    A_rI, B_Or = (found.tensors[part].to(weight_OI.device) for part in ("hira_A", "hira_B"))
    return Change(full_OI=weight_OI * (B_Or @ A_rI))


HIRA = linear_method(
    "hira", "HIRA", FIELDS, required=("r", "target_modules"), part=_part, change=_change, full_rank=True, conv1d=True
)
