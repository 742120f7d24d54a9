"""LoRA experts for the oracles of routing, made on a tiny base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model

from tests.oracle.conftest import TinyBase
from tests.oracle.kinds import ATTENTION_AND_MLP, CONV1D, DEFAULT

# The second singular value over the first: PEFT's fifteen power iterations then leave 0.2 ** 30 of the second one.
GAP = 0.2


def make_expert(base: TinyBase, folder: Path, *, seed: int, rank: int = 4, **options: Any) -> Path:
    """A LoRA whose B A has one direction that stands out at every Linear, as PEFT needs it to find it."""
    targets, _ = ATTENTION_AND_MLP.get(base.architecture, DEFAULT)
    conv1d = base.architecture in CONV1D
    config = LoraConfig(
        r=rank, lora_alpha=3 * rank, target_modules=targets, fan_in_fan_out=conv1d, task_type="CAUSAL_LM", **options
    )
    torch.manual_seed(seed)
    get_peft_model(base.fresh(), config).save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    for name in tensors:
        if name.endswith("lora_A.weight"):
            partner = name.replace("lora_A", "lora_B")
            A, B = torch.randn_like(tensors[name]), torch.randn_like(tensors[partner])
            left, _, right = torch.linalg.svd(B @ A, full_matrices=False)
            stretch = torch.tensor([GAP**k for k in range(rank)])
            tensors[name] = right[:rank].contiguous()
            tensors[partner] = (left[:, :rank] * stretch).contiguous()
    safetensors.torch.save_file(tensors, path)
    return folder


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (length,), generator=generator).tolist()


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].float()
