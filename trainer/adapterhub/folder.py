"""A folder that AdapterHub's `adapters` library saved, taken apart: its config, and its tensors by where they belong.

Never reads a pickle. Everything that is taken is taken once, so that what is left over can be refused by name.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.errors import ImportRefused

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter.safetensors"
PICKLE: Final = "pytorch_adapter.bin"
HEADS: Final = ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
WAY_OUT: Final = (
    "save it with use_safetensors=True, or write it anew where you trust it: "
    "save_file({k: v.clone() for k, v in torch.load('pytorch_adapter.bin', weights_only=True).items()}, "
    "'adapter.safetensors')"
)
# <layer or module>.<what `adapters` calls the place>.<name of the adapter>.<part>
PLACED: Final = re.compile(
    r"(?P<module>.+?)\.(?P<place>loras|attention_adapters\.adapters|output_adapters\.adapters|reft_layer\.refts)"
    r"\.(?P<name>[^.]+)\.(?P<part>.+)"
)
SHARED: Final = re.compile(r".*shared_parameters\.(?P<name>[^.]+)\.(?P<part>.+)")
PREFIX: Final = re.compile(r".*prefix_tunings\.(?P<name>[^.]+)\.self_prefix\.(?P<part>.+)")
LAYER: Final = re.compile(r".*\b(?:layers|h|layer)\.(\d+)\b.*")


@dataclass(slots=True)
class Placed:
    """The tensors of one place, by part."""

    module: str
    tensors: dict[str, Tensor]

    @property
    def layer(self) -> int:
        found = LAYER.fullmatch(self.module)
        if found is None:
            raise ImportRefused([f"{self.module} is in no numbered layer"])
        return int(found[1])

    def take(self, part: str) -> Tensor:
        if part not in self.tensors:
            raise ImportRefused([f"{self.module} lacks {part}"])
        return self.tensors.pop(part).float()


@dataclass(slots=True)
class Folder:
    """The `config` of the method, whole; `about` is what stands around it; `places` are keyed by place, then module."""

    config: dict[str, Any]
    about: dict[str, Any]
    places: dict[str, dict[str, Placed]]
    shared: dict[str, Tensor]
    prefix: dict[str, Tensor]

    def left_over(self) -> list[str]:
        """The tensors that nobody has taken."""
        found = [
            f"{one.module}: {part}" for group in self.places.values() for one in group.values() for part in one.tensors
        ]
        return [*found, *(f"shared: {part}" for part in self.shared), *(f"prefix: {part}" for part in self.prefix)]


def read_folder(path: Path) -> Folder:
    """Raises ImportRefused, naming what stands in the way and the way out."""
    about = _about(path)
    found = Folder(about.pop("config"), about, {}, {}, {})
    for key, tensor in _tensors(path).items():
        if match := PLACED.fullmatch(key):
            group = found.places.setdefault(match["place"].partition(".")[0], {})
            group.setdefault(match["module"], Placed(match["module"], {})).tensors[match["part"]] = tensor
        elif match := PREFIX.fullmatch(key):  # stands there once per layer, each time the same
            found.prefix[match["part"]] = tensor
        elif match := SHARED.fullmatch(key):
            found.shared[match["part"]] = tensor
        else:
            raise ImportRefused([f"{key} belongs to nothing that is imported"])
    return found


def _about(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ImportRefused([f"{path} is no folder"])
    if not (path / CONFIG).is_file():
        raise ImportRefused([f"{path} has no {CONFIG}"])
    try:
        about = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ImportRefused([f"{CONFIG} is no JSON: {error}"]) from None
    if isinstance(about, dict) and "peft_type" in about:
        raise ImportRefused(["this is an adapter in PEFT's format: hub push takes it as it is"])
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        raise ImportRefused([f"{CONFIG} has no config in it, as AdapterHub's library writes it"])
    heads = [name for name in HEADS if (path / name).exists()]
    if heads:
        raise ImportRefused([f"{heads[0]}: prediction heads are not converted; save the adapter with with_head=False"])
    return about


def _tensors(path: Path) -> dict[str, Tensor]:
    if not (path / WEIGHTS).is_file():
        pickled = (path / PICKLE).is_file()
        raise ImportRefused([f"{PICKLE} is a pickle, which is never read: {WAY_OUT}" if pickled else f"no {WEIGHTS}"])
    try:
        return dict(load_file(path / WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise ImportRefused([f"{WEIGHTS} cannot be read: {error}"]) from None
