"""An adapter of a kind that PEFT lacks, put on a stock network: `attach(model, folder)` loads what training saved.

The table of these kinds, by `peft_type`, and the two files of each. What is attached behaves like a PeftModel: the
network is called as before, and `model.disable_adapter()` is a context without the adapter.
Never reads a pickle, never changes a weight of the base.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from hub.manifest import CONFIG_FILE, WEIGHTS_FILE
from trainer.modules import router
from trainer.modules.biases import Biases
from trainer.modules.bottleneck import Bottlenecks
from trainer.modules.loreft import Interventions
from trainer.modules.sparse import SparseChanges, loaded_config


class Graft(Protocol):
    """A module that has hooked itself into a network. Its tensors are those of the file."""

    active: bool

    def start(self) -> None: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def fill(self, tensors: Mapping[str, Tensor]) -> None: ...

    def config(self) -> Mapping[str, Any]: ...

    def before_step(self) -> None: ...

    def after_step(self, optimizer: Any, step: int) -> None: ...


def as_saved(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    return config


@dataclass(frozen=True, slots=True)
class Family:
    """`build` puts the untrained module on a network; `loaded` makes its config of the saved one and its folder."""

    build: Callable[[Any, Mapping[str, Any]], Any]
    loaded: Callable[[Mapping[str, Any], Path], Mapping[str, Any]] = as_saved


FAMILIES: Final[Mapping[str, Family]] = {
    "BOTTLENECK": Family(Bottlenecks),
    "LOREFT": Family(Interventions),
    "BITFIT": Family(Biases),
    "SPARSE": Family(SparseChanges, lambda config, folder: loaded_config(config)),
    "LORA_MOE": Family(router.build, router.with_folder),
}


def attach(model: Any, folder: Path) -> Any:
    """Put a saved adapter on a stock network, in evaluation mode: one of ours by its module, any other by PEFT."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    family = FAMILIES.get(config["peft_type"])
    if family is None:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    graft = put_on(model, family.build(model, family.loaded(config, folder)))
    graft.fill(load_file(folder / WEIGHTS_FILE))
    return model.eval()


def put_on(model: Any, graft: Any) -> Any:
    """Register a module with its network, where the optimizer and `eval()` find it."""

    @contextmanager
    def disable_adapter() -> Iterator[None]:
        graft.active = False
        try:
            yield
        finally:
            graft.active = True

    model.graft = graft.to(device=model.device, dtype=torch.float32)
    model.disable_adapter = disable_adapter
    return graft


def write(graft: Graft, folder: Path, base_name: str) -> None:
    """The two files, the same bytes for the same adapter."""
    config = {**graft.config(), "base_model_name_or_path": base_name, "inference_mode": True}
    tensors = {name: value.cpu().clone().contiguous() for name, value in sorted(graft.tensors().items())}
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
