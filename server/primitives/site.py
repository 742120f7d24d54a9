"""A Site: everything that the active adapters do at one module of the base, in one fixed order. At a Linear

    x' = scale_in(x) + rotate_in(x);  y = W x';  y = scale_out(y) + rotate_out(y)
    y += lowrank(x);  y += delta(x);  y += bias;  y += base bias

Scales and rotations of one side all read what the Linear was given or has made, and add around one. The deltas,
low-rank or whole, read the untransformed x and are not transformed themselves, so every adapter's contribution is its
own and a mixture is their weighted sum. The one case where that fails, one adapter transforming the input and another
the output of the same Linear, is refused before it gets here (`server.primitives.graft`).
An embedding is a Linear whose input is one-hot, so that its products are look-ups; a norm has a weight and a bias:

    y = E[id];  y = scale_out(y);  y += lowrank(id);  y += delta(id)
    y = norm(x);  y += gain(n);  y += bias, with n the normalised x

A place on the residual stream is a Site, too, and has an edit instead (`server.model.places`).
The weight of a router is a Site, too; so is the fused weight of a layer's experts, where there are low-rank terms alone
and the rows are pairs of a token and an expert (`server.primitives.experts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.kernels.gathered import Gathered
from server.primitives import bias, delta, edit, experts, gain, lowrank, rotate, scale
from server.primitives.gates import Gates
from server.primitives.route import Routes


@dataclass(frozen=True, slots=True)
class SiteShape:
    """What an adapter must fit: a Linear's features, and the base's own bias.

    A checkpoint of a `transposed` one (a Conv1D) holds the weight as (I, O).
    """

    in_features: int
    out_features: int
    bias_O: Tensor | None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class NormShape:
    """What an adapter must fit at a norm: the base's own weight and bias, whose differences it is lowered to."""

    weight_F: Tensor
    bias_F: Tensor | None


@dataclass(frozen=True, slots=True)
class EmbeddingShape:
    """What an adapter must fit at the embedding: V rows of E; `factor` is what the base multiplies a row with."""

    name: str
    vocabulary: int
    features: int
    factor: float
    head: str  # the Linear that gives the logits
    tied: bool  # whether the head's weight is the embedding's


@dataclass(frozen=True, slots=True)
class SiteValue:
    """What one adapter does at one module, or at one place on the residual stream."""

    scale_in: scale.Scale | None = None
    scale_out: scale.Scale | None = None
    lowrank: lowrank.LowRank | None = None
    bias: bias.Bias | None = None
    delta: delta.Delta | None = None
    rotate_in: rotate.Rotate | None = None
    rotate_out: rotate.Rotate | None = None
    gain: gain.Gain | None = None
    edit: edit.Edit | None = None
    experts: experts.ExpertsLowRank | None = None

    @property
    def bytes(self) -> int:
        transforms = (self.scale_in, self.scale_out, self.rotate_in, self.rotate_out)
        parts = (*transforms, self.lowrank, self.bias, self.delta, self.gain, self.edit, self.experts)
        return sum(part.bytes for part in parts if part is not None)

    @property
    def transforms_input(self) -> bool:
        return self.scale_in is not None or self.rotate_in is not None

    @property
    def transforms_output(self) -> bool:
        return self.scale_out is not None or self.rotate_out is not None


@dataclass(frozen=True, slots=True)
class SiteOperand:
    """What all active adapters do at one module."""

    scale_in: scale.ScaleOperand | None
    scale_out: scale.ScaleOperand | None
    lowrank: lowrank.LowRankOperand | None
    bias: bias.BiasOperand | None
    delta: delta.DeltaOperand | None
    rotate_in: rotate.RotateOperand | None
    rotate_out: rotate.RotateOperand | None
    gain: gain.GainOperand | None
    edit: edit.EditOperand | None
    experts: experts.ExpertsOperand | None

    @property
    def input_layout(self) -> tuple[int, ...]:
        """The columns of the adapters that transform the input; some may stand there several times."""
        scaled = () if self.scale_in is None else self.scale_in.layout
        rotated = () if self.rotate_in is None else self.rotate_in.groups
        return sum((group.layout for group in rotated), scaled)


@dataclass(slots=True)
class Active:
    """The adapters of the step in hand, read by every grafted module; the engine sets it before each forward pass.

    The output head sees only the tokens whose logits are wanted, `wanted_R` (None: not told); `wanted_gates` are
    theirs. What native kernels know stands in `gathered` where they run, in `operands` otherwise.
    """

    operands: Mapping[str, SiteOperand] = field(default_factory=dict)
    gathered: Gathered | None = None
    gates: Gates | None = None
    routes: Routes | None = None
    wanted_gates: Gates | None = None
    wanted_R: Tensor | None = None

    @contextmanager
    def for_the_wanted(self) -> Iterator[None]:
        """Meanwhile the modules are given the wanted tokens alone."""
        gates, self.gates = self.gates, self.wanted_gates
        try:
            yield
        finally:
            self.gates = gates


def pack_site(values: Sequence[tuple[int, SiteValue]], dtype: torch.dtype | None = None) -> SiteOperand:
    """Lay the (column, value) pairs of the active adapters side by side, in the activations' dtype."""
    ins = [(column, value.scale_in) for column, value in values if value.scale_in is not None]
    outs = [(column, value.scale_out) for column, value in values if value.scale_out is not None]
    lows = [(column, value.lowrank) for column, value in values if value.lowrank is not None]
    biases = [(column, value.bias) for column, value in values if value.bias is not None]
    deltas = [(column, value.delta) for column, value in values if value.delta is not None]
    turns_in = [(column, value.rotate_in) for column, value in values if value.rotate_in is not None]
    turns_out = [(column, value.rotate_out) for column, value in values if value.rotate_out is not None]
    gains = [(column, value.gain) for column, value in values if value.gain is not None]
    edits = [(column, value.edit) for column, value in values if value.edit is not None]
    fused = [(column, value.experts) for column, value in values if value.experts is not None]
    return SiteOperand(
        scale.pack(ins) if ins else None,
        scale.pack(outs) if outs else None,
        lowrank.pack(lows, dtype) if lows else None,
        bias.pack(biases) if biases else None,
        delta.pack(deltas) if deltas else None,
        rotate.pack(turns_in) if turns_in else None,
        rotate.pack(turns_out) if turns_out else None,
        gain.pack(gains) if gains else None,
        edit.pack(edits) if edits else None,
        experts.pack(fused) if fused else None,
    )


def apply_site(
    x_TI: Tensor, gates: Gates, operand: SiteOperand, product: Callable[[Tensor], Tensor], base_bias: Tensor | None
) -> Tensor:
    """The Linear with the active adapters; `product` is the base's, without its bias."""
    y_TO = after_product(product(before_product(x_TI, gates, operand)), x_TI, gates, operand)
    return y_TO if base_bias is None else y_TO + base_bias


def before_product(x_TI: Tensor, gates: Gates, operand: SiteOperand) -> Tensor:
    """x'."""
    return _transform(x_TI, gates, operand.scale_in, operand.rotate_in)


def after_product(y_TO: Tensor, x_TI: Tensor, gates: Gates, operand: SiteOperand) -> Tensor:
    """All of y but the base's bias, from W x'."""
    y_TO = _transform(y_TO, gates, operand.scale_out, operand.rotate_out)
    if operand.lowrank is not None:
        y_TO = lowrank.apply(y_TO, x_TI, gates, operand.lowrank)
    if operand.delta is not None:
        y_TO = delta.apply(y_TO, x_TI, gates, operand.delta)
    if operand.bias is not None:
        y_TO = bias.apply(y_TO, gates, operand.bias)
    return y_TO


def _transform(
    x_TF: Tensor, gates: Gates, scales: scale.ScaleOperand | None, rotations: rotate.RotateOperand | None
) -> Tensor:
    """One side: both read x."""
    made_TF = x_TF if scales is None else scale.apply(x_TF, gates, scales)
    return made_TF if rotations is None else rotate.apply(made_TF, x_TF, gates, rotations)


def apply_embedding(ids_T: Tensor, gates: Gates, operand: SiteOperand, product: Callable[[Tensor], Tensor]) -> Tensor:
    """The embedding with the active adapters; `product` is the base's look-up."""
    y_TE = product(ids_T)
    if operand.scale_out is not None:
        y_TE = scale.apply(y_TE, gates, operand.scale_out)
    if operand.lowrank is not None:
        y_TE = lowrank.look_up(y_TE, ids_T, gates, operand.lowrank)
    if operand.delta is not None:
        y_TE = delta.look_up(y_TE, ids_T, gates, operand.delta)
    return y_TE


def apply_norm(y: Tensor, unit: Callable[[], Tensor], gates: Gates, operand: SiteOperand, *, axis: int) -> Tensor:
    """A norm's output y, whose tokens lie along `axis`, with the active adapters; `unit` gives the normalised x."""
    if operand.gain is not None:
        y = gain.apply(y, unit(), gates, operand.gain, axis=axis)
    if operand.bias is not None:
        bias_TF = gates.spread(operand.bias.layout, operand.bias.columns_N) @ operand.bias.bias_NO
        y = y + gain.along(bias_TF, y, axis=axis)
    return y
