"""Factors that stay as the file has them: what must be seen of a file before they may, and after.

That all are numbers, for an infinity would reach every token of a batch: 0 * inf is none. A file is read through in one
pass and not tensor by tensor: most are so small that a look at each costs more than its values do. After: they are laid
out as they are read, A and B both rank by rank, in memory that holds nothing else of the file.
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


def laid_out(lowered: Lowered) -> Lowered:
    """The same, every low-rank term's A (R, I) and B (O, R) stored by rank and nothing with them."""
    beside = tuple(replace(part, sites=_laid_out(part.sites)) for part in lowered.beside)
    return replace(lowered, sites=_laid_out(lowered.sites), beside=beside)


def _terms(lowered: Lowered) -> Iterable[tuple[str, LowRank]]:
    for part in (lowered, *lowered.beside):
        for name, value in part.sites.items():
            if value.lowrank is not None:
                yield name, value.lowrank


def _laid_out(sites: Mapping[str, SiteValue]) -> Mapping[str, SiteValue]:
    made = {}
    for name, value in sites.items():
        if value.lowrank is not None:
            low = value.lowrank
            value = replace(value, lowrank=LowRank(_alone(low.A_RI), _alone(low.B_OR.t()).t(), low.scaling))
        made[name] = value
    return made


def _alone(tensor: Tensor) -> Tensor:
    """Contiguous, in memory of its own."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


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
