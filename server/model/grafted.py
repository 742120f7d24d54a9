"""Grafting: every Linear of a stock network is replaced by one that asks the step's adapters.

The base product always runs without its bias, whether adapters are active or not, so that a request to the bare base is
bit-identical in any company. The output head stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.primitives.site import Active, SiteShape, apply_site


class GraftedLinear(nn.Module):
    """A base Linear and its Site. x is (1, T, I) or (T, I): the packed tokens of the step, in order."""

    def __init__(self, name: str, base: nn.Module, active: Active) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.active = active
        self.base_bias = _detach_bias(base)
        self.product = _bare_product(base)

    def forward(self, x: Tensor) -> Tensor:
        y = self._mixed(x)
        if self.active.routes is not None:
            self.active.routes.add(self.name, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y

    def _mixed(self, x: Tensor) -> Tensor:
        """With the static mixtures of the step's tokens."""
        operand = self.active.operands.get(self.name)
        gates = self.active.gates
        if operand is None or gates is None:
            y = self.product(x)
            return y if self.base_bias is None else y + self.base_bias
        x_TI = x.reshape(-1, x.shape[-1])
        if x_TI.shape[0] != gates.gates_TK.shape[0]:
            raise ValueError(f"{self.name} saw {x_TI.shape[0]} tokens of a step of {gates.gates_TK.shape[0]}")
        y_TO = apply_site(x_TI, gates, operand, self.product, self.base_bias)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def graft_network(network: nn.Module, active: Active) -> dict[str, SiteShape]:
    """Replace every Linear but the output head in place; returns the Sites by module name."""
    head = network.get_output_embeddings()  # type: ignore[operator]
    sites = {}
    for name, module in list(network.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D) or module is head:
            continue
        parent, _, child = name.rpartition(".")
        grafted = GraftedLinear(name, module, active)
        setattr(network.get_submodule(parent), child, grafted)
        sites[name] = SiteShape(*_features(module), grafted.base_bias)
    return sites


def _features(module: nn.Linear | Conv1D) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


def _detach_bias(base: nn.Module) -> Tensor | None:
    bias = base.bias
    if not isinstance(bias, Tensor):
        return None
    if not isinstance(base, Conv1D):
        base.register_parameter("bias", None)
    return bias.detach()


def _bare_product(base: nn.Module) -> Callable[[Tensor], Tensor]:
    weight = base.weight
    assert isinstance(weight, Tensor)
    if isinstance(base, Conv1D):
        return lambda x: torch.matmul(x, weight)
    if type(base) is nn.Linear:
        return lambda x: F.linear(x, weight)
    return base  # a quantized Linear (bitsandbytes), whose bias is gone
