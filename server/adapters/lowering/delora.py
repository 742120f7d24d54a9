"""DeLoRA: LoRA whose rank-one terms have a learned common length, times the base's column norms at its training.

r rank, I in, O out.
Source: Bini et al. 2025 (arXiv:2503.18225); peft 0.21.2, tuners/delora/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from server.adapters.lowering.linears import Change, Found, lower_linears, pattern_value
from server.adapters.lowering.target import Lowered, Target

SMALLEST_NORM = 1e-4  # PEFT's


def lower_delora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += B diag(lambda / (r |a_i| |b_i|)) A (w * x); the norms w are saved with the adapter."""

    def change(found: Found) -> Change:
        rank = found.check_rank(int(pattern_value(config.get("rank_pattern"), found.module, config["r"])))
        A_rI = found.take("delora_A", rank, found.inputs)
        B_Or = found.take("delora_B", found.outputs, rank)
        norms_I = found.take("delora_w_norm", found.inputs)
        lengths_r = A_rI.norm(dim=1).clamp(min=SMALLEST_NORM) * B_Or.norm(dim=0).clamp(min=SMALLEST_NORM)
        return Change(A_rI * norms_I, B_Or * (found.take("delora_lambda", 1) / rank / lengths_r))

    return lower_linears(config, tensors, target, change=change)
