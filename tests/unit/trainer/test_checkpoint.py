"""Which checkpoints count."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.checkpoint import COMPLETE, TRAINED, checkpoints, latest, load_trained, seal
from trainer.errors import CheckpointCorrupt


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for step in (5, 10, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(bytes([step]) * 100)
        seal(folder)
    return tmp_path


def test_the_newest_complete_checkpoint_is_the_latest(work: Path) -> None:
    assert [path.name for path in checkpoints(work)] == ["checkpoint-100", "checkpoint-10", "checkpoint-5"]
    assert latest(work) == work / "checkpoint-100"


def test_a_checkpoint_that_was_not_sealed_is_passed_over(work: Path) -> None:
    (work / "checkpoint-100" / COMPLETE).unlink()
    assert latest(work) == work / "checkpoint-10"


@pytest.mark.parametrize("damage", ["short", "gone", "changed"])
def test_a_checkpoint_whose_bytes_changed_is_passed_over(work: Path, damage: str) -> None:
    path = work / "checkpoint-100" / "optimizer.pt"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + (b"x" if damage == "changed" else b""))
    assert latest(work) == work / "checkpoint-10"


def test_a_folder_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "saved", [{}, {"weight": torch.zeros(3, 2)}, {"weight": torch.zeros(2, 3), "b": torch.ones(1)}]
)
def test_tensors_of_another_adapter_are_refused(saved: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(saved, tmp_path / TRAINED)
    with pytest.raises(CheckpointCorrupt, match="does not hold this adapter"):
        load_trained(torch.nn.Linear(3, 2, bias=False).state_dict(), tmp_path / TRAINED)
