"""The demo's four adapters: trained from the recipes that ship with the package, pushed under `demo/`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from peft import PeftModel

from hub.base import find_base
from hub.contract import Hub, Pushed
from trainer.base import open_base
from trainer.demo.asking import Answer
from trainer.progress import Reporter
from trainer.recipe import Recipe, parse_recipe, read_fields
from trainer.tasks import TASKS, Task
from trainer.train import TrainResult, Workshop, train

BASE: Final = "seedling"
KINDS: Final = ("prompt", "prefix", "ia3", "lora")  # the last gets a better version while streams run
THREADS: Final = 1  # a network this small waits longer for a second thread than it gains by it
FIRST_TRY: Final = 0.15  # of the last one's steps: enough to answer, not enough to answer well


@dataclass(frozen=True)
class Lesson:
    kind: str
    recipe: Recipe

    @property
    def task(self) -> Task:
        return TASKS[self.recipe.data.path.removeprefix("task:").split(":")[0]]

    @property
    def name(self) -> str:
        return f"demo/{self.task.name}"


@dataclass(frozen=True)
class Version:
    """A trained adapter in the hub."""

    lesson: Lesson
    folder: Path
    result: TrainResult
    pushed: Pushed

    @property
    def label(self) -> str:
        return f"{self.pushed.name}@{self.pushed.version}"

    @property
    def weight_bytes(self) -> int:
        return (self.folder / "adapter_model.safetensors").stat().st_size


def shipped_lessons(recipes: Path) -> list[Lesson]:
    return [Lesson(kind, parse_recipe(read_fields(recipes / f"{kind}.yaml"), kind)) for kind in KINDS]


def first_try(lesson: Lesson) -> Lesson:
    """The same lesson, stopped far too early."""
    assert lesson.recipe.steps is not None
    return Lesson(lesson.kind, lesson.recipe.model_copy(update={"steps": max(1, int(lesson.recipe.steps * FIRST_TRY))}))


def learn(lesson: Lesson, folder: Path, hub: Hub, report: Reporter, *, note: str) -> Version:
    """Train and push; the note stands in the hub's log."""
    result = train(lesson.recipe, folder, workshop=Workshop(existing="overwrite", threads=THREADS), report=report)
    pushed = hub.push(folder, lesson.name, note=note, base=find_base(lesson.recipe.base))
    return Version(lesson, folder, result, pushed)


def peft_answers(version: Version, answers: list[Answer]) -> list[tuple[int, ...]]:
    """What PEFT alone, a batch of one, says to the same prompts: token ids without the end token."""
    base = open_base(BASE)
    model = PeftModel.from_pretrained(base.load_weights(torch.device("cpu")), version.folder).eval()
    said = []
    with torch.inference_mode():
        for answer in answers:
            ids = torch.tensor([answer.prompt_ids])
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
            new = out[0, ids.shape[1] :].tolist()
            said.append(tuple(token for token in new if token not in base.stops))
    return said
