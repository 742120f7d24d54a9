"""Bottleneck adapters: h += s (U act(D n(v) + d) + c) behind the attention, the MLP, or both, of every layer.

Houlsby, Pfeiffer and parallel adapters differ in v alone (`reads`). Compacter's matrices are sums of Kronecker
products, multiplied out here. A LayerNorm in front goes into D and d, the scaling into U and c.

n Kronecker factors, b width, H hidden, r their rank.
Source: Houlsby et al. 2019 (arXiv:1902.00751); Pfeiffer et al. 2020 (arXiv:2005.00247); He et al. 2022
(arXiv:2110.04366); Mahabadi et al. 2021 (arXiv:2106.04647); adapters 1.3.0, methods/modeling.py. Format: decision 17.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering.places import (
    FoundAt,
    activation_of,
    check_used,
    found_place,
    layers_of,
    placed,
)
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.primitives.edit import Edit, Part
from server.primitives.site import SiteValue


def lower_bottleneck(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """One edit per layer and sublayer."""
    left = dict(tensors)
    sites = {}
    for layer in layers_of(config, target):
        for sublayer in sorted(set(config["places"])):
            name = found_place(target, layer, sublayer, str(config["reads"]))
            found = FoundAt(f"layers.{layer}.{sublayer}", left, target)
            sites[name] = SiteValue(edit=placed(_edit(config, found, layer), target))
    check_used(left)
    return Lowered(sites)


def _edit(config: Mapping[str, Any], found: FoundAt, layer: int) -> Edit:
    hidden = found.hidden
    width = found.check_width(int((config.get("layer_sizes") or {}).get(str(layer), config["bottleneck_size"])))
    D_bH = _weight(config, found, "down", inputs=hidden, outputs=width)
    d_b = found.take("down.bias", width)
    U_Hb = _weight(config, found, "up", inputs=width, outputs=hidden)
    c_H = found.take("up.bias", hidden)
    normed = bool(config.get("norm_before"))
    if normed:
        d_b = d_b + D_bH @ found.take("norm.bias", hidden)
        D_bH = D_bH * found.take("norm.weight", hidden)
    scale_H = _scaling(config.get("scaling", 1.0), found)
    activation = activation_of(config["non_linearity"])
    return Edit((Part(D_bH, d_b, U_Hb * scale_H[:, None], activation, normed),), c_H * scale_H)


def _scaling(scaling: Any, found: FoundAt) -> Tensor:
    """By feature of the stream."""
    if scaling == "learned":
        return found.take("scaling", 1).expand(found.hidden)
    if scaling == "channel":
        return found.take("scaling", found.hidden)
    return torch.full((found.hidden,), float(scaling))


def _weight(config: Mapping[str, Any], found: FoundAt, half: str, *, inputs: int, outputs: int) -> Tensor:
    """(outputs, inputs), as it stands or multiplied out."""
    n = config.get("phm_dim")
    if n is None:
        return found.take(f"{half}.weight", outputs, inputs)
    if inputs % n or outputs % n:
        raise AdapterIncompatible(f"phm_dim {n} divides not both {inputs} and {outputs} of {found.where}")
    rule = found.take(f"{half}.phm_rule", n, n, n)
    rank = config.get("phm_rank")
    if rank is None:
        small = found.take(f"{half}.phm_weight", n, inputs // n, outputs // n)
    else:
        left, right = (
            found.take(f"{half}.phm_{side}", n, *shape)
            for side, shape in (("left", (inputs // n, rank)), ("right", (rank, outputs // n)))
        )
        small = left @ right
    return torch.stack([torch.kron(one, other) for one, other in zip(rule, small, strict=True)]).sum(0).t()
