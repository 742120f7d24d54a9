"""Edit of the residual stream: h += sum_k g_k f_k(v), f(v) = U act(D n(v) + d) + c, for each of a token's adapters.

T tokens in the step, K adapters active in it, b width of one adapter's middle, P the sum of active widths, H hidden.
v is what the place hands out (the stream itself, or what its sublayer reads or makes), n nothing or a LayerNorm.
The active D's and U's lie side by side in one group per activation and norm, as in `lowrank`; c is one more feature of
the middle that is always one. A part with several activations (LoReFT with one) is a sum of parts.
Laws: a token whose gates are zero is bit-identical to one without adapters; an overflow in one adapter's middle stays
with the tokens that carry it; every f_k reads the same v, so that a fusion is exactly the weighted sum of the f_k.
Source: Houlsby et al. 2019 (arXiv:1902.00751); Pfeiffer et al. 2020 (arXiv:2005.00247); He et al. 2022
(arXiv:2110.04366); Wu et al. 2024 (arXiv:2404.03592).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from server.primitives.gates import Gates

NORM_EPS = 1e-5  # torch's LayerNorm, which the trainers use
IDENTITY = "identity"

SUBLAYERS = ("attention", "mlp")
READS = ("output", "stream", "residual", "input")  # what v is


def place(layer: int, sublayer: str, reads: str) -> str:
    """The name of a place on the residual stream, which is the name of no module."""
    return f"layers.{layer}.{sublayer}:{reads}"


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    IDENTITY: _identity,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "leakyrelu": partial(F.leaky_relu, negative_slope=0.01),
}


@dataclass(frozen=True, slots=True)
class Part:
    """One bottleneck. `normed`: v is brought to mean 0 and variance 1 first; a LayerNorm's weights are inside D, d."""

    D_bH: Tensor
    d_b: Tensor
    U_Hb: Tensor
    activation: str = IDENTITY
    normed: bool = False

    @property
    def bytes(self) -> int:
        return self.D_bH.nbytes + self.d_b.nbytes + self.U_Hb.nbytes


@dataclass(frozen=True, slots=True)
class Edit:
    """One adapter at one place; every scaling is already inside U and c."""

    parts: tuple[Part, ...]
    c_H: Tensor | None = None

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts) + (0 if self.c_H is None else self.c_H.nbytes)


@dataclass(frozen=True, slots=True)
class Group:
    """The middles of one activation side by side."""

    activation: str
    normed: bool
    D_HP: Tensor
    d_P: Tensor
    U_PH: Tensor
    layout: tuple[int, ...]  # the owning column of every feature of the middle
    columns_P: Tensor


@dataclass(frozen=True, slots=True)
class EditOperand:
    groups: tuple[Group, ...]


def pack(values: Sequence[tuple[int, Edit]]) -> EditOperand:
    """Lay the given (column, value) pairs side by side, one group per activation and norm."""
    sorted_: dict[tuple[str, bool], list[tuple[int, Part]]] = {}
    for column, value in values:
        for part in (*value.parts, *_constant(value)):
            sorted_.setdefault((part.activation, part.normed), []).append((column, part))
    return EditOperand(tuple(_group(*kind, parts) for kind, parts in sorted(sorted_.items())))


def apply(h_TH: Tensor, v_TH: Tensor, gates: Gates, operand: EditOperand) -> Tensor:
    """h + sum_k g_k f_k(v)."""
    for group in operand.groups:
        gates_TP = gates.spread(group.layout, group.columns_P)
        inputs_TH = F.layer_norm(v_TH, v_TH.shape[-1:], eps=NORM_EPS) if group.normed else v_TH
        middle_TP = ACTIVATIONS[group.activation](torch.addmm(group.d_P, inputs_TH, group.D_HP))
        # Not a bare product: 0 * inf would hand one adapter's overflow to every token of the batch.
        middle_TP = (middle_TP * gates_TP).masked_fill_(gates_TP == 0, 0)
        h_TH = torch.addmm(h_TH, middle_TP, group.U_PH)
    return h_TH


def apply_loop(h_TH: Tensor, v_TH: Tensor, gates_TK: Tensor, values: Sequence[tuple[int, Edit]]) -> Tensor:
    """The same, token by token and adapter by adapter: what tests compare `apply` with."""
    h_TH = h_TH.clone()
    for token in range(h_TH.shape[0]):
        for column, value in values:
            gate = gates_TK[token, column]
            if gate != 0:
                h_TH[token] += gate * f(v_TH[token], value)
    return h_TH


def f(v_H: Tensor, value: Edit) -> Tensor:
    """What one adapter adds for one token."""
    total_H = torch.zeros_like(v_H) if value.c_H is None else value.c_H.clone()
    for part in value.parts:
        x_H = v_H
        if part.normed:
            x_H = (v_H - v_H.mean()) / (v_H.var(unbiased=False) + NORM_EPS).sqrt()
        total_H += part.U_Hb @ ACTIVATIONS[part.activation](part.D_bH @ x_H + part.d_b)
    return total_H


def _constant(value: Edit) -> tuple[Part, ...]:
    """c as a part of width one whose middle is one whatever it reads."""
    if value.c_H is None:
        return ()
    zeros_1H = torch.zeros_like(value.c_H)[None]
    return (Part(zeros_1H, torch.ones_like(value.c_H[:1]), value.c_H[:, None]),)


def _group(activation: str, normed: bool, parts: Sequence[tuple[int, Part]]) -> Group:
    layout = tuple(column for column, part in parts for _ in range(part.D_bH.shape[0]))
    D_PH = torch.cat([part.D_bH for _, part in parts])
    U_PH = torch.cat([part.U_Hb for _, part in parts], dim=1).t().contiguous()
    d_P = torch.cat([part.d_b for _, part in parts])
    return Group(activation, normed, D_PH.t(), d_P, U_PH, layout, torch.tensor(layout, device=D_PH.device))
