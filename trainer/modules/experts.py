"""The LoRA experts that a router chooses among: how they come, as they are or to be trained on, and how they are saved.

At one Linear the factors of all experts lie one below the other: A (P, I), B (O, P), P the sum of their ranks. `Frozen`
holds them as they came. `Trained` adds what is learnt, A + rate * a and B + rate * b with a and b from zero: Adam then
moves an expert by `rate` of the learning rate, and weight decay draws it back to where it began. The LoRA scaling is
outside both.
What is saved is each expert's own folder again: its config as it was, the same tensors by name and rank.
Law: an expert that was saved and loaded adds, bit for bit, what it added in training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hub.families.method import TENSOR_PREFIX
from hub.manifest import CONFIG_FILE, WEIGHTS_FILE
from hub.pins import more_than_low_rank
from trainer.errors import ExpertUnfit

FACTOR_A, FACTOR_B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class Low:
    """One expert's factors at one Linear, and the LoRA scaling of their product."""

    A_rI: Tensor
    B_Or: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Expert:
    config: Mapping[str, Any]  # as in its adapter_config.json
    lows: Mapping[str, Low]  # by the Linear's name


class Frozen(nn.Module):
    """The experts at one Linear as they came, the scaling inside B."""

    A_PI: Tensor
    B_OP: Tensor
    owner_P: Tensor

    def __init__(self, lows: Sequence[Low | None]) -> None:
        super().__init__()
        A_PI, B_OP, owner_P, scale_P = _stacked(lows)
        _keep(self, A_PI=A_PI, B_OP=B_OP * scale_P, owner_P=owner_P)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        return ((x @ self.A_PI.t()) * gates[..., self.owner_P]) @ self.B_OP.t()


class Trained(nn.Module):
    """The experts at one Linear with what they have learnt; `owner_P` says whose each row of A is."""

    A_PI: Tensor
    B_OP: Tensor
    owner_P: Tensor
    scale_P: Tensor

    def __init__(self, lows: Sequence[Low | None], rate: float) -> None:
        super().__init__()
        A_PI, B_OP, owner_P, scale_P = _stacked(lows)
        _keep(self, A_PI=A_PI, B_OP=B_OP, owner_P=owner_P, scale_P=scale_P)
        self._rate = rate
        self.a_PI = nn.Parameter(torch.zeros_like(A_PI))
        self.b_OP = nn.Parameter(torch.zeros_like(B_OP))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as they are by now, without the scaling."""
        return self.A_PI + self._rate * self.a_PI, self.B_OP + self._rate * self.b_OP

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        A_PI, B_OP = self.factors()
        return ((x @ A_PI.t()) * gates[..., self.owner_P]) @ (B_OP * self.scale_P).t()


def _stacked(lows: Sequence[Low | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    there = [(number, low) for number, low in enumerate(lows) if low is not None]
    device = there[0][1].A_rI.device
    owners = [number for number, low in there for _ in range(low.A_rI.shape[0])]
    scales = [low.scaling for _, low in there for _ in range(low.A_rI.shape[0])]
    return (
        torch.cat([low.A_rI for _, low in there]),
        torch.cat([low.B_Or for _, low in there], dim=1),
        torch.tensor(owners, device=device),
        torch.tensor(scales, device=device),
    )


def _keep(module: nn.Module, **tensors: Tensor) -> None:
    """In no checkpoint: they come from the hub, by digest."""
    for name, value in tensors.items():
        module.register_buffer(name, value, persistent=False)


def load_expert(model: Any, folder: Path, reference: str) -> Expert:
    """A LoRA's factors as PEFT loads them onto this base, which is left as it was. Raises: ExpertUnfit."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    why = why_no_plain_lora(config, folder / WEIGHTS_FILE)
    if why is not None:
        raise ExpertUnfit(f"expert {reference} is no plain LoRA ({why}): experts are low-rank terms of Linears alone")
    loaded = PeftModel.from_pretrained(model, str(folder))
    lows = {}
    for name, module in loaded.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            A_rI, B_Or = (part["default"].weight.detach().clone() for part in (module.lora_A, module.lora_B))
            lows[name.removeprefix(TENSOR_PREFIX)] = Low(A_rI, B_Or, float(module.scaling["default"]))
    loaded.unload()
    return Expert(config, lows)


def why_no_plain_lora(config: Mapping[str, Any], weights: Path) -> str | None:
    """Why an adapter has more than two factors at some Linears, or None."""
    if config["peft_type"] != "LORA":
        return f"peft_type {config['peft_type']}"
    if more := ", ".join(more_than_low_rank(config)):
        return more
    with safe_open(weights, framework="pt") as tensors:
        names = list(tensors.keys())
    others = [name for name in names if not name.endswith((FACTOR_A, FACTOR_B))]
    return None if not others else f"it has a {others[0]}"


def write_expert(
    config: Mapping[str, Any], factors: Mapping[str, tuple[Tensor, Tensor]], folder: Path, base_name: str
) -> None:
    """The two files; the config as it was, so that PEFT scales the new factors as it scaled the old."""
    tensors = {}
    for name, (A_rI, B_Or) in sorted(factors.items()):
        tensors[f"{TENSOR_PREFIX}{name}{FACTOR_A}"] = A_rI.detach().cpu().clone().contiguous()
        tensors[f"{TENSOR_PREFIX}{name}{FACTOR_B}"] = B_Or.detach().cpu().clone().contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    text = json.dumps({**config, "base_model_name_or_path": base_name}, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
