"""Adapters to measure with, in PEFT's format, random and unlike each other.

LoRA folders are written straight to disk, so that a thousand cost seconds; other kinds are made by PEFT itself, on the
base that they are for. Made once, under .bench/adapters/BASE/.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

from benchmarks.bases import Base, load_base
from benchmarks.install import ROOT

WEIGHTS = peft.utils.SAFETENSORS_WEIGHTS_NAME
ALPHA = 16
SPREAD = 0.02  # of random values: large enough to change what the base says
MODULES = [name.split(".")[1] for name in Base("", 1, 1, 1, 1, 1).linears]
MIXED_RANKS = (8, 16, 32, 64)
CAUSAL: Mapping[str, Any] = {"task_type": "CAUSAL_LM"}

# What stands for each family of primitives: low rank alone, with scales, scales alone, rotations, KV prefixes, soft
# prompts, sparse entries, norms.
KINDS: Mapping[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=8, lora_alpha=ALPHA, target_modules=MODULES, init_lora_weights=False, **CAUSAL),
    "dora": lambda: peft.LoraConfig(
        r=8, lora_alpha=ALPHA, target_modules=MODULES, init_lora_weights=False, use_dora=True, **CAUSAL
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL
    ),
    "vera": lambda: peft.VeraConfig(r=64, target_modules=["q_proj", "v_proj"], **CAUSAL),
    "oft": lambda: peft.OFTConfig(oft_block_size=32, r=0, target_modules=["q_proj", "v_proj"], **CAUSAL),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=16, **CAUSAL),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=16, **CAUSAL),
    "ln-tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], **CAUSAL),
}


def lora(base: Base, rank: int, number: int) -> Path:
    """LoRA on all seven Linears of every layer, bf16. Its number is its seed."""
    return _once(base, f"lora-r{rank}-{number}", lambda folder: _write_lora(base, rank, number, folder))


def loras(base: Base, count: int, rank: int = 8) -> list[Path]:
    return [lora(base, rank, number) for number in range(count)]


def mixed_ranks(base: Base, count: int) -> list[Path]:
    return [lora(base, MIXED_RANKS[number % len(MIXED_RANKS)], number) for number in range(count)]


def mixed_kinds(base: Base, count: int) -> list[Path]:
    """The kinds in turn, so that neighbours in a batch differ."""
    return [other_kind(base, list(KINDS)[number % len(KINDS)], number) for number in range(count)]


def other_kind(base: Base, kind: str, number: int) -> Path:
    return _once(base, f"{kind}-{number}", lambda folder: _write_kind(base, kind, number, folder))


def rank_of(adapter: Path) -> int:
    """0 where its kind has none."""
    config = json.loads((adapter / peft.utils.CONFIG_NAME).read_text(encoding="utf-8"))
    return int(config.get("r") or 0)


def _once(base: Base, name: str, write: Callable[[Path], None]) -> Path:
    folder = ROOT / "adapters" / base.name / name
    if not (folder / WEIGHTS).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder)
    return folder


def _write_lora(base: Base, rank: int, seed: int, folder: Path) -> None:
    rng = torch.Generator().manual_seed(seed)

    def random(shape: Sequence[int]) -> torch.Tensor:
        return (SPREAD * torch.randn(*shape, generator=rng)).to(torch.bfloat16)

    tensors = {}
    for layer in range(base.layers):
        for name, (outputs, inputs) in base.linears.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{place}.lora_A.weight"] = random((rank, inputs))
            tensors[f"{place}.lora_B.weight"] = random((outputs, rank))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": MODULES,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / peft.utils.CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _write_kind(base: Base, kind: str, seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    model = peft.get_peft_model(load_base(base, torch.bfloat16), KINDS[kind]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(SPREAD * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
