"""A Site: everything that the active adapters do at one Linear, in one fixed order.

    x' = scale_in(x) + rotate_in(x);  y = W x';  y = scale_out(y) + rotate_out(y)
    y += lowrank(x);  y += delta(x);  y += bias;  y += base bias

Scales and rotations of one side all read what the Linear was given or has made, and add around one. The deltas,
low-rank or whole, read the untransformed x and are not transformed themselves, so every adapter's contribution is its
own and a mixture is their weighted sum. The one case where that fails, one adapter transforming the input and another
the output of the same Linear, is refused before it gets here (`server.primitives.graft`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from server.primitives import bias, delta, lowrank, rotate, scale
from server.primitives.gates import Gates
from server.primitives.route import Routes


@dataclass(frozen=True, slots=True)
class SiteShape:
    """What an adapter must fit: a Linear's features, and the base's own bias."""

    in_features: int
    out_features: int
    bias_O: Tensor | None


@dataclass(frozen=True, slots=True)
class SiteValue:
    """What one adapter does at one Linear."""

    scale_in: scale.Scale | None = None
    scale_out: scale.Scale | None = None
    lowrank: lowrank.LowRank | None = None
    bias: bias.Bias | None = None
    delta: delta.Delta | None = None
    rotate_in: rotate.Rotate | None = None
    rotate_out: rotate.Rotate | None = None

    @property
    def bytes(self) -> int:
        parts = (
            self.scale_in, self.scale_out, self.lowrank, self.bias, self.delta, self.rotate_in, self.rotate_out
        )  # fmt: skip
        return sum(part.bytes for part in parts if part is not None)

    @property
    def transforms_input(self) -> bool:
        return self.scale_in is not None or self.rotate_in is not None

    @property
    def transforms_output(self) -> bool:
        return self.scale_out is not None or self.rotate_out is not None


@dataclass(frozen=True, slots=True)
class SiteOperand:
    """What all active adapters do at one Linear."""

    scale_in: scale.ScaleOperand | None
    scale_out: scale.ScaleOperand | None
    lowrank: lowrank.LowRankOperand | None
    bias: bias.BiasOperand | None
    delta: delta.DeltaOperand | None
    rotate_in: rotate.RotateOperand | None
    rotate_out: rotate.RotateOperand | None


@dataclass(slots=True)
class Active:
    """The adapters of the step in hand, read by every grafted Linear; the engine sets it before each forward pass."""

    operands: Mapping[str, SiteOperand] = field(default_factory=dict)
    gates: Gates | None = None
    routes: Routes | None = None


def pack_site(values: Sequence[tuple[int, SiteValue]]) -> SiteOperand:
    """Lay the (column, value) pairs of the active adapters side by side."""
    ins = [(column, value.scale_in) for column, value in values if value.scale_in is not None]
    outs = [(column, value.scale_out) for column, value in values if value.scale_out is not None]
    lows = [(column, value.lowrank) for column, value in values if value.lowrank is not None]
    biases = [(column, value.bias) for column, value in values if value.bias is not None]
    deltas = [(column, value.delta) for column, value in values if value.delta is not None]
    turns_in = [(column, value.rotate_in) for column, value in values if value.rotate_in is not None]
    turns_out = [(column, value.rotate_out) for column, value in values if value.rotate_out is not None]
    return SiteOperand(
        scale.pack(ins) if ins else None,
        scale.pack(outs) if outs else None,
        lowrank.pack(lows) if lows else None,
        bias.pack(biases) if biases else None,
        delta.pack(deltas) if deltas else None,
        rotate.pack(turns_in) if turns_in else None,
        rotate.pack(turns_out) if turns_out else None,
    )


def apply_site(
    x_TI: Tensor, gates: Gates, operand: SiteOperand, product: Callable[[Tensor], Tensor], base_bias: Tensor | None
) -> Tensor:
    """The Linear with the active adapters; `product` is the base's, without its bias."""
    y_TO = product(_transform(x_TI, gates, operand.scale_in, operand.rotate_in))
    y_TO = _transform(y_TO, gates, operand.scale_out, operand.rotate_out)
    if operand.lowrank is not None:
        y_TO = lowrank.apply(y_TO, x_TI, gates, operand.lowrank)
    if operand.delta is not None:
        y_TO = delta.apply(y_TO, x_TI, gates, operand.delta)
    if operand.bias is not None:
        y_TO = bias.apply(y_TO, gates, operand.bias)
    return y_TO if base_bias is None else y_TO + base_bias


def _transform(
    x_TF: Tensor, gates: Gates, scales: scale.ScaleOperand | None, rotations: rotate.RotateOperand | None
) -> Tensor:
    """One side: both read x."""
    made_TF = x_TF if scales is None else scale.apply(x_TF, gates, scales)
    return made_TF if rotations is None else rotate.apply(made_TF, x_TF, gates, rotations)
