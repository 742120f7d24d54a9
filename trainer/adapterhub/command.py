"""`hub import`: a folder that AdapterHub's `adapters` library saved becomes one that `hub push` takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from hub.base import conv1d_layers, describe_base, find_base, modules
from trainer.adapterhub.convert import Foundation, convert
from trainer.adapterhub.folder import read_folder
from trainer.base import NO_REMOTE_CODE
from trainer.errors import ImportRefused, OutputExists

ROTATED: Final = ("llama", "mistral")  # among those for which `adapters` has prefix tuning
KNOWN_ROPE: Final = ("default", "linear", "llama3")  # the same for every length of a sequence


def import_folder(source: Path, out: Path, base: str | None) -> str:
    """Convert `source` into `out`, which must not be there; return the kind that it became. Raises ImportRefused."""
    if out.exists():
        raise OutputExists(f"{out} is already there")
    folder = read_folder(source)
    name = base or folder.about.get("model_name")
    if not name:
        raise ImportRefused(["its config names no base (model_name); give --base"])
    path = find_base(name)
    foundation = lay_foundation(path)
    if folder.about.get("hidden_size") not in (None, foundation.base.hidden_size):
        raise ImportRefused([
            f"hidden_size {folder.about['hidden_size']}, but base {name} has {foundation.base.hidden_size}"
        ])  # fmt: skip
    converted = convert(folder, foundation)
    config = {**converted.config, "base_model_name_or_path": name, "inference_mode": True}
    staging = out.with_name(f".{out.name}.importing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tensors = {key: value.contiguous() for key, value in sorted(converted.tensors.items())}
    save_file(tensors, staging / "adapter_model.safetensors", {"format": "pt"})
    (staging / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    staging.rename(out)
    return str(config["peft_type"])


def lay_foundation(path: Path) -> Foundation:
    base, found = describe_base(path), modules(path)
    return Foundation(
        base=base,
        linears=found.linears,
        biased=found.biased or frozenset(),
        conv1d=bool(conv1d_layers(base.model_type)),
        turned=key_turner(path),
    )


def key_turner(path: Path) -> Callable[[Tensor, int], Tensor]:
    """Turn keys by so many positions, as the base's rotary embedding would."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config: Any = AutoConfig.from_pretrained(path, **NO_REMOTE_CODE)

    def turned(keys: Tensor, positions: int) -> Tensor:
        if config.model_type not in ROTATED:
            raise ImportRefused([
                f"a prefix on {config.model_type}: that of `adapters` takes no positions, for which only rotated keys "
                f"make up ({', '.join(ROTATED)})"
            ])  # fmt: skip
        if getattr(config, "sliding_window", None) is not None:
            raise ImportRefused([f"a prefix under a sliding window of {config.sliding_window}"])
        rope = config.rope_parameters
        if rope["rope_type"] not in KNOWN_ROPE:
            raise ImportRefused([f"a prefix under rope_type {rope['rope_type']}; these are: {', '.join(KNOWN_ROPE)}"])
        head_dim = keys.shape[-1]
        if rope["rope_type"] == "default":
            frequencies = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        else:
            frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        angle = (positions * frequencies.double()).repeat(2)
        first, second = keys.double().chunk(2, dim=-1)
        return (keys * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()).float()

    return turned
