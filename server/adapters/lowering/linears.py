"""What the families that change Linear layers have in common: each says what it does at one Linear, the rest is here.

What the hub has validated is not trusted: every tensor must find its Linear and fit it, and every tensor must be used,
or the adapter is refused. Tensor names are PEFT's: `base_model.model.<module>.<part>`.
An adapter may also bring biases of the base's own, each whole: `<module>.base_layer.bias` where it adapts the module,
`<module>.bias` where it does not. What it does to such a bias is the difference.

R rank, I in, O out.
Source: peft 0.21.2, tuners/tuners_utils.py `_get_learnable_bias_state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.primitives.bias import Bias
from server.primitives.delta import Delta
from server.primitives.lowrank import LowRank
from server.primitives.scale import Scale
from server.primitives.site import SiteShape, SiteValue

ROOT = "base_model.model."
WRAPPED_BIAS = "base_layer.bias"
BARE_BIAS = "bias"


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter does at one Linear, in fp32: y = (1 + excess_out) * W ((1 + excess_in) * x) + B A x + D x + bias.

    The base's own bias is added to that, unscaled. The method's scaling is already inside B and D.
    """

    A_RI: Tensor | None = None
    B_OR: Tensor | None = None
    excess_in_I: Tensor | None = None
    excess_out_O: Tensor | None = None
    bias_O: Tensor | None = None
    delta: Delta | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The tensors of one Linear, taken out one by one, and what they must fit."""

    module: str
    shape: SiteShape
    tensors: dict[str, Tensor]
    target: Target

    @property
    def inputs(self) -> int:
        return self.shape.in_features

    @property
    def outputs(self) -> int:
        return self.shape.out_features

    def take(self, part: str, *shape: int) -> Tensor:
        """In fp32. Raises: AdapterIncompatible when it is missing or of another shape."""
        tensor = self.tensors.pop(part, None)
        if tensor is None:
            raise AdapterIncompatible(f"{self.module} lacks {part}")
        expect(self.module, part, tensor, shape)
        return tensor.float()

    def weight(self) -> Tensor:
        """The base's own weight (O, I) in fp32."""
        return self.target.weight(self.module)

    def check_rank(self, rank: int) -> int:
        """Before anything of that size is made. Raises: AdapterIncompatible."""
        if rank > self.target.max_rank:
            raise AdapterIncompatible(f"rank {rank} of {self.module} is above max_rank {self.target.max_rank}")
        return rank


ChangeOf = Callable[[Found], Change]


def lower_linears(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target, *, change: ChangeOf
) -> Lowered:
    """Every Linear that the adapter has tensors for, changed as its family says and given its own bias."""
    modules = _by_module(tensors, target)
    trained = config.get("bias", "none")
    _demand_biases(trained, modules, target)
    sites = {}
    for module, found in modules.items():
        own = _own_bias(found, trained)
        made = change(found) if found.tensors or own is None else Change()
        if found.tensors:
            raise AdapterIncompatible(f"{module} has {' and '.join(sorted(found.tensors))}, which its config rules out")
        sites[module] = _site_value(made, own, target)
    return Lowered(sites)


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the module's name or its ending."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def expect(module: str, part: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise AdapterIncompatible(f"{part} of {module} has shape {list(tensor.shape)}, this base needs {list(shape)}")


def _by_module(tensors: Mapping[str, Tensor], target: Target) -> dict[str, Found]:
    """Tensors grouped by the Linear whose name begins theirs."""
    modules: dict[str, Found] = {}
    for name, tensor in tensors.items():
        if not name.startswith(ROOT):
            raise AdapterIncompatible(f"tensor {name} does not start with {ROOT}")
        module, _, part = name.removeprefix(ROOT).rpartition(".")
        while module and module not in target.sites:
            module, _, leaf = module.rpartition(".")
            part = f"{leaf}.{part}"
        if not module:
            raise AdapterIncompatible(f"tensor {name} belongs to no Linear of this base")
        found = modules.setdefault(module, Found(module, target.sites[module], {}, target))
        found.tensors[part] = tensor
    return modules


def _demand_biases(trained: str, modules: Mapping[str, Found], target: Target) -> None:
    """A config that has trained the base's biases brings all of those that it means."""
    if trained == "none":
        return
    for module, shape in target.sites.items():
        if shape.bias_O is None:
            continue
        found = modules.get(module)
        if found is None and trained == "all":
            raise AdapterIncompatible(f"{module} lacks {BARE_BIAS}: the adapter's bias is {trained}")
        if found is not None and not {WRAPPED_BIAS, BARE_BIAS} & found.tensors.keys():
            raise AdapterIncompatible(f"{module} lacks {WRAPPED_BIAS}: the adapter's bias is {trained}")


def _own_bias(found: Found, trained: str) -> Tensor | None:
    """What the adapter adds to the base's bias here; where its bias stands alone, nothing else may follow."""
    part = WRAPPED_BIAS if WRAPPED_BIAS in found.tensors else BARE_BIAS
    if trained == "none" or part not in found.tensors:
        return None
    base = found.shape.bias_O
    if base is None:
        raise AdapterIncompatible(f"{found.module} has {part}, but the base has no bias there")
    own = found.take(part, found.outputs).to(base.device) - base.float()
    if part == WRAPPED_BIAS and not found.tensors:
        raise AdapterIncompatible(f"{found.module} has {part} and nothing else")
    if part == BARE_BIAS and (found.tensors or trained != "all"):
        raise AdapterIncompatible(f"{found.module} has {part}, which its config rules out")
    return own


def _site_value(made: Change, own_bias_O: Tensor | None, target: Target) -> SiteValue:
    """On the device; a rank of zero is no low-rank term at all."""
    if own_bias_O is not None:
        both = own_bias_O if made.bias_O is None else made.bias_O.to(own_bias_O.device) + own_bias_O
        made = replace(made, bias_O=both)
    lowrank = None
    if made.A_RI is not None and made.B_OR is not None and made.A_RI.shape[0]:
        lowrank = LowRank(target.place(made.A_RI), target.place(made.B_OR))
    return SiteValue(
        scale_in=None if made.excess_in_I is None else Scale(target.place(made.excess_in_I)),
        scale_out=None if made.excess_out_O is None else Scale(target.place(made.excess_out_O)),
        lowrank=lowrank,
        bias=None if made.bias_O is None else Bias(target.place(made.bias_O)),
        delta=None if made.delta is None else target.place_delta(made.delta),
    )
