"""Routing: which experts a token gets, and with what weight, computed from the token itself while it passes.

    arrow: s_k = |x . p_k| at every Linear; p_k is the unit input that B_k A_k stretches most, so its sign is free
    gate:  s_k = w_k . h / rms(h) + v_k . c in every decoder layer; h is the layer's input, c the prompt's mean
           embedding at rms 1 (`reading`), w_k and v_k were trained
    the top_k best of a token's candidates share softmax(s / temperature); y += sum_k g_k B_k A_k x over those alone

Experts are low-rank adapters and lie in a bank of their own, apart from the adapters of static mixtures: a token that
is not routed meets none of this, to the bit. An expert that has no term at a Linear is no candidate of arrow there;
under gate its share of that Linear is nothing.
T tokens in the step, R of them routed, E experts active, C scores of a token, K the largest top_k, L layers, P sum of
ranks, I in, O out, H hidden.
Source: Ostapenko et al. 2024 (arXiv:2405.11157) and peft 0.21.2, tuners/lora/arrow.py; Shazeer et al. 2017
(arXiv:1701.06538).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.primitives.lowrank import LowRank

RMS_EPSILON = 1e-6
# Under so many ranks in all, two products over all experts are bound by x and y, not by the experts; and under so many
# multiply-adds in vain the products of single experts cost more than they save. Measured: docs/decisions/0020.
FEW_RANKS = 128
WASTE_PER_EXPERT = 1 << 19


@dataclass(frozen=True, slots=True)
class Router:
    """A trained router: in every decoder layer a row per expert for the token and one for the prompt, in fp32."""

    weight_LEH: Tensor
    prompt_weight_LEH: Tensor
    top_k: int

    @property
    def bytes(self) -> int:
        return self.weight_LEH.nbytes + self.prompt_weight_LEH.nbytes

    def told(self, reading_H: Tensor) -> Tensor:
        """What a prompt adds to every score of its tokens (L, E)."""
        return self.prompt_weight_LEH @ reading_H


@dataclass(frozen=True, slots=True)
class ExpertOperand:
    """What the active experts do at one Linear: one by one, and side by side."""

    lows: tuple[LowRank | None, ...]  # by column
    A_IP: Tensor
    B_PO: Tensor
    columns_P: Tensor
    present_E: Tensor
    prototypes_IE: Tensor


@dataclass(frozen=True, slots=True)
class Routed:
    """The routed tokens of one mode in a step: where they stand, and what each may choose from.

    `told_LRC` is what each token's prompt adds to its scores under gate; arrow has none.
    """

    rows_R: Tensor
    allowed_RC: Tensor
    top_k_R: Tensor
    temperature_R: Tensor
    most: int  # the largest top_k
    told_LRC: Tensor | None = None


@dataclass(frozen=True, slots=True)
class GateSpace:
    """The scores of all active routers side by side; `expert_C` is the column of each in the bank."""

    weight_LCH: Tensor
    expert_C: Tensor


@dataclass(frozen=True, slots=True)
class Selection:
    """Columns of the bank and their weights; a slot of weight zero is empty."""

    columns_RK: Tensor
    weights_RK: Tensor

    def dense(self, experts: int) -> Tensor:
        """The same as gates (R, E)."""
        gates_RE = self.weights_RK.new_zeros(self.weights_RK.shape[0], experts)
        return gates_RE.scatter_add_(1, self.columns_RK, self.weights_RK)


def reading(embeddings_TH: Tensor) -> Tensor:
    """What a router reads of a prompt: the mean of its tokens' embeddings (T, H), at rms 1."""
    mean_H = embeddings_TH.float().mean(0)
    return torch.nn.functional.normalize(mean_H, dim=0) * mean_H.shape[0] ** 0.5


def prototype(value: LowRank) -> Tensor:
    """The top right singular vector (I) of B A in fp32, exact: QR of the thin factors, SVD of the r x r middle.

    Zero where B A is zero, so that such an expert scores nothing.
    """
    Q_IR, R_A = torch.linalg.qr(value.A_RI.t().double())
    _, R_B = torch.linalg.qr(value.B_OR.double() * value.scaling)
    _, stretch_R, V_RR = torch.linalg.svd(R_B @ R_A.t())
    direction_I = Q_IR @ V_RR[0]
    return (direction_I * (stretch_R[0] > 0)).float()


def pack(values: Sequence[tuple[LowRank, Tensor | None] | None], dtype: torch.dtype | None = None) -> ExpertOperand:
    """Each column's term at this Linear with its prototype; None where the expert has no term here.

    `dtype` is the activations'; None: that of the terms.
    """
    dtype = dtype or next(value[0].A_RI.dtype for value in values if value is not None)
    lows = tuple(None if value is None else _ready(value[0], dtype) for value in values)
    there = [(column, low) for column, low in enumerate(lows) if low is not None]
    A_PI = torch.cat([low.A_RI for _, low in there])
    B_OP = torch.cat([low.B_OR for _, low in there], dim=1)
    owners = [column for column, low in there for _ in range(low.A_RI.shape[0])]
    nothing = A_PI.new_zeros(A_PI.shape[1])
    prototypes = [nothing if value is None or value[1] is None else value[1].to(dtype) for value in values]
    return ExpertOperand(
        lows,
        A_PI.t(),
        B_OP.t().contiguous(),
        torch.tensor(owners, device=A_PI.device),
        torch.tensor([low is not None for low in lows], device=A_PI.device),
        torch.stack(prototypes, dim=1),
    )


def _ready(low: LowRank, dtype: torch.dtype) -> LowRank:
    """The same in the activations' dtype, its scaling inside B."""
    return LowRank(low.A_RI.to(dtype), low.scaled(dtype))


def select(scores_RC: Tensor, routed: Routed, allowed_RC: Tensor) -> Selection:
    """The top_k best allowed of every row, weighted by the softmax of their scores over the temperature."""
    scores_RC = scores_RC.float().masked_fill(~allowed_RC, -torch.inf)
    best_RK, columns_RK = scores_RC.topk(min(routed.most, scores_RC.shape[1]), dim=-1)
    place_K = torch.arange(best_RK.shape[1], device=best_RK.device)
    kept_RK = (place_K < routed.top_k_R[:, None]) & allowed_RC.gather(1, columns_RK)
    behind_RK = (best_RK - best_RK[:, :1]) / routed.temperature_R[:, None]
    weights_RK = behind_RK.masked_fill(~kept_RK, -torch.inf).softmax(-1).masked_fill(~kept_RK, 0)
    return Selection(columns_RK, weights_RK)


def arrow(x_RI: Tensor, routed: Routed, operand: ExpertOperand) -> Selection:
    return select((x_RI @ operand.prototypes_IE).abs(), routed, routed.allowed_RC & operand.present_E)


def gate(h_RH: Tensor, routed: Routed, space: GateSpace, *, layer: int) -> Selection:
    h_RH = h_RH.float()
    normed_RH = h_RH * torch.rsqrt(h_RH.square().mean(-1, keepdim=True) + RMS_EPSILON)
    assert routed.told_LRC is not None
    scores_RC = normed_RH @ space.weight_LCH[layer].t() + routed.told_LRC[layer]
    chosen = select(scores_RC, routed, routed.allowed_RC)
    return Selection(space.expert_C[chosen.columns_RK], chosen.weights_RK)


def apply(x_RI: Tensor, selection: Selection, operand: ExpertOperand) -> Tensor:
    """sum_k g_k B_k A_k x (R, O): by whichever of the two ways is cheaper here."""
    tokens, slots = selection.columns_RK.shape
    inputs, rank = operand.A_IP.shape
    needed = min(slots / len(operand.lows), 1.0)
    waste = tokens * rank * (1 - needed) * (inputs + operand.B_PO.shape[1])
    if rank <= FEW_RANKS or waste <= WASTE_PER_EXPERT * len(operand.lows):
        return apply_dense(x_RI, selection, operand)
    return apply_selected(x_RI, selection, operand)


def apply_dense(x_RI: Tensor, selection: Selection, operand: ExpertOperand) -> Tensor:
    """All experts in two products, those that were not chosen masked away."""
    gates_RP = selection.dense(len(operand.lows)).to(x_RI.dtype).index_select(1, operand.columns_P)
    middle_RP = (x_RI @ operand.A_IP * gates_RP).masked_fill_(gates_RP == 0, 0)
    return middle_RP @ operand.B_PO


def apply_selected(x_RI: Tensor, selection: Selection, operand: ExpertOperand) -> Tensor:
    """The chosen (token, expert) pairs alone, those of one expert together."""
    y_RO = x_RI.new_zeros(x_RI.shape[0], operand.B_PO.shape[1])
    experts, slots = len(operand.lows), selection.columns_RK.shape[1]
    flat = selection.columns_RK.masked_fill(selection.weights_RK == 0, experts).flatten()
    order = flat.argsort(stable=True)
    shares = selection.weights_RK.flatten()[order].to(x_RI.dtype)
    tokens = order // slots
    start = 0
    for low, count in zip(operand.lows, torch.bincount(flat, minlength=experts + 1).tolist(), strict=False):
        if low is not None and count:
            token_n = tokens[start : start + count]
            middle_nR = (x_RI[token_n] @ low.A_RI.t()) * shares[start : start + count, None]
            y_RO.index_add_(0, token_n, middle_nR @ low.B_OR.t())
        start += count
    return y_RO


def apply_loop(x_RI: Tensor, gates_RE: Tensor, lows: Sequence[LowRank | None]) -> Tensor:
    """The same, token by token and expert by expert: what tests compare the two with."""
    outputs = next(low.B_OR.shape[0] for low in lows if low is not None)
    y_RO = x_RI.new_zeros(x_RI.shape[0], outputs)
    for token in range(x_RI.shape[0]):
        for share, low in zip(gates_RE[token], lows, strict=True):
            if low is not None and share != 0:
                middle_R = low.A_RI.to(x_RI.dtype) @ x_RI[token]
                y_RO[token] += share * low.scaling * (low.B_OR.to(x_RI.dtype) @ middle_R)
    return y_RO


def select_loop(scores_C: Tensor, allowed: Sequence[bool], top_k: int, temperature: float) -> Tensor:
    """One token's gates (C), in plain words: what tests compare `select` with."""
    best = sorted((c for c in range(len(scores_C)) if allowed[c]), key=lambda c: -float(scores_C[c]))[:top_k]
    gates_C = torch.zeros(len(scores_C))
    if best:
        gates_C[best] = torch.softmax(scores_C[best].float() / temperature, dim=0)
    return gates_C


class Routes:
    """The routed tokens of one step on their way through the network.

    The network calls `enter` at every decoder layer and `add` at every Linear, in the order in which they run.
    """

    def __init__(
        self,
        operands: Mapping[str, ExpertOperand],
        *,
        tokens: int,
        experts: int,
        by_arrow: Routed | None,
        by_gate: Routed | None,
        space: GateSpace | None,
        traced: bool,
    ) -> None:
        self._operands = operands
        self._tokens = tokens
        self._experts = experts
        self._arrow = by_arrow
        self._gate = by_gate
        self._space = space
        self._traced = traced
        self._layer: int | None = None
        self._chosen: Selection | None = None
        self._arrow_sums: dict[int, tuple[Tensor, int]] = {}
        self._gate_sums: dict[int, tuple[Tensor, int]] = {}

    def enter(self, layer: int, h_TH: Tensor) -> None:
        """A decoder layer begins, with h as its input."""
        self._layer = layer
        if self._gate is None:
            return
        assert self._space is not None, "gated tokens have routers"
        self._chosen = gate(h_TH[self._gate.rows_R], self._gate, self._space, layer=layer)
        if self._traced:
            self._gate_sums[layer] = (self._chosen.dense(self._experts), 1)

    def add(self, name: str, x_TI: Tensor, y_TO: Tensor) -> None:
        """Add the routed experts' terms at a Linear to y, in the rows of the routed tokens alone."""
        operand = self._operands.get(name)
        if operand is None:
            return
        if x_TI.shape[0] != self._tokens:
            raise ValueError(f"{name} saw {x_TI.shape[0]} tokens of a step of {self._tokens}")
        if self._arrow is not None:
            x_RI = x_TI[self._arrow.rows_R]
            chosen = arrow(x_RI, self._arrow, operand)
            y_TO.index_add_(0, self._arrow.rows_R, apply(x_RI, chosen, operand))
            if self._traced and self._layer is not None:
                sum_RE, count = self._arrow_sums.get(self._layer, (0, 0))
                self._arrow_sums[self._layer] = (sum_RE + chosen.dense(self._experts), count + 1)
        if self._gate is not None:
            assert self._chosen is not None, f"{name} ran outside of every decoder layer"
            y_TO.index_add_(0, self._gate.rows_R, apply(x_TI[self._gate.rows_R], self._chosen, operand))

    def shares(self, mode: str, layers: int) -> Tensor:
        """(R, layers, E) of one mode's tokens: arrow's are the mean over the layer's Linears that have experts."""
        sums, routed = (self._arrow_sums, self._arrow) if mode == "arrow" else (self._gate_sums, self._gate)
        assert routed is not None
        shares_RLE = torch.zeros(len(routed.rows_R), layers, self._experts, device=routed.rows_R.device)
        for layer, (sum_RE, count) in sums.items():
            shares_RLE[:, layer] = sum_RE / count
        return shares_RLE
