"""How an adapter is put on a base, trained and saved, whatever makes it: PEFT, or a module of ours (`trainer.modules`).

The training loop knows only this protocol. What is loaded behaves like a PeftModel: it is called as the base is, and
`disable_adapter()` is a context without the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import get_peft_model
from torch import Tensor

from trainer.encode import Encoded
from trainer.evaluate import pad_right
from trainer.export import settle_config
from trainer.modules.attach import FAMILIES, put_on, write
from trainer.modules.loreft import PROMPT_LENGTHS

# Batches of the rows that will be trained on, for what is initialised from data.
Batches = Callable[[], Iterable[Mapping[str, Tensor]]]


def no_batches() -> Iterable[Mapping[str, Tensor]]:
    return ()


class Tuner(Protocol):
    def attach(self, model: Any, config: Any, batches: Batches) -> Any:
        """Put an untrained adapter on the base; what is to be trained, and nothing else, requires a gradient."""

    def collate(self, rows: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
        """Make the batch that the model takes."""

    def state(self, model: Any) -> dict[str, Tensor]:
        """Every tensor, live, that a checkpoint must hold beside the optimizer's."""

    def before_step(self, model: Any) -> None:
        """The gradients of a step are there."""

    def after_step(self, model: Any, optimizer: Any, step: int) -> None:
        """The optimizer has done step number `step`; the gradients are still there."""

    def save(self, model: Any, folder: Path, base_name: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors, the same bytes for the same adapter."""


class PeftTuner:
    """What PEFT trains and saves by itself."""

    def attach(self, model: Any, config: Any, batches: Batches) -> Any:
        return get_peft_model(model, config)

    def collate(self, rows: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
        return pad_right(rows, pad)

    def state(self, model: Any) -> dict[str, Tensor]:
        return {name: value for name, value in model.named_parameters() if value.requires_grad}

    def before_step(self, model: Any) -> None:
        """Nothing is added to the gradients."""

    def after_step(self, model: Any, optimizer: Any, step: int) -> None:
        """Nothing happens between steps."""

    def save(self, model: Any, folder: Path, base_name: str) -> None:
        """Save what PEFT saves, with the base by the name that the user gave and every list in order."""
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        settle_config(folder, base_name)
        (folder / "README.md").unlink(
            missing_ok=True
        )  # PEFT's template; ours is written when there is something to say


class ModuleTuner:
    """What a module of ours trains: `model.graft`, on a stock network whose own parameters are frozen."""

    def attach(self, model: Any, config: Any, batches: Batches) -> Any:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        graft = put_on(model, FAMILIES[config["peft_type"]].build(model, config))
        graft.start()
        return model

    def collate(self, rows: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
        return pad_right(rows, pad)

    def state(self, model: Any) -> dict[str, Tensor]:
        return dict(model.graft.state_dict(keep_vars=True))

    def before_step(self, model: Any) -> None:
        model.graft.before_step()

    def after_step(self, model: Any, optimizer: Any, step: int) -> None:
        model.graft.after_step(optimizer, step)

    def save(self, model: Any, folder: Path, base_name: str) -> None:
        write(model.graft, folder, base_name)


class PromptReadingTuner(ModuleTuner):
    """A module that must know where each row's prompt ends."""

    def collate(self, rows: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
        return {**pad_right(rows, pad), PROMPT_LENGTHS: torch.tensor([len(row.prompt) for row in rows])}


class RouterTuner(PromptReadingTuner):
    """A router, which saves the experts that were trained with it."""

    def save(self, model: Any, folder: Path, base_name: str) -> None:
        super().save(model, folder, base_name)
        model.graft.write_experts(folder, base_name)
