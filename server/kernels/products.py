"""The base's own products, y = W x without a bias, as this machine computes them fastest.

A weight is packed once, when the base is loaded. What is chosen follows from what the processor has, never from a
timing, so that a base answers alike after every start (docs/performance.md has the timings behind the rule):
bf16 activations, on processors with a matrix unit (AMX): tiles, by a kernel of our own (native_tiles.h);
bf16 activations, on others with bf16 products: the library's own order of the weight (oneDNN);
fp32 activations of a checkpoint in bf16, on processors with vectors of 8 floats or more: the weight stays in its 16
bits, by a kernel of our own (native_panels.h);
fp32 activations of one in fp16: the same by FBGEMM. Without a kernel of ours it takes bf16, too, whose numbers are fp16
numbers but for those near zero, which round by 2^-25 at most; a weight that has others stays in fp32.

O out, I in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from server.kernels import native
from server.kernels.native import TILE, whole_tiles

HALF_STEP = 2.0**-25  # half of the distance of fp16's smallest numbers
TOKENS = TILE  # of the steps that the packing is made for


def with_rows(x_TI: Tensor, rows: int) -> Tensor:
    """(rows, I): x and behind it anything, without a copy where the memory behind it is its own (`empty_tiles`)."""
    tokens, inputs = x_TI.shape
    behind = x_TI.untyped_storage().nbytes() // x_TI.element_size() - x_TI.storage_offset()
    if x_TI.is_contiguous() and behind >= rows * inputs:
        return x_TI.as_strided((rows, inputs), (inputs, 1))
    return F.pad(x_TI, (0, 0, 0, rows - tokens))


class Product(Protocol):
    @property
    def bytes(self) -> int:
        """Memory that the weight takes."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        ...

    def weight(self) -> Tensor:
        """(O, I) in fp32, not to be written to."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    weight_OI: Tensor

    @property
    def bytes(self) -> int:
        return self.weight_OI.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_OI)

    def weight(self) -> Tensor:
        return self.weight_OI.float()


class Ordered:
    """bf16 in the order of oneDNN's own product."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.bytes = weight_OI.nbytes
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, TOKENS)

    def __call__(self, x: Tensor) -> Tensor:
        tokens = x.numel() // x.shape[-1]
        whole = whole_tiles(tokens)
        if x.dim() == 2 and tokens == whole:
            return self._multiply(x)
        y_TO = self._multiply(with_rows(x.reshape(-1, x.shape[-1]), whole))
        return y_TO[:tokens].view(*x.shape[:-1], y_TO.shape[1])

    def _multiply(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_TI, self._packed, None, "none", [], "")
        return y_TO

    def weight(self) -> Tensor:
        dense: Tensor = self._packed.to_dense()
        return dense.float()


class Tiled:
    """bf16 in the tiles of a matrix unit, in codes of twelve bits where the weight's exponents allow it."""

    def __init__(self, weight_OI: Tensor, *, in_codes: bool = True) -> None:
        self._outputs, self._inputs = weight_OI.shape
        coded = native.code(weight_OI) if in_codes else None
        self.packed = native.tile(weight_OI) if coded is None else coded
        self.bytes = self.packed.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return native.multiply(x, self.packed, self._outputs)
        return self(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self._outputs)

    def weight(self) -> Tensor:
        return native.untile(self.packed, self._outputs, self._inputs).float()


class Panels:
    """bf16 in memory, every bit of it, fp32 in the product and its result."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._outputs, self._inputs = weight_OI.shape
        self.packed = native.panel(weight_OI)
        self.bytes = self.packed.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return native.multiply_wide(x, self.packed, self._outputs)
        return self(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self._outputs)

    def weight(self) -> Tensor:
        return native.unpanel(self.packed, self._outputs, self._inputs).float()


class Half:
    """fp16 in memory, fp32 in the product and its result."""

    def __init__(self, weight_OI: Tensor) -> None:
        self.bytes = weight_OI.numel() * 2
        self._packed: Any = torch.ops.quantized.linear_prepack_fp16(weight_OI.float(), None)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return y

    def weight(self) -> Tensor:
        unpacked: Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        return unpacked.float()


def fastest(weight_OI: Tensor, activations: torch.dtype, stored: torch.dtype) -> Product:
    """The product of a weight. `stored` is the dtype of the checkpoint, from which it may have been widened."""
    if weight_OI.device.type == "cpu":
        if activations == torch.bfloat16 and native.has_tiles() and native.fits_tiles(weight_OI.shape[1], activations):
            return Tiled(weight_OI)
        if activations == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return Ordered(weight_OI)
        if activations == torch.float32 and stored == torch.bfloat16 and native.has_panels():
            narrow_OI = weight_OI.bfloat16()
            if torch.equal(narrow_OI.float(), weight_OI):  # it has been widened, and no more than that
                return Panels(narrow_OI)
        if activations == torch.float32 and stored != torch.float32 and fits_half(weight_OI):
            return Half(weight_OI)
    return Plain(weight_OI)


def fits_half(weight_OI: Tensor) -> bool:
    """Whether FBGEMM is there, and fp16 holds every number of the weight."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    off = weight_OI.half().float().sub_(weight_OI.float()).abs_().max()
    return bool(off <= HALF_STEP)  # an infinity is off by infinity, no number by none
