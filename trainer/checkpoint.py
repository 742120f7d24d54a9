"""Checkpoints from which any method resumes exactly: each trained tensor, optimizer, schedule, step, generators.

transformers' own checkpoints of a PEFT model hold the adapter as it is served, and PEFT refuses to train a
prompt-learning adapter on from that (the network behind a p-tuning prompt is gone). Ours hold what is trained, and
what a method remembers between steps.
Law: a run that was stopped anywhere, kill -9 included, and resumed makes the same bytes as one that was not. A
checkpoint counts once its `complete.json` holds the digest of every other file; before that it is passed over.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from trainer.errors import CheckpointCorrupt
from trainer.tuner import Tuner

TRAINED: Final = "trained.safetensors"
COMPLETE: Final = "complete.json"
KEPT: Final = 2  # the newest may be half-written when the process dies


class Checkpoints:
    """What a trainer of transformers does for a checkpoint, ours in the place of its own, and no model card."""

    args: Any
    state: Any
    model: Any
    tuner: Tuner  # set before it trains

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.tuner.state(self.model)
        save_file({name: value.detach().clone().contiguous() for name, value in state.items()}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.tuner.state(self.model), Path(resume_from_checkpoint) / TRAINED)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        seal(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Never of what a parametrization holds: torch's orthogonal one reads signs off its diagonal, as integers."""
        found: list[str] = super().get_decay_parameter_names(model)  # type: ignore[misc]
        return [name for name in found if "parametrizations" not in name]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass


class CheckpointingTrainer(Checkpoints, SFTTrainer):
    """TRL's trainer, which computes the output head outside its module, and only where something is learnt.

    What is trained over a quantised base stays in fp32, which TRL would round to bfloat16.
    """

    def __init__(self, *, model: Any, **options: Any) -> None:
        whole = {name: value.data for name, value in model.named_parameters() if value.requires_grad}
        super().__init__(model=model, **options)
        for name, value in model.named_parameters():
            if name in whole and value.dtype != whole[name].dtype:
                value.data = whole[name]


def load_trained(wanted: Mapping[str, Any], path: Path) -> None:
    """Copy a checkpoint's tensors into those of a model. Raises CheckpointCorrupt unless names and shapes agree."""
    saved: Mapping[str, Any] = load_file(path)
    misfits = sorted(saved.keys() ^ wanted.keys())
    misfits += [name for name in sorted(saved.keys() & wanted.keys()) if saved[name].shape != wanted[name].shape]
    if misfits:
        raise CheckpointCorrupt(f"{path} does not hold this adapter: {misfits[0]} differs, of {len(misfits)} tensors")
    for name, value in wanted.items():
        value.data.copy_(saved[name])


def seal(folder: Path) -> None:
    """Mark a checkpoint as complete, with the digests by which that can be told again."""
    digests = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != COMPLETE}
    aside = folder / f".{COMPLETE}"
    aside.write_text(json.dumps(digests, indent=1), encoding="utf-8")
    aside.rename(folder / COMPLETE)


def is_complete(folder: Path) -> bool:
    if not (folder / COMPLETE).is_file():
        return False
    digests: Mapping[str, str] = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in digests.items())


def checkpoints(work: Path) -> list[Path]:
    """List the checkpoints in a run's folder, newest first, complete or not."""
    found = [path for path in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def latest(work: Path) -> Path | None:
    return next((path for path in checkpoints(work) if is_complete(path)), None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
