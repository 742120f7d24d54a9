"""LoReFT: h + R'(act(W h + b) - R h) on the output of decoder layers, at the first and last tokens of the prompt.

Positions are pyreft's: of a prompt of n tokens the first min(p, n // 2) and the last min(s, n // 2); what is generated
is never edited. The prompt of a row that is trained on is what stands before its first learnt token. R has orthonormal
rows, which training keeps (torch's orthogonal parametrization).
Source: Wu et al. 2024 (arXiv:2404.03592); format: docs/decisions/0017.

B batch, T tokens, H hidden size, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import orthogonal

from trainer.modules.bottleneck import ACTIVATIONS
from trainer.modules.places import Layer, find_layers, hook

PROMPT_LENGTHS: Final = "prompt_lengths"  # of a batch: tokens per row, padding not counted
_POSITIONS: Final = re.compile(r"(?:f(\d+))?\+?(?:l(\d+))?")


def ends_of(positions: str) -> tuple[int, int]:
    """How many of the first and of the last tokens `f4+l4` means."""
    first, last = _POSITIONS.fullmatch(positions).groups()  # type: ignore[union-attr]  # checked where it comes in
    return int(first or 0), int(last or 0)


class Intervention(nn.Module):
    """One f(h) = R'(act(W h + b) - R h)."""

    def __init__(self, hidden: int, rank: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.rotate_layer = nn.Linear(hidden, rank, bias=False)
        self.learned_source = nn.Linear(hidden, rank)
        self._activation = ACTIVATIONS[config.get("non_linearity") or "none"]
        self._subtract = 1.0 if config.get("subtract_projection", True) else 0.0
        self._dropout = float(config.get("dropout") or 0.0)

    def start(self) -> None:
        """R a random rotation, W = R and b = 0: the untrained adapter changes nothing but for an activation."""
        orthogonal(self.rotate_layer)
        with torch.no_grad():
            self.learned_source.weight.copy_(self.rotate_layer.weight * self._subtract)
            self.learned_source.bias.zero_()

    def forward(self, h_BTH: Tensor) -> Tensor:
        R_rH = self.rotate_layer.weight
        made_BTr = self._activation(self.learned_source(h_BTH)) - self._subtract * (h_BTH @ R_rH.T)
        return functional.dropout(made_BTr @ R_rH, self._dropout, self.training)


class Interventions(nn.Module):
    """The interventions of all layers, and which tokens of the batch at hand are edited."""

    def __init__(self, model: Any, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.active = True
        self._config = config
        self._ends = ends_of(config["positions"])
        self._masks: dict[str, Tensor] = {}
        self.layers = nn.ModuleDict()
        hidden = model.config.get_text_config().hidden_size
        both = all(self._ends) and not config.get("tied_weights")
        for number, layer in enumerate(find_layers(model)):
            if config.get("layers") is not None and number not in config["layers"]:
                continue
            made = [Intervention(hidden, config["r"], config) for _ in range(1 + both)]
            units = dict(zip(("first", "last") if both else ("ends",), made, strict=True))
            self.layers[str(number)] = nn.ModuleDict(dict(units)) if both else made[0]
            self._hook(layer, units)
        model.register_forward_pre_hook(self._read_prompt, with_kwargs=True)

    def start(self) -> None:
        for module in list(self.modules()):
            if isinstance(module, Intervention):
                module.start()

    def tensors(self) -> dict[str, Tensor]:
        """As they are saved: of R the matrix itself, not what training keeps it orthonormal with."""
        found = {}
        for name, module in self.named_modules():
            if isinstance(module, Intervention):
                found[f"{name}.rotate_layer.weight"] = module.rotate_layer.weight.detach()
                for part, value in module.learned_source.state_dict().items():
                    found[f"{name}.learned_source.{part}"] = value
        return found

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.load_state_dict(dict(tensors))

    def config(self) -> Mapping[str, Any]:
        return self._config

    def after_step(self, optimizer: Any, step: int) -> None:
        """Nothing happens between steps."""

    def before_step(self) -> None:
        """Nothing is added to the gradients."""

    def _hook(self, layer: Layer, units: Mapping[str, Intervention]) -> None:
        def edit(h_BTH: Tensor) -> Tensor:
            made_BTH = torch.zeros_like(h_BTH)
            if not self.active or not self._masks:
                return made_BTH
            for end, unit in units.items():
                made_BTH = torch.where(self._masks[end], unit(h_BTH), made_BTH)
            return made_BTH

        hook(layer, "mlp", "stream", edit)

    def _read_prompt(self, model: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Which tokens are edited in this forward; none in a step of decoding, whose cache holds the prompt."""
        rest = {name: value for name, value in kwargs.items() if name != PROMPT_LENGTHS}
        lengths_B, cache = kwargs.get(PROMPT_LENGTHS), kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            self._masks = {}
            return args, rest
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask_BT = kwargs.get("attention_mask")
        mask_BT = torch.ones_like(ids) if mask_BT is None else mask_BT
        self._masks = masks(mask_BT, mask_BT.sum(dim=1) if lengths_B is None else lengths_B, self._ends)
        return args, rest


def masks(attention_BT: Tensor, lengths_B: Tensor, ends: tuple[int, int]) -> dict[str, Tensor]:
    """The edited tokens, (B, T, 1): at the beginning, at the end, and at both. Rows may be padded on either side."""
    first, last = ends
    position_BT = torch.arange(attention_BT.shape[1], device=attention_BT.device) - attention_BT.argmax(dim=1)[:, None]
    half_B1, length_B1 = (lengths_B // 2)[:, None], lengths_B[:, None]
    at_first = (position_BT >= 0) & (position_BT < half_B1.clamp(max=first))
    at_last = (position_BT >= length_B1 - half_B1.clamp(max=last)) & (position_BT < length_B1)
    return {"first": at_first[..., None], "last": at_last[..., None], "ends": (at_first | at_last)[..., None]}
