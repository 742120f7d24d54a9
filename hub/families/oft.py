"""OFT: blocks of a Linear's input are rotated before the base's product, y = W R x.

Each block is the Cayley transform of a skew-symmetric matrix Q, of which the upper triangle is learned:
(I - Q)(I + Q)^-1, or the first terms of its Neumann series. PEFT leaves the factor 2 of the last of them away, and
makes four of three. In its constrained form (COFT) a Q that is longer than eps / sqrt(blocks) is cut to that length.
PEFT turns a size of blocks that does not divide the inputs into the nearest that does, with a warning; so do we. The
Cayley-Neumann series of PEFT before 0.18 was another one: a file that may be of those is refused.

B blocks, S block size, N entries of an upper triangle.
Source: Qiu et al. 2023 (arXiv:2306.07280); Qiu et al. 2025 (arXiv:2506.19847); peft 0.21.2, tuners/oft/config.py and
layer.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hub import fields
from hub.base import Linear
from hub.families.change import Change, Found, Rotation, identity
from hub.families.linears import TARGETS, bias_field, divisors, linear_method
from hub.families.method import Complaint, Config, Field, Part
from hub.ref import printable

if TYPE_CHECKING:
    from torch import Tensor

NEUMANN_SINCE = (0, 18)

FIELDS: Mapping[str, Field] = {
    **TARGETS,
    "r": Field(fields.whole, shapes_tensors=True),
    "oft_block_size": Field(fields.whole, shapes_tensors=True),
    "block_share": Field(fields.boolean, shapes_tensors=True),
    "use_cayley_neumann": Field(fields.boolean),
    "num_cayley_neumann_terms": Field(fields.positive),
    "coft": Field(fields.boolean),
    "eps": Field(fields.number),
    "bias": bias_field("oft_only"),
    "fan_in_fan_out": Field(fields.boolean),  # of Conv1D layers, on which PEFT has no OFT
    # Inert: they act while training, or before it.
    "module_dropout": Field(fields.number),
    "init_weights": Field(fields.boolean),
}


def _block_size(config: Config, inputs: int) -> int:
    """By the size of the blocks, or by their count `r`: one of them is 0."""
    size: int = config["oft_block_size"]
    return fitting(inputs, size) if size else inputs // fitting(inputs, config.get("r", 0) or 1)


def fitting(inputs: int, wanted: int) -> int:
    """The divisor that is nearest, the smaller of two; all of it when more is wanted."""
    if wanted >= inputs:
        return inputs
    return min(divisors(inputs), key=lambda one: (abs(one - wanted), one))


def _part(config: Config, module: str, linear: Linear) -> Part:
    size = _block_size(config, linear.inputs)
    blocks = 1 if config.get("block_share") else linear.inputs // size
    return Part({"oft_R.weight": (blocks, size * (size - 1) // 2)})


def _change(config: Config, found: Found) -> Change:
    """x += (R - I) x, in fp64 until the end."""
    size = _block_size(config, found.inputs)
    Q_BSS = _skew(found.tensors["oft_R.weight"].double(), size)
    if config.get("coft"):
        Q_BSS = _constrained(Q_BSS, config.get("eps", 6e-5))
    terms = config.get("num_cayley_neumann_terms", 5)
    R_BSS = neumann(Q_BSS, terms) if config["use_cayley_neumann"] else cayley(Q_BSS)
    excess_BSS = (R_BSS - identity(size, R_BSS)).transpose(1, 2)  # PEFT's x is a row: x' = x R
    return Change(rotate_in=Rotation(excess_BSS.expand(found.inputs // size, -1, -1).float()))


def cayley(Q_BSS: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1 = 2 (I + Q)^-1 - I: never singular, for Q has no real eigenvalues but 0."""
    eye_SS = identity(Q_BSS.shape[-1], Q_BSS)
    return 2 * (eye_SS + Q_BSS).inverse() - eye_SS


def neumann(Q_BSS: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + Q^last: with five terms last is 4, with four or three it is 3."""
    R_BSS = identity(Q_BSS.shape[-1], Q_BSS).expand_as(Q_BSS)
    last = max(terms - 1, 3) if terms > 2 else terms - 1
    power_BSS = Q_BSS
    for exponent in range(1, last + 1):
        R_BSS = R_BSS + power_BSS * (1 if exponent == last and last > 2 else 2)
        power_BSS = power_BSS @ Q_BSS
    return R_BSS


def _skew(upper_BN: Tensor, size: int) -> Tensor:
    rows_N, columns_N = upper_BN.new_ones(size, size).triu(1).nonzero().unbind(1)  # row by row
    Q_BSS = upper_BN.new_zeros(len(upper_BN), size, size)
    Q_BSS[:, rows_N, columns_N] = upper_BN
    return Q_BSS - Q_BSS.transpose(1, 2)


def _constrained(Q_BSS: Tensor, eps: float) -> Tensor:
    limit = eps / math.sqrt(len(Q_BSS))
    lengths_B11 = Q_BSS.norm(dim=(1, 2), keepdim=True)
    return Q_BSS.where(lengths_B11 <= limit, limit * (Q_BSS / lengths_B11))


def _contradictions(config: Config) -> list[Complaint]:
    found: list[Complaint] = []
    count, size = config.get("r", 0), config.get("oft_block_size")
    if type(count) is int and type(size) is int and (count == 0) == (size == 0):
        found.append(("oft_block_size", f"{size} beside r {count}: exactly one of the two must be 0"))
    if config.get("use_cayley_neumann") is True and not _neumann_is_known(config.get("peft_version")):
        made = printable(str(config.get("peft_version") or "missing"))
        found.append(
            ("use_cayley_neumann", f"true is another series before PEFT 0.18; peft_version is {made}: train it anew")
        )
    return found


def _neumann_is_known(version: object) -> bool:
    match = re.match(r"(\d{1,6})\.(\d{1,6})", str(version))
    return match is not None and (int(match[1]), int(match[2])) >= NEUMANN_SINCE and "0.18.0.dev" not in str(version)


OFT = linear_method(
    "oft",
    "OFT",
    FIELDS,
    required=("oft_block_size", "use_cayley_neumann", "target_modules"),
    part=_part,
    change=_change,
    contradictions=_contradictions,
)
