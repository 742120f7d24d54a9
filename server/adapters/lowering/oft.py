"""OFT: a Linear's input is rotated in blocks before the base's product, y = W R x.

Each block is the Cayley transform of a skew-symmetric matrix Q, of which the upper triangle is learned:
(I - Q)(I + Q)^-1, or the first terms of its Neumann series. PEFT leaves the factor 2 of the last of them away, and
makes four of three. In its constrained form (COFT) a Q that is longer than eps / sqrt(blocks) is cut to that length.

B blocks, S block size, N entries of an upper triangle, I in.
Source: Qiu et al. 2023 (arXiv:2306.07280); Qiu et al. 2025 (arXiv:2506.19847); peft 0.21.2, tuners/oft/layer.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering.linears import Change, Found, lower_linears
from server.adapters.lowering.target import Lowered, Target
from server.primitives.rotate import Rotate


def lower_oft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """x += (R - I) x, in fp64 until it is placed."""
    shared = bool(config.get("block_share"))

    def change(found: Found) -> Change:
        size = _block_size(config, found.inputs)
        blocks = 1 if shared else found.inputs // size
        Q_BSS = _skew(found.take("oft_R.weight", blocks, size * (size - 1) // 2).double(), size)
        if config.get("coft"):
            Q_BSS = _constrained(Q_BSS, float(config.get("eps", 6e-5)))
        if config["use_cayley_neumann"]:
            R_BSS = neumann(Q_BSS, int(config.get("num_cayley_neumann_terms", 5)))
        else:
            R_BSS = cayley(Q_BSS)
        # PEFT's x is a row: x' = x R.
        excess_BSS = (R_BSS - torch.eye(size, dtype=R_BSS.dtype)).transpose(1, 2)
        return Change(rotate_in=Rotate(excess_BSS.expand(found.inputs // size, -1, -1).float()))

    return lower_linears(config, tensors, target, change=change)


def cayley(Q_BSS: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1: never singular, for Q has no real eigenvalues but 0."""
    eye_SS = torch.eye(Q_BSS.shape[-1], dtype=Q_BSS.dtype)
    return torch.linalg.solve(eye_SS + Q_BSS, eye_SS - Q_BSS, left=False)


def _skew(upper_BN: Tensor, size: int) -> Tensor:
    rows, columns = torch.triu_indices(size, size, 1)
    Q_BSS = upper_BN.new_zeros(upper_BN.shape[0], size, size)
    Q_BSS[:, rows, columns] = upper_BN
    return Q_BSS - Q_BSS.transpose(1, 2)


def _constrained(Q_BSS: Tensor, eps: float) -> Tensor:
    limit = eps / math.sqrt(Q_BSS.shape[0])
    lengths_B11 = Q_BSS.norm(dim=(1, 2), keepdim=True)
    return torch.where(lengths_B11 <= limit, Q_BSS, limit * (Q_BSS / lengths_B11))


def neumann(Q_BSS: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + Q^last: with five terms last is 4, with four or three it is 3."""
    R_BSS = torch.eye(Q_BSS.shape[-1], dtype=Q_BSS.dtype).expand_as(Q_BSS)
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    power_BSS = Q_BSS
    for exponent in range(1, last + 1):
        R_BSS = R_BSS + power_BSS * (1 if exponent == last and last > 2 else 2)
        power_BSS = power_BSS @ Q_BSS
    return R_BSS


def _block_size(config: Mapping[str, Any], inputs: int) -> int:
    size = int(config["oft_block_size"])
    return fitting(inputs, size) if size else inputs // fitting(inputs, int(config["r"]))


def fitting(inputs: int, wanted: int) -> int:
    """PEFT's rule: the nearest divisor, the smaller of two; all of it when more is wanted."""
    divisors = [one for one in range(1, inputs + 1) if inputs % one == 0]
    return inputs if wanted >= inputs else min(divisors, key=lambda one: (abs(one - wanted), one))
