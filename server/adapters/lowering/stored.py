"""Factors that stay as the file has them: what must be seen of a file before they may, and after.

That all are numbers, for an infinity would reach every token of a batch: 0 * inf is none. A file is read through in one
pass and not tensor by tensor: most are so small that a look at each costs more than its values do. And that factors
which lie in the memory of the whole file do not keep much there that nobody reads any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.primitives.lowrank import LowRank
from server.primitives.site import SiteValue

MOST_KEPT = 1.05  # memory of a file over what is used of it, above which the used is copied out


def check_finite(tensors: Mapping[str, Tensor]) -> float:
    """The largest absolute value of all. Raises: AdapterIncompatible."""
    weights = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    found = max(map(_largest, _runs(weights.values())), default=0.0)
    if math.isfinite(found):
        return found
    for name, tensor in weights.items():  # a run may hold what is no weight
        if not math.isfinite(_largest(tensor)):
            raise AdapterIncompatible(f"{name} holds a value that is no finite number in {tensor.dtype}")
    return max(map(_largest, weights.values()))


def check_scaled(lowered: Lowered, largest: float, target: Target) -> None:
    """That B times a scaling beside it is finite; `largest` is that of the file. Raises: AdapterIncompatible."""
    top = torch.finfo(target.dtype).max
    for name, low in _terms(lowered):
        if abs(low.scaling) * largest > top and not low.scaled(target.dtype).isfinite().all():
            raise AdapterIncompatible(
                f"a value of {_largest(low.B_OR):.2g} at {name}, times {low.scaling:g}, is no finite number in "
                f"{target.dtype}"
            )


def compacted(lowered: Lowered) -> Lowered:
    """The same, its low-rank terms copied out of the memory that they lie in where that is mostly something else."""
    factors = [tensor for _, low in _terms(lowered) for tensor in (low.A_RI, low.B_OR)]
    whole = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in factors)}
    if sum(whole.values()) <= MOST_KEPT * sum(tensor.nbytes for tensor in factors):
        return lowered
    beside = tuple(replace(part, sites=_copied(part.sites)) for part in lowered.beside)
    return replace(lowered, sites=_copied(lowered.sites), beside=beside)


def _terms(lowered: Lowered) -> Iterable[tuple[str, LowRank]]:
    for part in (lowered, *lowered.beside):
        for name, value in part.sites.items():
            if value.lowrank is not None:
                yield name, value.lowrank


def _copied(sites: Mapping[str, SiteValue]) -> Mapping[str, SiteValue]:
    return {
        name: value
        if value.lowrank is None
        else replace(
            value, lowrank=LowRank(value.lowrank.A_RI.clone(), value.lowrank.B_OR.clone(), value.lowrank.scaling)
        )
        for name, value in sites.items()
    }


def _runs(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Flat tensors that hold all values of those given: one for each dtype in each piece of memory.

    What lies between two tensors of a piece is read as well.
    """
    bounds: dict[tuple[int, torch.dtype], tuple[Tensor, int, int]] = {}
    apart = []
    for tensor in tensors:
        if not tensor.is_contiguous():
            apart.append(tensor)
            continue
        key = tensor.untyped_storage().data_ptr(), tensor.dtype
        first = int(tensor.storage_offset())
        end = first + tensor.numel()
        _, low, high = bounds.get(key, (tensor, first, end))
        bounds[key] = tensor, min(low, first), max(high, end)
    return apart + [one.as_strided((high - low,), (1,), low) for one, low, high in bounds.values()]


def _largest(tensor: Tensor) -> float:
    """Not finite when any value is not."""
    low, high = tensor.aminmax()
    return max(abs(low.item()), abs(high.item()))
