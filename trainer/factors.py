"""A low-rank matrix as its two factors, M = B A: sums, norms, distances and truncations; sums never build M.

All of it is computed in fp64 and handed back in fp32, which is how an adapter is stored. A rank is chosen from the
squared singular values, largest first, by a Chooser.

R rank, O out, I in.
Laws: the sum of factors is the sum of their matrices; a truncation to rank r is the nearest matrix of that rank.
Source: Eckart and Young 1936; Halko, Martinsson and Tropp 2011 (arXiv:0909.4061) for `factorise`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# Below this share of the largest singular value fp32 holds nothing of a matrix.
ROUNDING: Final = torch.finfo(torch.float32).eps
# Below this share of its parts a sum is what fp64 leaves of parts that cancel each other out.
CANCELLED: Final = 2.0**-40
OVERSAMPLING: Final = 8
PROBE_SEED: Final = 0  # what is found does not depend on it, only its last bits

# From the squared singular values, largest first, to how many of them are kept.
Chooser = Callable[[Tensor], int]


@dataclass(frozen=True, slots=True)
class Factors:
    A_RI: Tensor
    B_OR: Tensor

    @property
    def rank(self) -> int:
        return self.A_RI.shape[0]

    def dense(self) -> Tensor:
        """(O, I), in fp64."""
        return self.B_OR.double() @ self.A_RI.double()


def weighted(weight: float, factors: Factors) -> Factors:
    return Factors(factors.A_RI, factors.B_OR.double() * weight)


def concatenate(terms: Sequence[Factors]) -> Factors:
    """The sum of the matrices, exactly: their ranks side by side."""
    A_RI = torch.cat([term.A_RI.double() for term in terms])
    return Factors(A_RI, torch.cat([term.B_OR.double() for term in terms], dim=1))


def whole(M_OI: Tensor) -> Factors:
    """A matrix of any rank, itself as one factor and the unit matrix as the other."""
    unit = torch.eye(min(M_OI.shape), dtype=M_OI.dtype, device=M_OI.device)
    return Factors(M_OI, unit) if M_OI.shape[0] <= M_OI.shape[1] else Factors(unit, M_OI)


def stored(factors: Factors) -> Factors:
    """As a file holds it: fp32, contiguous."""
    return Factors(factors.A_RI.float().contiguous(), factors.B_OR.float().contiguous())


def norm(factors: Factors) -> float:
    """Frobenius."""
    _, core, _ = _core(factors)
    return float(torch.linalg.matrix_norm(core))


def distance(one: Factors, other: Factors) -> float:
    """Frobenius norm of the difference."""
    return norm(concatenate([one, weighted(-1.0, other)]))


def compress(factors: Factors, choose: Chooser) -> Factors:
    """The nearest matrix of the rank that is chosen."""
    left_OK, core, right_IK = _core(factors)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    parts = torch.linalg.matrix_norm(factors.B_OR) * torch.linalg.matrix_norm(factors.A_RI)
    rank = choose(S.where(S.gt(CANCELLED * parts), 0).square())
    root = S[:rank].sqrt()
    return Factors((right_IK @ Vh[:rank].mT).mT * root[:, None], (left_OK @ U[:, :rank]) * root)


def compress_dense(M_OI: Tensor, choose: Chooser) -> Factors:
    """The nearest matrix of the rank that is chosen, by the eigenvectors of the smaller Gram matrix.

    A quarter of the time of a singular value decomposition; what it loses lies below ROUNDING.
    """
    M_OI = M_OI.double()
    wide = M_OI.shape[0] <= M_OI.shape[1]
    squares, vectors = torch.linalg.eigh(M_OI @ M_OI.mT if wide else M_OI.mT @ M_OI)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    rank = choose(squares)
    root, vectors = squares[:rank].pow(0.25), vectors[:, :rank]
    if wide:
        return Factors((vectors.mT @ M_OI) / root[:, None], vectors * root)
    return Factors(vectors.mT * root[:, None], (M_OI @ vectors) / root)


def factorise(M_OI: Tensor, rank: int) -> Factors | None:
    """The factors of a matrix that has at most this rank; None when it has more."""
    M_OI = M_OI.double()
    generator = torch.Generator().manual_seed(PROBE_SEED)
    probes = torch.randn(M_OI.shape[1], rank + OVERSAMPLING, generator=generator, dtype=torch.float64)
    basis_OK, _ = torch.linalg.qr(M_OI @ probes.to(M_OI.device))
    found = compress(Factors(basis_OK.mT @ M_OI, basis_OK), at_most(rank))
    lost = torch.linalg.matrix_norm(M_OI - found.dense())
    # A matrix that fp32 arithmetic made is of its rank up to rounding only.
    return found if lost <= ROUNDING * max(M_OI.shape) * torch.linalg.matrix_norm(M_OI) else None


def everything(squares: Tensor) -> int:
    """As many as fp32 can hold."""
    return int((squares > ROUNDING**2 * squares[:1]).sum())


def at_most(rank: int) -> Chooser:
    return lambda squares: min(rank, everything(squares))


def share_of_energy(share: float, *, limit: int) -> Chooser:
    """The fewest that hold this share of the squared norm, and never more than the limit."""

    def choose(squares: Tensor) -> int:
        kept = squares.cumsum(0)
        enough = int((kept < share * kept[-1]).sum()) + 1
        return min(enough, limit, everything(squares))

    return choose


def _core(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """M = left @ core @ right^T with orthonormal columns on both sides."""
    left_OK, upper_KR = torch.linalg.qr(factors.B_OR.double())
    right_IK, lower_KR = torch.linalg.qr(factors.A_RI.double().mT)
    return left_OK, upper_KR @ lower_KR.mT, right_IK
