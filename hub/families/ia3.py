"""IA3: a vector per Linear that scales its input (feedforward modules) or its output with the base's bias.

I in, O out.
Source: Liu et al. 2022 (arXiv:2205.05638); peft 0.21.2, tuners/ia3/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Linear
from hub.families.change import Change, Found
from hub.families.linears import linear_method
from hub.families.method import COMMON, Complaint, Config, Field, Part
from hub.targets import feedforward

FIELDS: Mapping[str, Field] = {
    **COMMON,
    "target_modules": Field(fields.module_names, shapes_tensors=True),
    "exclude_modules": Field(fields.optional_module_names, shapes_tensors=True),
    "feedforward_modules": Field(fields.feedforward_names, shapes_tensors=True),
    "fan_in_fan_out": Field(fields.boolean),
    "init_ia3_weights": Field(fields.boolean),
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    return Part({"ia3_l": (1, linear.inputs) if feedforward(config, module) else (linear.outputs, 1)})


def _change(config: Config, found: Found) -> Change:
    """A bias of the base is scaled too: (s - 1) b is a bias of the adapter's own."""
    excess = found.tensors["ia3_l"].flatten() - 1
    if feedforward(config, found.module):
        return Change(excess_in_I=excess)
    base_O = found.bias_O
    return Change(excess_out_O=excess, bias_O=None if base_O is None else excess.to(base_O.device) * base_O.float())


def _contradictions(config: Config) -> list[Complaint]:
    wanted, scaled = config.get("target_modules"), config.get("feedforward_modules")
    if isinstance(wanted, list) and isinstance(scaled, list) and not {*map(str, scaled)} <= {*map(str, wanted)}:
        return [("feedforward_modules", "must be a subset of target_modules")]
    return []


IA3 = linear_method(
    "ia3",
    "IA3",
    FIELDS,
    required=("target_modules", "feedforward_modules"),
    part=_part,
    change=_change,
    conv1d=True,
    contradictions=_contradictions,
)
