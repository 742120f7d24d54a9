"""SHiRA: entries of the weight that are learned alone, at the places that the file names.

O out, I in, N entries.
Source: Bhardwaj et al. 2024 (arXiv:2406.13175); peft 0.21.2, tuners/shira/layer.py and model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from server.adapters.lowering.linears import Change, Found, check_places, lower_linears
from server.adapters.lowering.target import Lowered, Target
from server.primitives import delta


def lower_shira(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += D x; entries of one place add, as in PEFT."""

    def change(found: Found) -> Change:
        count = int(config["r"]) * (found.inputs + found.outputs)
        rows_N, columns_N = found.take_places("shira_indices", 2, count)
        check_places(found.module, rows_N, found.outputs)
        check_places(found.module, columns_N, found.inputs)
        values_N = found.take("shira_weight", count)
        return Change(delta=delta.sparse(rows_N, columns_N, values_N, shape=(found.outputs, found.inputs)))

    return lower_linears(config, tensors, target, change=change)
