"""Bottleneck adapters: f(v) = s (U act(D v + d) + c) on the residual stream, in the places of docs/decisions/0017.

Houlsby et al. 2019 (arXiv:1902.00751), Pfeiffer et al. 2020 (2005.00247), He et al. 2021 (2110.04366, parallel);
Compacter (Mahabadi et al. 2021, 2106.04647): D and U are sums of Kronecker products.

H hidden size, b bottleneck size, I in, O out, n Kronecker terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.modules.places import find_layers, hook

NORM_EPS: Final = 1e-5
ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
    "leakyrelu": functional.leaky_relu,
    "none": lambda x: x,
    "identity": lambda x: x,
}


class Dense(nn.Module):
    """A Linear as it is saved: `weight` (O, I) and `bias` (O)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def start(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Hypercomplex(nn.Module):
    """A Linear whose weight is (sum_i rule[i] kron (left[i] right[i]))^T, or kron weight[i] where rank is None."""

    def __init__(self, inputs: int, outputs: int, terms: int, rank: int | None) -> None:
        super().__init__()
        self.phm_rule = nn.Parameter(torch.zeros(terms, terms, terms))
        self.bias = nn.Parameter(torch.zeros(outputs))
        rows, columns = inputs // terms, outputs // terms
        if rank is None:
            self.phm_weight = nn.Parameter(torch.zeros(terms, rows, columns))
        else:
            self.phm_left = nn.Parameter(torch.zeros(terms, rows, rank))
            self.phm_right = nn.Parameter(torch.zeros(terms, rank, columns))
        self._factored = rank is not None

    def start(self) -> None:
        nn.init.normal_(self.phm_rule, std=1 / math.sqrt(len(self.phm_rule)))
        for factor in self.factors:
            for term in factor:
                nn.init.xavier_normal_(term)

    def start_at_nothing(self) -> None:
        """The product is zero, and yet every factor but one has a gradient after the first step."""
        self.start()
        nn.init.zeros_(self.factors[-1])

    @property
    def factors(self) -> list[nn.Parameter]:
        return [self.phm_left, self.phm_right] if self._factored else [self.phm_weight]

    def forward(self, x: Tensor) -> Tensor:
        term = self.phm_left @ self.phm_right if self._factored else self.phm_weight
        n, rows, columns = term.shape
        weight_IO = torch.einsum("nab,ncd->acbd", self.phm_rule, term).reshape(n * rows, n * columns)
        return x @ weight_IO + self.bias


class Bottleneck(nn.Module):
    """One f, at one place."""

    def __init__(self, hidden: int, size: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        terms = config.get("phm_dim")
        self.down = _projection(hidden, size, config)
        self.up = _projection(size, hidden, config)
        assert terms is None or isinstance(self.down, Hypercomplex)
        self.norm = nn.LayerNorm(hidden, eps=NORM_EPS) if config.get("norm_before") else None
        scaling = config.get("scaling", 1.0)
        widths = {"learned": 1, "channel": hidden}
        self.scaling = nn.Parameter(torch.ones(widths[scaling])) if isinstance(scaling, str) else None
        self._scale = 1.0 if isinstance(scaling, str) else float(scaling)
        self._activation = ACTIVATIONS[config["non_linearity"] or "none"]
        self._dropout = float(config.get("dropout") or 0.0)

    def start(self) -> None:
        """D as a Linear starts, U at zero: the untrained adapter changes nothing."""
        self.down.start()
        if isinstance(self.up, Hypercomplex):
            self.up.start_at_nothing()

    def forward(self, v_BTH: Tensor) -> Tensor:
        if self.norm is not None:
            v_BTH = self.norm(v_BTH)
        made = self.up(self._activation(self.down(v_BTH)))
        made = made * (self._scale if self.scaling is None else self.scaling)
        return functional.dropout(made, self._dropout, self.training)


class Bottlenecks(nn.Module):
    """The adapters of all layers, by layer and place, each hooked where it belongs."""

    def __init__(self, model: Any, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.active = True
        self._config = config
        self.layers = nn.ModuleDict()
        hidden = model.config.get_text_config().hidden_size
        for number, layer in enumerate(find_layers(model)):
            if config.get("layers") is not None and number not in config["layers"]:
                continue
            size = (config.get("layer_sizes") or {}).get(str(number), config["bottleneck_size"])
            self.layers[str(number)] = places = nn.ModuleDict()
            for place in config["places"]:
                places[place] = Bottleneck(hidden, size, config)
                hook(layer, place, config["reads"], self._edit(places[place]))

    def start(self) -> None:
        for module in self.modules():
            if isinstance(module, Bottleneck):
                module.start()

    def tensors(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.state_dict().items()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.load_state_dict(dict(tensors))

    def config(self) -> Mapping[str, Any]:
        return self._config

    def after_step(self, optimizer: Any, step: int) -> None:
        """Nothing happens between steps."""

    def before_step(self) -> None:
        """Nothing is added to the gradients."""

    def _edit(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda v_BTH: module(v_BTH) if self.active else torch.zeros_like(v_BTH)


def _projection(inputs: int, outputs: int, config: Mapping[str, Any]) -> Dense | Hypercomplex:
    terms = config.get("phm_dim")
    if terms is None:
        return Dense(inputs, outputs)
    return Hypercomplex(inputs, outputs, terms, config.get("phm_rank"))
