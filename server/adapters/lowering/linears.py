"""What an adapter changes at each Linear, as its kind says in the hub's table, becomes primitives of this server.

What the hub has validated is not trusted: every tensor must find its Linear and fit it, and every tensor must be used,
or the adapter is refused. Tensor names are PEFT's: `base_model.model.<module>.<part>`.
An adapter may also bring biases of the base's own, each whole: `<module>.base_layer.bias` where it adapts the module,
`<module>.bias` where it does not. What it does to such a bias is the difference.

R rank, I in, O out, N entries.
Source: peft 0.21.2, tuners/tuners_utils.py `_get_learnable_bias_state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from hub.base import Linear
from hub.errors import TensorsUnusable
from hub.families.change import Change, Entries, Found, Rotation
from hub.families.method import AtLinear, Part
from server.adapters.lowering.approximate import check_errors, closest, closest_kron
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.primitives import delta
from server.primitives.bias import Bias
from server.primitives.lowrank import LowRank
from server.primitives.rotate import Rotate
from server.primitives.scale import Scale
from server.primitives.site import SiteValue

ROOT = "base_model.model."
WRAPPED_BIAS = "base_layer.bias"
BARE_BIAS = "bias"


def lower_linears(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target, *, at: AtLinear) -> Lowered:
    """Every Linear that the adapter has tensors for, changed as its kind says and given its own bias."""
    modules = _by_module(tensors, target)
    trained = config.get("bias", "none")
    _demand_biases(trained, modules, target)
    sites = {}
    errors: dict[str, float] = {}
    for module, given in modules.items():
        own_O = _own_bias(module, given, trained, target)
        change = Change() if own_O is not None and not given else _change(config, module, given, target, at=at)
        if change.full_OI is not None or change.kron is not None:
            change, errors[module] = _of_low_rank(change, module, target)
        lowrank = _lowrank(change, given, target)
        sites[module] = _site_value(change, lowrank, own_O, module, target)
    return Lowered(sites, approximation=check_errors(errors, target))


def expect(module: str, part: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise AdapterIncompatible(f"{part} of {module} has shape {list(tensor.shape)}, this base needs {list(shape)}")


def _by_module(tensors: Mapping[str, Tensor], target: Target) -> dict[str, dict[str, Tensor]]:
    """Tensors grouped by the Linear whose name begins theirs."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not name.startswith(ROOT):
            raise AdapterIncompatible(f"tensor {name} does not start with {ROOT}")
        module, _, part = name.removeprefix(ROOT).rpartition(".")
        while module and module not in target.sites:
            module, _, leaf = module.rpartition(".")
            part = f"{leaf}.{part}"
        if not module:
            raise AdapterIncompatible(f"tensor {name} belongs to no Linear of this base")
        modules.setdefault(module, {})[part] = tensor
    return modules


def _demand_biases(trained: str, modules: Mapping[str, Mapping[str, Tensor]], target: Target) -> None:
    """A config that has trained the base's biases brings all of those that it means."""
    if trained == "none":
        return
    for module, shape in target.sites.items():
        if shape.bias_O is None:
            continue
        given = modules.get(module)
        if given is None and trained == "all":
            raise AdapterIncompatible(f"{module} lacks {BARE_BIAS}: the adapter's bias is {trained}")
        if given is not None and not {WRAPPED_BIAS, BARE_BIAS} & given.keys():
            raise AdapterIncompatible(f"{module} lacks {WRAPPED_BIAS}: the adapter's bias is {trained}")


def _own_bias(module: str, given: dict[str, Tensor], trained: str, target: Target) -> Tensor | None:
    """What the adapter adds to the base's bias, taken out; where that stands alone, nothing else may follow."""
    part = WRAPPED_BIAS if WRAPPED_BIAS in given else BARE_BIAS
    if trained == "none" or part not in given:
        return None
    shape = target.sites[module]
    if shape.bias_O is None:
        raise AdapterIncompatible(f"{module} has {part}, but the base has no bias there")
    own_O = given.pop(part)
    expect(module, part, own_O, (shape.out_features,))
    if part == WRAPPED_BIAS and not given:
        raise AdapterIncompatible(f"{module} has {part} and nothing else")
    if part == BARE_BIAS and (given or trained != "all"):
        raise AdapterIncompatible(f"{module} has {part}, which its config rules out")
    return own_O.float().to(shape.bias_O.device) - shape.bias_O.float()


def _change(
    config: Mapping[str, Any], module: str, given: Mapping[str, Tensor], target: Target, *, at: AtLinear
) -> Change:
    """What the kind makes of its tensors, when they are those that it demands of this Linear."""
    shape = target.sites[module]
    demanded = at.part(config, module, Linear(shape.in_features, shape.out_features))
    if demanded.rank is not None and demanded.rank > target.max_rank:
        raise AdapterIncompatible(f"rank {demanded.rank} of {module} is above max_rank {target.max_rank}")
    if demanded.complaint is not None:
        raise AdapterIncompatible(": ".join(demanded.complaint))
    read = {}
    for part, sizes in demanded.shapes.items():
        if part not in given:
            raise AdapterIncompatible(f"{module} lacks {part}")
        expect(module, part, given[part], sizes)
        read[part] = _read(module, part, given[part], demanded)
    if left := sorted(given.keys() - read.keys()):
        raise AdapterIncompatible(f"{module} has {' and '.join(left)}, which its config rules out")
    weight = partial(target.weight, module)
    found = Found(module, shape.in_features, shape.out_features, read, shape.bias_O, weight)
    try:
        return at.change(config, found)
    except TensorsUnusable as error:
        raise AdapterIncompatible(f"{module}: {error}") from error


def _read(module: str, part: str, tensor: Tensor, demanded: Part) -> Tensor:
    if part in demanded.integers:
        return _integers(module, part, tensor)
    return tensor if part in demanded.as_stored else tensor.float()


def _integers(module: str, part: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        raise AdapterIncompatible(f"{part} of {module} is {tensor.dtype}, places are whole numbers")
    return tensor.long()


def _of_low_rank(change: Change, module: str, target: Target) -> tuple[Change, float]:
    """A change of full rank as the closest term of low rank, and its error."""
    assert change.A_RI is None
    if change.kron is not None:
        A_RI, B_OR, error = closest_kron(*change.kron, module, target)
    else:
        assert change.full_OI is not None
        A_RI, B_OR, error = closest(change.full_OI, module, target)
    return replace(change, A_RI=A_RI, B_OR=B_OR, full_OI=None, kron=None), error


def _lowrank(change: Change, given: Mapping[str, Tensor], target: Target) -> LowRank | None:
    """On the device; a rank of zero is no low-rank term at all."""
    if change.A_RI is None or change.B_OR is None or not change.A_RI.shape[0]:
        return None
    if all(any(factor is tensor for tensor in given.values()) for factor in (change.A_RI, change.B_OR)):
        return target.place_stored(change.A_RI, change.B_OR, change.scaling)
    return LowRank(target.place(change.A_RI), target.place(change.B_OR * change.scaling))


def _site_value(
    change: Change, lowrank: LowRank | None, own_bias_O: Tensor | None, module: str, target: Target
) -> SiteValue:
    """On the device."""
    bias_O = change.bias_O
    if own_bias_O is not None:
        bias_O = own_bias_O if bias_O is None else bias_O.to(own_bias_O.device) + own_bias_O
    return SiteValue(
        scale_in=None if change.excess_in_I is None else Scale(target.place(change.excess_in_I)),
        scale_out=None if change.excess_out_O is None else Scale(target.place(change.excess_out_O)),
        lowrank=lowrank,
        bias=None if bias_O is None else Bias(target.place(bias_O)),
        delta=None if change.entries is None else _sparse(change.entries, module, target),
        rotate_in=None if change.rotate_in is None else _placed(change.rotate_in, target),
        rotate_out=None if change.rotate_out is None else _placed(change.rotate_out, target),
    )


def _placed(rotation: Rotation, target: Target) -> Rotate:
    """Stored as it is read: input by input."""
    return Rotate(target.place(rotation.excess_BSS.transpose(1, 2)).transpose(1, 2), rotation.stride)


def _sparse(entries: Entries, module: str, target: Target) -> delta.Delta:
    shape = target.sites[module]
    _check_places(module, "row", entries.rows_N, shape.out_features)
    _check_places(module, "column", entries.columns_N, shape.in_features)
    sizes = (shape.out_features, shape.in_features)
    return target.place_delta(delta.sparse(entries.rows_N, entries.columns_N, entries.values_N, shape=sizes))


def _check_places(module: str, what: str, places_N: Tensor, below: int) -> None:
    """Raises: AdapterIncompatible when one is outside."""
    if places_N.numel() and not 0 <= int(places_N.min()) <= int(places_N.max()) < below:
        outside = int(places_N.min()) if int(places_N.min()) < 0 else int(places_N.max())
        raise AdapterIncompatible(f"{module} has an entry in {what} {outside}, outside 0 to {below - 1}")
