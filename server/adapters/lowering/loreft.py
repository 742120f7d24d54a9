"""LoReFT: h += R'(act(W h + b) - R h) on the output of decoder layers, at the first and the last tokens of the prompt.

Without an activation that is one bottleneck, R'((W - R) h + b); with one it is the sum of two. NoReFT is the same with
any R, DiReFT leaves R h out. Both ends of the prompt with weights of their own are two parts that reach other tokens.

r rank, H hidden.
Source: Wu et al. 2024 (arXiv:2404.03592); pyreft 0.1.0, interventions.py and dataset.py. Format: decision 17.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering.places import FoundAt, activation_of, check_used, found_place, layers_of, placed
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.policy.reach import PromptEnds
from server.primitives.edit import IDENTITY, Edit, Part
from server.primitives.site import SiteValue

POSITIONS = re.compile(r"f([0-9]{1,6})(?:\+l([0-9]{1,6}))?|l([0-9]{1,6})")


def lower_loreft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """One edit per layer, or one per layer and end of the prompt."""
    left = dict(tensors)
    first, last = _ends(str(config["positions"]))
    if first and last and not config.get("tied_weights"):
        beside = Lowered(_sites(config, left, "last.", target), reach=PromptEnds(0, last))
        lowered = Lowered(_sites(config, left, "first.", target), reach=PromptEnds(first, 0), beside=(beside,))
    else:
        lowered = Lowered(_sites(config, left, "", target), reach=PromptEnds(first, last))
    check_used(left)
    return lowered


def _ends(positions: str) -> tuple[int, int]:
    match = POSITIONS.fullmatch(positions)
    first, last = (0, 0) if match is None else (int(match[1] or 0), int(match[2] or match[3] or 0))
    if not first and not last:
        raise AdapterIncompatible(f"positions {positions[:40]} is not f<number>, l<number> or f<number>+l<number>")
    return first, last


def _sites(config: Mapping[str, Any], left: dict[str, Tensor], end: str, target: Target) -> dict[str, SiteValue]:
    return {
        found_place(target, layer, "mlp", "stream"): SiteValue(
            edit=placed(_edit(config, FoundAt(f"layers.{layer}.{end}".rstrip("."), left, target)), target)
        )
        for layer in layers_of(config, target)
    }


def _edit(config: Mapping[str, Any], found: FoundAt) -> Edit:
    rank = found.check_width(int(config["r"]))
    R_rH = found.take("rotate_layer.weight", rank, found.hidden)
    W_rH = found.take("learned_source.weight", rank, found.hidden)
    b_r = found.take("learned_source.bias", rank)
    activation = activation_of(config.get("non_linearity"))
    if not config.get("subtract_projection", True):
        return Edit((Part(W_rH, b_r, R_rH.t(), activation),))
    if activation == IDENTITY:
        return Edit((Part(W_rH - R_rH, b_r, R_rH.t()),))
    return Edit((Part(W_rH, b_r, R_rH.t(), activation), Part(R_rH, torch.zeros_like(b_r), -R_rH.t())))
