"""VeRA: two random matrices that all Linears share, and two learned vectors at each.

The shared pair is as large as the largest adapted Linear; each takes its upper left part. It is saved with the adapter,
or made anew from a seed exactly as PEFT makes it, on the CPU whatever the device. So this kind's change needs a
generator of torch's, and what all Linears share, and is not told in the hub.

r rank, I in, O out.
Source: Kopiczko et al. 2023 (arXiv:2310.11454); peft 0.21.2, tuners/vera/layer.py and model.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hub.families.change import Change, Found
from hub.families.method import AtLinear, Config
from hub.families.vera import part
from server.adapters.lowering.linears import expect, lower_linears
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible

SHARED = ("base_model.vera_A", "base_model.vera_B")


def lower_vera(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += (b * B) (d * A) x."""
    rank = int(config["r"])
    if rank > target.max_rank:
        raise AdapterIncompatible(f"rank {rank} is above max_rank {target.max_rank}")
    own = {name: tensor for name, tensor in tensors.items() if name not in SHARED}
    widest = _widest(own, target)
    if config.get("save_projection", True):
        A_rI, B_Or = _saved(tensors, rank, *widest)
    elif len(own) < len(tensors):
        raise AdapterIncompatible("the shared projections are in the file, which save_projection false rules out")
    else:
        A_rI, B_Or = _made(config, *widest)

    def change(config: Config, found: Found) -> Change:
        d_r, b_O = found.tensors["vera_lambda_d"], found.tensors["vera_lambda_b"]
        return Change(d_r[:, None] * A_rI[:, : found.inputs], b_O[:, None] * B_Or[: found.outputs])

    return lower_linears(config, own, target, at=AtLinear(part, change))


def _widest(own: Mapping[str, Tensor], target: Target) -> tuple[int, int]:
    """The most inputs and the most outputs of the adapted Linears."""
    adapted = [shape for module, shape in target.sites.items() if f"base_model.model.{module}.vera_lambda_d" in own]
    if not adapted:
        raise AdapterIncompatible("vera_lambda_d is there for no Linear of this base")
    return max(shape.in_features for shape in adapted), max(shape.out_features for shape in adapted)


def _saved(tensors: Mapping[str, Tensor], rank: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    found = []
    for name, shape in zip(SHARED, ((rank, inputs), (outputs, rank)), strict=True):
        if name not in tensors:
            raise AdapterIncompatible(f"{name} is missing, but save_projection is true")
        expect("base_model", name.removeprefix("base_model."), tensors[name], shape)
        found.append(tensors[name].float())
    return found[0], found[1]


def _made(config: Mapping[str, Any], inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Kaiming's uniform draw, A first: the bound is sqrt(6 / columns)."""
    rank = int(config["r"])
    generator = torch.Generator("cpu").manual_seed(int(config.get("projection_prng_key", 0)))
    drawn = []
    for shape in ((rank, inputs), (outputs, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))  # PEFT's own order of rounding
        drawn.append(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]
