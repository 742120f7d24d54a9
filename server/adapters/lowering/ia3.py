"""IA3: a learned vector scales a Linear's input, or its output with the base's bias.

I in, O out.
Source: Liu et al. 2022 (arXiv:2205.05638); peft 0.21.2, tuners/ia3/layer.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from server.adapters.lowering.linears import Change, Found, lower_linears
from server.adapters.lowering.target import Lowered, Target


def lower_ia3(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """Feedforward modules scale their input, the others their output; (s - 1) b is a bias of the adapter's own."""

    def change(found: Found) -> Change:
        if _is_feedforward(found.module, config.get("feedforward_modules")):
            return Change(excess_in_I=found.take("ia3_l", 1, found.inputs).flatten() - 1)
        excess_O = found.take("ia3_l", found.outputs, 1).flatten() - 1
        base = found.shape.bias_O
        return Change(excess_out_O=excess_O, bias_O=None if base is None else excess_O.to(base.device) * base.float())

    return lower_linears(config, tensors, target, change=change)


def _is_feedforward(module: str, names: str | list[str] | None) -> bool:
    """PEFT's rule, which compares endings without a dot."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module.endswith(name) for name in names or [])
