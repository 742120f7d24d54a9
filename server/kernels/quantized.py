"""Weights of the base in few bits, and their products on a CPU.

`Rows` is int8: a scale per output. With AMX or VNNI bytes are multiplied by bytes, so activations become bytes, too,
with a scale per token: a token's answer does not depend on its neighbours. On other processors weights are widened in
registers (native_panels.h), and activations stay as they are. Where our kernels are not built there is FBGEMM, whose
products of two bytes are added in 16 bits, which saturate: weights then keep to 7 bits (255 * 63 * 2 < 2^15), not
activations, whose range the outliers set (docs/bases.md has the figures of both).

`Coded` has a table of 16 levels (NF4; 0 to 15 for GPTQ and AWQ), and scales, with offsets where zero is no level, for
groups of inputs; or float8 numbers and a scale per output. Activations stay as they are: a few outputs' weights are
widened at a time, and multiplied with all tokens.

O out, I in, T tokens, G groups of inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from server.kernels import native
from server.kernels.native import whole_tiles
from server.kernels.products import Product

BYTE = 127  # the largest code of eight bits
SEVEN_BITS = 63
MIDDLE = 128  # the unsigned byte that stands for zero
BLOCK = 32  # inputs whose codes of 4 bits lie together: the first half in the low halves of 16 bytes
TILE = 1024  # outputs that are widened at a time without the native kernels
FLOAT8 = torch.float8_e4m3fn
SMALLEST = torch.finfo(torch.float32).tiny  # instead of a scale of zero


class Held(Protocol):
    """The weight of a Linear in few bits, before it is a product."""

    def weight(self) -> Tensor:
        """(O, I) in fp32: exactly what is multiplied with."""
        ...

    def reference(self, x: Tensor) -> Tensor:
        """The product by plain operations on the widened weight, with all that `product` rounds."""
        ...

    def kin(self) -> Hashable:
        """Weights of equal kin can be held side by side."""
        ...

    def product(self, others: Sequence[Any]) -> Product:
        """Of this weight and of others of its kin, below it."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    codes_OI: Tensor  # int8
    scales_O: Tensor  # fp32

    def weight(self) -> Tensor:
        return self.codes_OI.float().mul_(self.scales_O[:, None])

    def reference(self, x: Tensor) -> Tensor:
        if in_panels():
            return F.linear(x.float(), self.weight()).to(x.dtype)
        scaled, scales = _scaled(x)
        return F.linear(scaled.round_() * scales, self.weight()).to(x.dtype)

    def kin(self) -> Hashable:
        return "int8"

    def product(self, others: Sequence[Rows]) -> Product:
        parts = [self, *others]
        whole = Rows(torch.cat([part.codes_OI for part in parts]), torch.cat([part.scales_O for part in parts]))
        if native.has_tiles() and native.fits_tiles(whole.codes_OI.shape[1], torch.int8):
            return Int8Tiled(whole)
        if has_ordered_bytes():
            return Int8Ordered(whole)
        if in_panels():
            return Int8Panels(whole)
        return Int8(whole) if has_fbgemm() else Int8Plain(whole)


def has_ordered_bytes() -> bool:
    """Whether oneDNN multiplies bytes in 32 bits here, and there are native kernels to make them."""
    return native.LIBRARY is not None and torch.cpu._is_vnni_supported()


def in_panels() -> bool:
    """Whether bytes are widened here, and activations not rounded."""
    return native.has_panels() and not native.has_tiles() and not has_ordered_bytes()


def has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def largest_code() -> int:
    """Of an int8 weight on this machine."""
    return SEVEN_BITS if has_fbgemm() and not torch.cpu._is_vnni_supported() and not native.has_panels() else BYTE


def round_rows(weight_OI: Tensor, largest: int) -> Rows:
    """Symmetric; to the nearest code."""
    weight_OI = weight_OI.float()
    scales_O = (weight_OI.abs().amax(1) / largest).clamp_(min=SMALLEST)
    return Rows((weight_OI / scales_O[:, None]).round_().to(torch.int8), scales_O)


class Int8Tiled:
    """In the tiles of a matrix unit. A token with a number that is none answers with such numbers alone."""

    def __init__(self, rows: Rows) -> None:
        self._inputs = rows.codes_OI.shape[1]
        self.packed = native.tile(rows.codes_OI)
        self.scales_O = rows.scales_O.contiguous()
        self.sums_O = rows.codes_OI.sum(1, dtype=torch.int32) * MIDDLE
        self.bytes = self.packed.nbytes + self.scales_O.nbytes + self.sums_O.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        codes_TI, scales_T = native.round_rows(x.reshape(-1, x.shape[-1]), least=SMALLEST)
        y_TO = native.multiply_bytes(codes_TI, scales_T, self.packed, self.scales_O, self.sums_O, x.dtype)
        return y_TO.view(*x.shape[:-1], y_TO.shape[1])

    def weight(self) -> Tensor:
        return native.untile(self.packed, len(self.scales_O), self._inputs).float() * self.scales_O[:, None]


class Int8Ordered:
    """In oneDNN's own order. A token with a number that is none answers with such numbers alone, and no other does."""

    def __init__(self, rows: Rows) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(rows.codes_OI, None)
        self._scales_O = rows.scales_O
        self._zeros_O = torch.zeros(len(rows.scales_O), dtype=torch.long)
        self.bytes = rows.codes_OI.nbytes + rows.scales_O.nbytes + self._zeros_O.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        tokens = x_TI.shape[0]
        codes_TI, scales_T = native.round_rows(x_TI, least=SMALLEST, room=whole_tiles(tokens))
        y_TO = torch.ops.onednn.qlinear_pointwise(
            *(codes_TI, 1.0, MIDDLE),
            *(self._packed, self._scales_O, self._zeros_O, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return native.scale_rows(y_TO[:tokens], scales_T, x.dtype).view(*x.shape[:-1], y_TO.shape[1])

    def weight(self) -> Tensor:
        codes_IO: Tensor = self._packed.to_dense()
        return codes_IO.t().float() * self._scales_O[:, None]


class Int8Panels:
    """Bytes in memory, fp32 in the product: activations are not rounded."""

    def __init__(self, rows: Rows) -> None:
        self._inputs = rows.codes_OI.shape[1]
        self.packed = native.panel(rows.codes_OI)
        self.scales_O = rows.scales_O.contiguous()
        self.bytes = self.packed.nbytes + self.scales_O.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1]).float()
        y_TO = native.multiply_wide(x_TI, self.packed, len(self.scales_O), self.scales_O)
        return y_TO.to(x.dtype).view(*x.shape[:-1], y_TO.shape[1])

    def weight(self) -> Tensor:
        return native.unpanel(self.packed, len(self.scales_O), self._inputs).float() * self.scales_O[:, None]


class Int8:
    """By FBGEMM. A token that has a number that is none answers with such numbers alone, and no other does."""

    def __init__(self, rows: Rows) -> None:
        self.bytes = rows.codes_OI.nbytes + 3 * rows.scales_O.nbytes  # scales, offsets and sums of the rows
        zeros_O = torch.zeros(len(rows.scales_O), dtype=torch.long)
        with warnings.catch_warnings():  # torch means to give these tensors up: `Int8Plain` is what is left then
            warnings.simplefilter("ignore", UserWarning)
            weight = torch._make_per_channel_quantized_tensor(rows.codes_OI, rows.scales_O.double(), zeros_O, 0)
        self._packed: Any = torch.ops.quantized.linear_prepack(weight, None)

    def __call__(self, x: Tensor) -> Tensor:
        scaled, scales = _scaled(x)
        y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(scaled, 1.0, MIDDLE, self._packed)
        return y.mul_(scales).to(x.dtype)

    def weight(self) -> Tensor:
        held = torch.ops.quantized.linear_unpack(self._packed)[0]
        codes: Tensor = held.int_repr()
        return codes.float() * held.q_per_channel_scales().float()[:, None]


class Int8Plain:
    """The same by torch's own products of bytes, which are slow on most processors."""

    def __init__(self, rows: Rows) -> None:
        self.bytes = rows.codes_OI.nbytes + rows.scales_O.nbytes
        self._rows = rows
        self._codes_IO = rows.codes_OI.t()
        if rows.codes_OI.shape[1] == 1:  # the product misreads one row whose strides are both 1
            self._codes_IO = self._codes_IO.clone(memory_format=torch.contiguous_format)

    def __call__(self, x: Tensor) -> Tensor:
        scaled, scales = _scaled(x)
        flat = scaled.round_().reshape(-1, x.shape[-1]).to(torch.int8)
        y = torch._int_mm(flat, self._codes_IO).float().mul_(self._rows.scales_O)
        return y.view(*x.shape[:-1], y.shape[1]).mul_(scales).to(x.dtype)

    def weight(self) -> Tensor:
        return self._rows.weight()


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in codes that are not rounded yet, and each token's scale."""
    x = x.float()
    scales = (torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True) / BYTE).clamp_(min=SMALLEST)
    return x / scales, scales


@dataclass(frozen=True, slots=True)
class Coded:
    """w = level * scale + offset. `order_I` is where in x the column's input stands; None: in order."""

    codes: Tensor  # uint8: (O, I / 2) by `pack`, or (O, I) the bytes of float8
    levels: Tensor | None  # (16) fp32; None: float8
    scales_OG: Tensor  # fp32
    offsets_OG: Tensor | None = None
    order_I: Tensor | None = None

    @property
    def inputs(self) -> int:
        return self.codes.shape[1] * (1 if self.levels is None else 2)

    @property
    def parts(self) -> list[Tensor]:
        return [t for t in (self.codes, self.levels, self.scales_OG, self.offsets_OG, self.order_I) if t is not None]

    def weight(self) -> Tensor:
        weight_OI = torch.cat([self.rows(first, first + TILE) for first in range(0, len(self.codes), TILE)])
        return weight_OI if self.order_I is None else weight_OI[:, torch.argsort(self.order_I)]

    def reference(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight().to(x.dtype))

    def rows(self, first: int, end: int) -> Tensor:
        """These outputs' weights, their columns as they are held."""
        codes, scales_OG = self.codes[first:end], self.scales_OG[first:end, :, None]
        if self.levels is None:
            return codes.view(FLOAT8).float() * scales_OG[:, 0]
        wide = self.levels[unpack(codes).int()].view(*scales_OG.shape[:2], -1) * scales_OG
        if self.offsets_OG is not None:
            wide += self.offsets_OG[first:end, :, None]
        return wide.flatten(1)

    def kin(self) -> Hashable:
        order = None if self.order_I is None else tuple(self.order_I.tolist())
        levels = None if self.levels is None else tuple(self.levels.tolist())
        return levels, self.scales_OG.shape[1], self.offsets_OG is None, order

    def product(self, others: Sequence[Coded]) -> Product:
        parts = [self, *others]
        offsets = [part.offsets_OG for part in parts if part.offsets_OG is not None]
        whole = Coded(
            torch.cat([part.codes for part in parts]),
            self.levels,
            torch.cat([part.scales_OG for part in parts]),
            torch.cat(offsets) if offsets else None,
            self.order_I,
        )
        return FewBits(whole)


def pack(codes_OI: Tensor) -> Tensor:
    """Codes of 4 bits, each in a byte, by blocks: (O, I / 2)."""
    first, second = codes_OI.view(len(codes_OI), -1, 2, BLOCK // 2).unbind(2)
    return (first | second << 4).flatten(1)


def unpack(packed: Tensor) -> Tensor:
    blocks = packed.view(len(packed), -1, BLOCK // 2)
    return torch.stack([blocks & 15, blocks >> 4], 2).flatten(1)


def round_float8(weight_OI: Tensor) -> Coded:
    """A scale per output; to the nearest number of float8 (e4m3)."""
    scales_O1 = (weight_OI.float().abs().amax(1, keepdim=True) / torch.finfo(FLOAT8).max).clamp_(min=SMALLEST)
    return Coded((weight_OI.float() / scales_O1).to(FLOAT8).view(torch.uint8), None, scales_O1)


class FewBits:
    def __init__(self, coded: Coded) -> None:
        self.bytes = sum(part.nbytes for part in coded.parts)
        self._coded = coded
        self._group = coded.inputs // coded.scales_OG.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        coded = self._coded
        if coded.order_I is not None:
            x = x.index_select(-1, coded.order_I)
        if not native.serves(x.device, x.dtype):
            return multiply_by_tiles(x, coded)
        x_TI = x.reshape(-1, x.shape[-1])
        y = native.few_bits(x_TI, coded.codes, coded.levels, coded.scales_OG, coded.offsets_OG, group=self._group)
        return y.view(*x.shape[:-1], y.shape[1])

    def weight(self) -> Tensor:
        return self._coded.weight()


def multiply_by_tiles(x: Tensor, coded: Coded) -> Tensor:
    """The plain loop; x in the order of the columns."""
    tiles = range(0, len(coded.codes), TILE)
    return torch.cat([F.linear(x, coded.rows(first, first + TILE).to(x.dtype)) for first in tiles], -1)
