"""A change of full rank as the closest one of low rank, with the error that is measured, and the limit on it.

The smallest rank that keeps the error at or below the operator's limit, up to max_rank. The error is of the matrix, in
the Frobenius norm and relative to it, and is measured on the two factors before they are rounded to the base's dtype,
as every kind's are.

R rank, O out, I in, N singular values.
Source: Eckart and Young 1936: the truncated singular value decomposition is the closest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from server.adapters.lowering.target import Target
from server.errors import AdapterIncompatible

ROUNDING = 1e-5  # what fp32 leaves of a matrix that is of low rank: below it, an approximation is exact


def closest(delta_OI: Tensor, module: str, target: Target) -> tuple[Tensor, Tensor, float]:
    """A (R, I), B (O, R) and the error of B A. Raises: AdapterIncompatible on what is no finite number."""
    delta_OI = delta_OI.to(target.device)
    if not delta_OI.isfinite().all():
        raise AdapterIncompatible(f"the change of {module} is no finite number in fp32")
    U_ON, values_N, V_NI = torch.linalg.svd(delta_OI, full_matrices=False)
    rank = smallest_rank(values_N, target)
    roots_R = values_N[:rank].sqrt()
    A_RI, B_OR = roots_R[:, None] * V_NI[:rank], U_ON[:, :rank] * roots_R
    return A_RI, B_OR, relative_error(delta_OI, A_RI, B_OR)


def closest_kron(w1: Tensor, w2: Tensor, module: str, target: Target) -> tuple[Tensor, Tensor, float]:
    """As `closest`, of the Kronecker product of two matrices.

    Its singular values are the products of theirs, so that both are decomposed and never the whole. Where the two are
    of low rank, so is their product, and nothing is lost.
    """
    w1, w2 = w1.to(target.device), w2.to(target.device)
    if not (w1.isfinite().all() and w2.isfinite().all()):
        raise AdapterIncompatible(f"the change of {module} is no finite number in fp32")
    U1, values1, V1 = torch.linalg.svd(w1, full_matrices=False)
    U2, values2, V2 = torch.linalg.svd(w2, full_matrices=False)
    values, places = (values1[:, None] * values2).flatten().sort(descending=True, stable=True)
    kept = places[: smallest_rank(values, target)]
    one, two = kept // len(values2), kept % len(values2)
    roots_R = values[: len(kept)].sqrt()
    A_RI = (V1[one][:, :, None] * V2[two][:, None, :]).flatten(1) * roots_R[:, None]
    B_OR = (U1[:, None, one] * U2[None, :, two]).flatten(0, 1) * roots_R
    return A_RI, B_OR, relative_error(torch.kron(w1, w2), A_RI, B_OR)


def smallest_rank(values_N: Tensor, target: Target) -> int:
    """The number of singular values, in falling order, after which what is left is small enough; max_rank at most."""
    left_N = values_N.double().square().flip(0).cumsum(0).flip(0).sqrt()
    limit = max(target.max_delta_error, ROUNDING) * (left_N[0].item() if len(left_N) else 0.0)
    return min(int((left_N > limit).sum()), target.max_rank)


def relative_error(delta_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> float:
    """Measured on the product itself."""
    norm = delta_OI.norm().item()
    return (delta_OI - B_OR @ A_RI).norm().item() / norm if norm else 0.0


def check_errors(errors: Mapping[str, float], target: Target) -> float | None:
    """The largest; None where nothing was approximated. Raises: AdapterIncompatible above the limit."""
    if not errors:
        return None
    worst = max(errors, key=errors.__getitem__)
    limit = max(target.max_delta_error, ROUNDING)
    if errors[worst] > limit:
        raise AdapterIncompatible(
            f"its change of {worst} has full rank: of rank {target.max_rank} (max_rank) the closest is off by "
            f"{errors[worst]:.2g} of it, above max_delta_error {target.max_delta_error:g}"
        )
    return errors[worst]
