"""AdaLoRA: PEFT's, with what it does between steps, and with a memory that a checkpoint holds.

PEFT decides after each step which triplets to cut, from running means of their importance; a run that goes on from a
checkpoint must remember those, and what was cut. Its price on factors that are not orthogonal is added to the model's
own loss, which TRL does not use: here it is put onto the gradients.
Source: Zhang et al. 2023 (arXiv:2303.10512); peft 0.21.2, tuners/adalora/layer.py and model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from trainer.encode import Encoded
from trainer.tuner import Batches, PeftTuner

ADAPTER: Final = "default"
MEANS: Final = ("exp_avg_ipt", "exp_avg_unc")


class AdaloraTuner:
    def __init__(self) -> None:
        self._peft = PeftTuner()

    def attach(self, model: Any, config: Any, batches: Batches) -> Any:
        made = self._peft.attach(model, config, batches)
        made.kept_triplets = {
            name: torch.ones(len(value), dtype=torch.bool) for name, value in _own(made).items() if "lora_E" in name
        }
        made.triplets_cut = torch.tensor(False)
        return made

    def collate(self, rows: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
        return self._peft.collate(rows, pad)

    def state(self, model: Any) -> dict[str, Tensor]:
        allocator = model.base_model.rankallocator
        found = self._peft.state(model)
        for name, value in _own(model).items():
            allocator.ipt.setdefault(name, torch.zeros_like(value))  # else PEFT starts the means anew
            for mean in MEANS:
                found[f"{mean}.{name}"] = getattr(allocator, mean).setdefault(name, torch.zeros_like(value))
        kept = {f"kept.{name}": value for name, value in model.kept_triplets.items()}
        return {**found, **kept, "triplets_cut": model.triplets_cut}

    def before_step(self, model: Any) -> None:
        """The gradient of how far the factors are from orthogonal."""
        factors = [(name, value) for name, value in _own(model).items() if "lora_E" not in name]
        weight = model.peft_config[ADAPTER].orth_reg_weight / len(factors)
        total = torch.zeros((), device=model.device)
        for name, value in factors:
            gram = value @ value.T if "lora_A" in name else value.T @ value
            total = total + torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device))
        (weight * total).backward()

    def after_step(self, model: Any, optimizer: Any, step: int) -> None:
        config = model.peft_config[ADAPTER]
        if bool(model.triplets_cut):
            config.rank_pattern = {name: kept.tolist() for name, kept in model.kept_triplets.items()}
        model.base_model.update_and_allocate(step)
        if config.rank_pattern:
            model.triplets_cut.fill_(True)
            for name, kept in config.rank_pattern.items():
                model.kept_triplets[name].copy_(torch.tensor(kept))

    def save(self, model: Any, folder: Path, base_name: str) -> None:
        if bool(model.triplets_cut):  # also of a run that did nothing but load its last checkpoint
            kept = {name: value.tolist() for name, value in model.kept_triplets.items()}
            model.peft_config[ADAPTER].rank_pattern = kept
        self._peft.save(model, folder, base_name)


def _own(model: Any) -> dict[str, Any]:
    """What is trained, under the names by which PEFT's allocator knows it."""
    return {
        name: value
        for name, value in model.base_model.model.named_parameters()
        if ".lora_" in name and f".{ADAPTER}" in name and value.requires_grad
    }
