"""The decoder layers of any network: what a trained router reads, and what a layer's shares are told by."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from server.model.grafted import GraftedLinear
from server.primitives.site import Active


def find_layers(stock: nn.Module, depth: int) -> tuple[str, ...]:
    """The names of the decoder layers of a grafted network; none unless exactly one list of modules can be them."""
    found = [
        [f"{name}.{index}" for index in range(depth)]
        for name, module in stock.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and all(map(_has_linears, module))
    ]
    return tuple(found[0]) if len(found) == 1 else ()


def announce_layers(stock: nn.Module, names: tuple[str, ...], active: Active) -> None:
    """Tell the step's routes when a layer begins, and with what input."""
    for index, name in enumerate(names):
        stock.get_submodule(name).register_forward_pre_hook(partial(_enter, index, active), with_kwargs=True)


def _enter(index: int, active: Active, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if active.routes is not None:
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        active.routes.enter(index, hidden.reshape(-1, hidden.shape[-1]))


def _has_linears(module: nn.Module) -> bool:
    return any(isinstance(part, GraftedLinear) for part in module.modules())
