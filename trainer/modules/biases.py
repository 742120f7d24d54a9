"""BitFit: the biases of Linear layers and norms, and nothing else. The format is ours, see hub/families/bitfit.py.

What is trained is how far each bias is from the base's, which starts at zero; saved is each bias whole.
Source: Ben Zaken et al. 2021 (arXiv:2106.10199).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from hub.targets import targets

ROOT: Final = "base_model.model."


class Biases(nn.Module):
    def __init__(self, model: Any, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.active = True
        self._config = config
        every = not config.get("target_modules")
        self._modules_by_name = {
            name: module
            for name, module in model.named_modules()
            if has_own_bias(module) and (every or targets(config, name))
        }
        self.shifts = nn.ParameterList(torch.zeros_like(module.bias) for module in self._modules_by_name.values())
        for module, shift in zip(self._modules_by_name.values(), self.shifts, strict=True):
            module.register_forward_hook(self._hook(shift))

    def start(self) -> None:
        """The untrained adapter changes nothing."""

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{ROOT}{name}.bias": module.bias.detach() + shift.detach()
            for (name, module), shift in zip(self._modules_by_name.items(), self.shifts, strict=True)
        }

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        for (name, module), shift in zip(self._modules_by_name.items(), self.shifts, strict=True):
            own = tensors[f"{ROOT}{name}.bias"].to(shift.device)
            shift.data = own.float() - module.bias.detach().float()

    def config(self) -> Mapping[str, Any]:
        return self._config

    def before_step(self) -> None:
        """Nothing is added to the gradients."""

    def after_step(self, optimizer: Any, step: int) -> None:
        """Nothing happens between steps."""

    def _hook(self, shift: Tensor) -> Any:
        def add(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            return out + shift if self.active else out

        return add


def has_own_bias(module: nn.Module) -> bool:
    """A Linear layer, a Conv1D or a norm that has a bias."""
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or bias is None or bias.dim() != 1:
        return False
    return weight.dim() == 1 or isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
