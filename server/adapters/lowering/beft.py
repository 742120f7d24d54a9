"""BEFT: a bias is learned and nothing else.

O out.
Source: arXiv:2509.15974; peft 0.21.2, tuners/beft/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from server.adapters.lowering.linears import Change, Found, lower_linears
from server.adapters.lowering.target import Lowered, Target


def lower_beft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += b, whether the base has a bias there or not."""

    def change(found: Found) -> Change:
        return Change(bias_O=found.take("beft_bias", 1, found.outputs).flatten())

    return lower_linears(config, tensors, target, change=change)
