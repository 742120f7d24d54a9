"""Weights of the base in few bits, and their products on a CPU.

`Rows` is int8: a scale per output. FBGEMM multiplies bytes by bytes, so activations become bytes, too, with a scale per
token: a token's answer does not depend on its neighbours. Without VNNI its products of two bytes are added in 16 bits,
which saturate; weights then keep to 7 bits (255 * 63 * 2 < 2^15), not activations, whose range the outliers set
(docs/performance.md has the figures of both).

O out, I in, T tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from server.kernels.products import Product

BYTE = 127  # the largest code of eight bits
SEVEN_BITS = 63
MIDDLE = 128  # the unsigned byte that stands for zero
SMALLEST = torch.finfo(torch.float32).tiny  # instead of a scale of zero


class Held(Protocol):
    """The weight of a Linear in few bits, before it is a product."""

    def weight(self) -> Tensor:
        """(O, I) in fp32: exactly what is multiplied with."""
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

    def kin(self) -> Hashable:
        return "int8"

    def product(self, others: Sequence[Rows]) -> Product:
        parts = [self, *others]
        whole = Rows(torch.cat([part.codes_OI for part in parts]), torch.cat([part.scales_O for part in parts]))
        return Int8(whole) if "fbgemm" in torch.backends.quantized.supported_engines else Int8Plain(whole)


def largest_code() -> int:
    """Of an int8 weight on this machine."""
    saturates = "fbgemm" in torch.backends.quantized.supported_engines and not torch.cpu._is_vnni_supported()
    return SEVEN_BITS if saturates else BYTE


def round_rows(weight_OI: Tensor, largest: int) -> Rows:
    """Symmetric; to the nearest code."""
    weight_OI = weight_OI.float()
    scales_O = (weight_OI.abs().amax(1) / largest).clamp_(min=SMALLEST)
    return Rows((weight_OI / scales_O[:, None]).round_().to(torch.int8), scales_O)


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
