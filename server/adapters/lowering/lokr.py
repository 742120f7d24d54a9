"""LoKr: the Kronecker product of two small matrices, served as the closest change of low rank.

Its singular values are the products of theirs, so that both are decomposed and never the whole. Where the two are of
low rank, so is their product, and nothing is lost.

r rank of a factor's own halves, R rank that is served, O out, I in.
Source: Yeh et al. 2023 (arXiv:2309.14859); peft 0.21.2, tuners/lokr/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering.approximate import relative_error, smallest_rank
from server.adapters.lowering.linears import Change, Found, lower_linears, pattern_value
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible


def lower_lokr(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += alpha / r * (w1 kron w2) x."""

    def change(found: Found) -> Change:
        rank = int(pattern_value(config.get("rank_pattern"), found.module, config["r"]))
        alpha = float(pattern_value(config.get("alpha_pattern"), found.module, config["alpha"]))
        wanted, both = int(config.get("decompose_factor", -1)), bool(config.get("decompose_both"))
        outs, ins = factors(found.outputs, wanted), factors(found.inputs, wanted)
        w1 = _factor(found, "lokr_w1", (outs[0], ins[0]), rank if both else None)
        w2 = _factor(found, "lokr_w2", (outs[1], ins[1]), rank) * (alpha / rank)
        return _closest_kron(w1.to(target.device), w2.to(target.device), found.module, target)

    return lower_linears(config, tensors, target, change=change)


def factors(size: int, wanted: int) -> tuple[int, int]:
    """PEFT's rule: `wanted` and the rest where it divides; else the largest divisor up to it and up to the root."""
    if wanted > 0 and size % wanted == 0:
        return wanted, size // wanted
    limit = size if wanted == -1 else wanted
    smaller = max(one for one in range(1, size + 1) if one * one <= size and one <= limit and size % one == 0)
    return smaller, size // smaller


def _factor(found: Found, name: str, shape: tuple[int, int], rank: int | None) -> Tensor:
    """Whole, or two halves where a rank is given that is small enough for that."""
    if rank is None or rank >= max(shape) / 2:
        return found.take(name, *shape)
    return found.take(f"{name}_a", shape[0], rank) @ found.take(f"{name}_b", rank, shape[1])


def _closest_kron(w1: Tensor, w2: Tensor, module: str, target: Target) -> Change:
    if not (w1.isfinite().all() and w2.isfinite().all()):
        raise AdapterIncompatible(f"the change of {module} is no finite number in fp32")
    U1, values1, V1 = torch.linalg.svd(w1, full_matrices=False)
    U2, values2, V2 = torch.linalg.svd(w2, full_matrices=False)
    values, places = (values1[:, None] * values2).flatten().sort(descending=True, stable=True)
    kept = places[: smallest_rank(values, target)]
    one, two = kept // len(values2), kept % len(values2)
    roots_R = values[: len(kept)].sqrt()
    A_RI = (V1[one][:, :, None] * V2[two][:, None, :]).flatten(1) * roots_R[:, None]
    B_OR = (U1[:, None, one] * U2[None, :, two]).flatten(0, 1) * roots_R
    return Change(A_RI, B_OR, error=relative_error(torch.kron(w1, w2), A_RI, B_OR))
