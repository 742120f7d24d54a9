"""What an adapter changes at one Linear, and what a kind is given to tell it: the words that hub and server share.

A kind says in its own file what its tensors mean. It never imports torch: a server hands it tensors, and it calls their
methods. So what may be pushed and what it computes stand side by side, and the hub runs without torch (decision 22).

R rank, I in, O out, N entries; B blocks, S their size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Found:
    """One Linear of the base that is served, and the adapter's tensors there.

    They have the shapes that the kind's `Part` demands, and are in fp32; integers, as `Part` names them, in 64 bits;
    what `Part` names as taken as stored, in the dtype of its file.
    `weight` gives the base's own (O, I), in fp32, as the server multiplies with it; it may be on another device.
    """

    module: str
    inputs: int
    outputs: int
    tensors: Mapping[str, Tensor]  # by what stands behind the module's name
    bias_O: Tensor | None  # the base's own
    weight: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Rotation:
    """M - I by blocks, of which row o is what feature o of a block gains. A block takes its features `stride` apart."""

    excess_BSS: Tensor
    stride: int = 1


@dataclass(frozen=True, slots=True)
class Entries:
    """A sparse matrix: values_N at (rows_N, columns_N). Entries of one place add."""

    rows_N: Tensor
    columns_N: Tensor
    values_N: Tensor


@dataclass(frozen=True, slots=True)
class Change:
    """y = M_out (1 + excess_out) * W M_in (1 + excess_in) * x + s B A x + D x + bias; what is None is not there.

    The base's own bias is added to that, unscaled and unturned. The method's scaling is s (`scaling`) or inside B, and
    it is inside D. On one side there is a scale or a rotation. D is sparse (`entries`), or of full rank: a matrix
    (`full_OI`) or the Kronecker product of two (`kron`), of which a server makes the closest low-rank term and measures
    the error.
    """

    A_RI: Tensor | None = None
    B_OR: Tensor | None = None
    scaling: float = 1.0
    excess_in_I: Tensor | None = None
    excess_out_O: Tensor | None = None
    rotate_in: Rotation | None = None
    rotate_out: Rotation | None = None
    bias_O: Tensor | None = None
    entries: Entries | None = None
    full_OI: Tensor | None = None
    kron: tuple[Tensor, Tensor] | None = None


def identity(size: int, like: Tensor) -> Tensor:
    """The unit matrix, in the dtype of another tensor and on its device."""
    return like.new_zeros(size, size).fill_diagonal_(1)
