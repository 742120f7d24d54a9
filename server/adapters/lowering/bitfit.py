"""BitFit: biases are trained, and nothing else. PEFT has no such type; the format is ours, see `hub.families.bitfit`.

O out, F features.
Source: Ben Zaken et al. 2021 (arXiv:2106.10199).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from server.adapters.lowering.linears import ROOT, expect
from server.adapters.lowering.target import Lowered, Target
from server.adapters.lowering.whole import norm_value
from server.errors import AdapterIncompatible
from server.primitives.bias import Bias
from server.primitives.site import SiteValue


def lower_bitfit(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """Each Linear and norm with the bias that the file holds whole."""
    sites = {}
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix(ROOT).rpartition(".")
        if part != "bias":
            raise AdapterIncompatible(f"tensor {name} is no bias")
        if module in target.norms and (shape := target.norms[module]).bias_F is not None:
            expect(module, part, tensor, (len(shape.weight_F),))
            sites[module] = norm_value(shape, None, tensor.float(), target)
        elif module in target.sites and (base_O := target.sites[module].bias_O) is not None:
            expect(module, part, tensor, (target.sites[module].out_features,))
            sites[module] = SiteValue(bias=Bias(target.place(tensor.float().to(base_O.device) - base_O.float())))
        else:
            raise AdapterIncompatible(f"tensor {name} belongs to no Linear or norm of this base that has a bias")
    return Lowered(sites)
