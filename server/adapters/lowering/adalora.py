"""AdaLoRA: LoRA as a singular value decomposition, of which training has kept the triplets that matter.

r triplets that are left, of init_r; I in, O out.
Source: Zhang et al. 2023 (arXiv:2303.10512); peft 0.21.2, tuners/adalora/layer.py and model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from server.adapters.lowering.linears import Change, Found, lower_linears
from server.adapters.lowering.target import Lowered, Target

RANK_EPSILON = 1e-5  # PEFT's, so that a rank of zero divides


def lower_adalora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += alpha / (init_r + 1e-5) * B (e * A) x; the triplets that were cut are not in the file."""
    before = int(config["init_r"])
    scaling = float(config["lora_alpha"]) / (before + RANK_EPSILON)
    kept = config.get("rank_pattern") or {}

    def change(found: Found) -> Change:
        mask = kept.get(f"{found.module}.lora_E")
        rank = found.check_rank(before if mask is None else sum(mask))
        A_rI = found.take("lora_A", rank, found.inputs) * found.take("lora_E", rank, 1)
        return Change(A_rI, found.take("lora_B", found.outputs, rank) * scaling)

    return lower_linears(config, tensors, target, change=change)
