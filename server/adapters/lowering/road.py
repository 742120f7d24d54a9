"""RoAd: pairs of outputs are rotated and stretched, y = M (W x + b).

In a group of G outputs, output j is paired with output j + G / 2. Output i of a pair has an angle and a length for its
own share (cosine) and for what it takes of its partner (sine): the pair has one of each (road_1), each output has one
(road_2), or each share has one (road_4). The base's bias is turned too: (M - I) b is a bias of the adapter's own.

O out, C groups, D = G / 2 pairs of a group.
Source: Liao and Monz 2024 (arXiv:2409.00119); peft 0.21.2, tuners/road/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering.linears import Change, Found, lower_linears
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.primitives.rotate import Rotate


def lower_road(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += (M - I) y, b += (M - I) b."""
    group, variant = int(config["group_size"]), config["variant"]

    def change(found: Found) -> Change:
        if found.outputs % group:
            raise AdapterIncompatible(
                f"group_size {group} does not divide the {found.outputs} outputs of {found.module}"
            )
        angles, lengths = (
            _shares(found.take(part, *_shape(variant, found.outputs)), variant, group)
            for part in ("road_theta", "road_alpha")
        )
        own_C2D, other_C2D = lengths[0] * angles[0].cos(), lengths[1] * angles[1].sin()
        first_CD22 = torch.stack([own_C2D[:, 0] - 1, -other_C2D[:, 0]], dim=-1)
        second_CD22 = torch.stack([other_C2D[:, 1], own_C2D[:, 1] - 1], dim=-1)
        excess_CD22 = torch.stack([first_CD22, second_CD22], dim=-2)
        base = found.shape.bias_O
        bias_O = None
        if base is not None:
            pairs_CD2 = base.float().view(-1, 2, group // 2).transpose(1, 2).to(excess_CD22.device)
            bias_O = (excess_CD22 @ pairs_CD2[..., None])[..., 0].transpose(1, 2).flatten()
        return Change(rotate_out=Rotate(excess_CD22.flatten(0, 1), stride=group // 2), bias_O=bias_O)

    return lower_linears(config, tensors, target, change=change)


def _shape(variant: str, outputs: int) -> tuple[int]:
    return ({"road_1": outputs // 2, "road_2": outputs, "road_4": outputs * 2}[variant],)


def _shares(learned: Tensor, variant: str, group: int) -> tuple[Tensor, Tensor]:
    """What was learned as (C, 2, D), for an output's own share and for that of its partner."""
    pairs = group // 2
    if variant == "road_1":
        both = learned.view(-1, 1, pairs).expand(-1, 2, -1)
        return both, both
    if variant == "road_2":
        both = learned.view(-1, 2, pairs)
        return both, both
    own, other = learned.view(-1, 2, 2, pairs).unbind(1)
    return own, other
