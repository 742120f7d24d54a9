"""LoHa: the elementwise product of two low-rank matrices, which has the product of their ranks.

r rank of each factor, I in, O out.
Source: Hyeon-Woo et al. 2021 (arXiv:2108.06098); peft 0.21.2, tuners/loha/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from server.adapters.lowering.linears import Change, Found, lower_linears, pattern_value
from server.adapters.lowering.target import Lowered, Target


def lower_loha(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += alpha / r * ((w1a w1b) * (w2a w2b)) x: every pair of a column of w1a and one of w2a is a column of B."""

    def change(found: Found) -> Change:
        rank = int(pattern_value(config.get("rank_pattern"), found.module, config["r"]))
        alpha = float(pattern_value(config.get("alpha_pattern"), found.module, config["alpha"]))
        found.check_rank(rank * rank)
        one_Or, two_Or = (found.take(f"hada_w{n}_a", found.outputs, rank) for n in (1, 2))
        one_rI, two_rI = (found.take(f"hada_w{n}_b", rank, found.inputs) for n in (1, 2))
        A_RI = (one_rI[:, None, :] * two_rI[None, :, :]).flatten(0, 1)
        B_OR = (one_Or[:, :, None] * two_Or[:, None, :]).flatten(1, 2)
        return Change(A_RI, B_OR * (alpha / rank))

    return lower_linears(config, tensors, target, change=change)
