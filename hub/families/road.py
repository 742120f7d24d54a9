"""RoAd: pairs of outputs, half a group apart, are rotated and stretched, y = M (W x + b).

In a group of G outputs, output j is paired with output j + G / 2. Output i of a pair has an angle and a length for its
own share (cosine) and for what it takes of its partner (sine): the pair has one of each (road_1), each output has one
(road_2), or each share has one (road_4). The base's bias is turned too: (M - I) b is a bias of the adapter's own.

O out, C groups, D = G / 2 pairs of a group.
Source: Liao and Monz 2024 (arXiv:2409.00119); peft 0.21.2, tuners/road/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hub import fields
from hub.base import Linear
from hub.families.change import Change, Found, Rotation
from hub.families.linears import linear_method
from hub.families.method import COMMON, Config, Field, Part
from hub.ref import printable

if TYPE_CHECKING:
    from torch import Tensor

# How many angles and lengths a pair of outputs has.
ANGLES = {"road_1": 1, "road_2": 2, "road_4": 4}


def _even(value: Any) -> str | None:
    return fields.positive(value) or (f"must be even, not {value}" if value % 2 else None)


FIELDS: Mapping[str, Field] = {
    **COMMON,
    "target_modules": Field(fields.module_names, shapes_tensors=True),
    "variant": Field(fields.one_of(*ANGLES), shapes_tensors=True),
    "group_size": Field(_even, shapes_tensors=True),
    "init_weights": Field(fields.boolean),  # inert
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    group = config["group_size"]
    complaint = None
    if linear.outputs % group:
        complaint = ("group_size", f"{group} does not divide the {linear.outputs} outputs of {printable(module)}")
    shape = (linear.outputs * ANGLES[config["variant"]] // 2,)
    return Part({"road_theta": shape, "road_alpha": shape}, None, complaint)


def _change(config: Config, found: Found) -> Change:
    """y += (M - I) y, b += (M - I) b."""
    pairs = config["group_size"] // 2
    own_angle, other_angle = _shares(found.tensors["road_theta"], config["variant"], pairs)
    own_length, other_length = _shares(found.tensors["road_alpha"], config["variant"], pairs)
    own_C2D, other_C2D = own_length * own_angle.cos(), other_length * other_angle.sin()
    excess_CD22 = own_C2D.new_empty(len(own_C2D), pairs, 2, 2)
    excess_CD22[..., 0, 0] = own_C2D[:, 0] - 1
    excess_CD22[..., 0, 1] = -other_C2D[:, 0]
    excess_CD22[..., 1, 0] = other_C2D[:, 1]
    excess_CD22[..., 1, 1] = own_C2D[:, 1] - 1
    bias_O = None
    if found.bias_O is not None:
        pairs_CD2 = found.bias_O.float().view(-1, 2, pairs).transpose(1, 2).to(excess_CD22.device)
        bias_O = (excess_CD22 @ pairs_CD2[..., None])[..., 0].transpose(1, 2).flatten()
    return Change(rotate_out=Rotation(excess_CD22.flatten(0, 1), stride=pairs), bias_O=bias_O)


def _shares(learned: Tensor, variant: str, pairs: int) -> tuple[Tensor, Tensor]:
    """What was learned as (C, 2, D), for an output's own share and for that of its partner."""
    if variant == "road_1":
        both = learned.view(-1, 1, pairs).expand(-1, 2, -1)
        return both, both
    if variant == "road_2":
        both = learned.view(-1, 2, pairs)
        return both, both
    own, other = learned.view(-1, 2, 2, pairs).unbind(1)
    return own, other


ROAD = linear_method(
    "road", "ROAD", FIELDS, required=("variant", "group_size", "target_modules"), part=_part, change=_change
)
