"""Mixtures of experts, grafted: a router and the experts of a layer ask the step's adapters, too.

A router's adapter changes where its own tokens go. An expert's adapter acts on the pairs of a token and that expert,
before the activation in gate_up_proj and on what the activation gives in down_proj.
How many tokens an expert gets depends on the whole batch, and products of few rows round in another way than those of
many. So every expert's rows are filled up with zeros to a multiple of ROWS, always: a token's numbers are then the same
in any company, and differ from the stock network's by rounding alone (decision 15).

T tokens, C experts chosen for each, E experts, N rows (pairs and filling), H hidden size, K active adapters.
Source: transformers 5.23, integrations/moe.py, models/mixtral/modeling_mixtral.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.primitives import experts
from server.primitives.experts import Group, ParameterShape
from server.primitives.gates import Gates
from server.primitives.site import Active, apply_site

ROWS = 8
GATE_UP, DOWN = "gate_up_proj", "down_proj"
# Routers whose only use of their weight is one F.linear.
ROUTERS = frozenset({"MixtralTopKRouter", "Qwen3MoeTopKRouter", "GptOssTopKRouter"})


class GraftedExperts(nn.Module):
    """The stock module of a layer's experts, with its weights, its bias and its gate; the products are done here."""

    def __init__(self, name: str, base: nn.Module, active: Active) -> None:
        super().__init__()
        self.name = name
        self.base: Any = base
        self.active = active

    def forward(self, hidden_TH: Tensor, chosen_TC: Tensor, weights_TC: Tensor) -> Tensor:
        rows = _rows(chosen_TC, self.base.num_experts)
        x_NH = hidden_TH.new_zeros(rows.count, hidden_TH.shape[1])
        x_NH[rows.of_pair] = hidden_TH.repeat_interleave(chosen_TC.shape[1], 0)
        gates = self._gates(rows, chosen_TC.shape[1])
        inner_NI = self.base._apply_gate(self._product(GATE_UP, x_NH, rows, gates))
        out_NH = self._product(DOWN, inner_NI, rows, gates)
        pairs_TCH = out_NH[rows.of_pair].view(*chosen_TC.shape, -1)
        return (pairs_TCH * weights_TC[..., None]).sum(1).to(hidden_TH.dtype)

    def _product(self, parameter: str, x_NI: Tensor, rows: _Rows, gates: Gates | None) -> Tensor:
        weight = getattr(self.base, parameter)
        y_NO = torch.cat(
            [
                x_NI[first:end] @ weight[expert]
                if self.base.is_transposed
                else F.linear(x_NI[first:end], weight[expert])
                for expert, first, end in rows.groups
            ]
        )
        operand = self.active.operands.get(f"{self.name}.{parameter}")
        if operand is not None and operand.experts is not None and gates is not None:
            y_NO = experts.apply(y_NO, x_NI, gates, operand.experts, rows.groups)
        return y_NO + getattr(self.base, f"{parameter}_bias")[rows.expert_N] if self.base.has_bias else y_NO

    def _gates(self, rows: _Rows, chosen: int) -> Gates | None:
        """The gates of each row's token; none for rows that only fill up."""
        if (
            self.active.gates is None
            or not {f"{self.name}.{one}" for one in (GATE_UP, DOWN)} & self.active.operands.keys()
        ):
            return None
        gates_TK = self.active.gates.gates_TK
        gates_NK = gates_TK.new_zeros(rows.count, gates_TK.shape[1])
        gates_NK[rows.of_pair] = gates_TK.repeat_interleave(chosen, 0)
        return Gates(gates_NK)


class GraftedWeight:
    """Stands where a router has its weight: F.linear, given it, asks the step's adapters. All else is the stock module.

    Source: torch's protocol for what is like a Tensor, `__torch_function__`.
    """

    def __init__(self, name: str, weight: Tensor, active: Active) -> None:
        self.name = name
        self.weight = weight
        self.active = active

    @classmethod
    def __torch_function__(
        cls,
        called: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        assert called is F.linear and not kwargs, f"a router does more with its weight than F.linear: {called}"
        x_TH, own, *bias = args
        return own.of(x_TH, bias[0] if bias else None)

    def of(self, x_TH: Tensor, bias_E: Tensor | None) -> Tensor:
        operand, gates = self.active.operands.get(self.name), self.active.gates
        if operand is not None and gates is not None:
            return apply_site(x_TH, gates, operand, lambda x: F.linear(x, self.weight), bias_E)
        y_TE = F.linear(x_TH, self.weight)
        return y_TE if bias_E is None else y_TE + bias_E


def graft_experts(network: nn.Module, active: Active) -> dict[str, ParameterShape]:
    """Graft every layer's experts and the router beside them in place; returns the shapes of their weights by name."""
    parameters: dict[str, ParameterShape] = {}
    for name, module in list(network.named_modules()):
        if not _is_fused(module):
            continue
        parent, _, child = name.rpartition(".")
        block = network.get_submodule(parent)
        setattr(block, child, GraftedExperts(name, module, active))
        parameters |= {f"{name}.{one}": _shape(module, one) for one in (GATE_UP, DOWN)}
        for beside, router in block.named_children():
            if type(router).__name__ in ROUTERS:
                weight: Any = router.weight
                full = f"{parent}.{beside}.weight"
                del router.weight
                router.weight = GraftedWeight(full, weight.detach(), active)  # type: ignore[assignment]
                parameters[full] = ParameterShape(1, weight.shape[1], weight.shape[0])
    return parameters


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where each pair of a token and a chosen expert stands, token by token, and which rows are which expert's."""

    count: int
    of_pair: Tensor  # (T * C)
    groups: Sequence[Group]
    expert_N: Tensor


def _rows(chosen_TC: Tensor, number: int) -> _Rows:
    chosen = chosen_TC.reshape(-1)
    counts_E = torch.bincount(chosen, minlength=number)
    filled_E = (counts_E + ROWS - 1) // ROWS * ROWS
    order = chosen.argsort(stable=True)
    sorted_ = chosen[order]
    place = torch.arange(len(chosen), device=chosen.device)
    of_pair = torch.empty_like(place)
    before_E, filled_before_E = counts_E.cumsum(0) - counts_E, filled_E.cumsum(0) - filled_E
    of_pair[order] = filled_before_E[sorted_] + place - before_E[sorted_]
    groups, first = [], 0
    for expert, filled in enumerate(filled_E.tolist()):
        if filled:
            groups.append(Group(expert, first, first + filled))
            first += filled
    expert_N = torch.arange(number, device=chosen.device).repeat_interleave(filled_E)
    return _Rows(first, of_pair, groups, expert_N)


def _is_fused(module: nn.Module) -> bool:
    """Gated experts whose weights are two plain parameters of three dimensions, by transformers' own marks."""
    if not getattr(module, "has_gate", False) or getattr(module, "has_post_expert_norm", True):
        return False
    weights = [getattr(module, one, None) for one in (GATE_UP, DOWN)]
    return all(type(one) is nn.Parameter and one.dim() == 3 and one.is_floating_point() for one in weights)


def _shape(module: Any, parameter: str) -> ParameterShape:
    number, rows, columns = getattr(module, parameter).shape
    return ParameterShape(number, rows, columns) if module.is_transposed else ParameterShape(number, columns, rows)
