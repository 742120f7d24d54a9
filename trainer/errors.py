"""What a user, a file or a base can make go wrong in training. The command line prints the message and exits 1.

TrainError
├── RecipeInvalid     the recipe file or the flags: every problem at once
├── RecipeChanged     a resumed run was started by another recipe
├── DataMissing       no such file, no such task
├── DataInvalid       rows that are malformed: each by file and line
├── DataUnusable      well-formed rows that leave nothing to train on, or nothing to hold out
├── BaseUnfit         the base cannot be trained here at all
├── MethodUnfit       this method cannot be trained on this base, and why
├── ExpertUnfit       an adapter that a router cannot have as an expert
├── TemplateUnfit     the base's chat template does not show which tokens are the assistant's
├── DeviceMissing     a device that was asked for and is not there
├── OutputExists      a folder that the run would have to overwrite
├── CheckpointCorrupt a checkpoint that does not fit the adapter being trained
├── Diverged          the loss is no longer a finite number
├── FusionRefused     adapters that no one file can hold the sum of, or a rank above the hub's limit
├── ExtractionRefused two models whose difference is no adapter
├── Interrupted       the run was asked to stop; it can be resumed
└── DemoFailed        something that the demo shows did not hold
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

PROBLEMS_SHOWN: Final = 20


class TrainError(Exception):
    """The root; its text is what the user reads."""


class RecipeInvalid(TrainError):
    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(listing(f"{source} is not a recipe that can be trained", problems))


class RecipeChanged(TrainError):
    def __init__(self, folder: Path, changes: Sequence[str]) -> None:
        self.changes = tuple(changes)
        super().__init__(
            listing(f"the run in {folder} was started by another recipe; --overwrite starts anew", changes)
        )


class DataMissing(TrainError):
    pass


class DataInvalid(TrainError):
    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        rows = "1 row is" if len(problems) == 1 else f"{len(problems)} rows are"
        super().__init__(listing(f"{rows} malformed", problems))


class DataUnusable(TrainError):
    pass


class ExpertUnfit(TrainError):
    pass


class BaseUnfit(TrainError):
    pass


class MethodUnfit(TrainError):
    def __init__(self, method: str, base: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(listing(f"{method} cannot be trained on {base} in this way", problems))


class TemplateUnfit(TrainError):
    pass


class DeviceMissing(TrainError):
    pass


class OutputExists(TrainError):
    pass


class CheckpointCorrupt(TrainError):
    pass


class Diverged(TrainError):
    def __init__(self, step: int, loss: float, learning_rate: float) -> None:
        self.step = step
        super().__init__(f"the loss is {loss} at step {step}: a learning rate below {learning_rate:g} may hold")


class FusionRefused(TrainError):
    pass


class ExtractionRefused(TrainError):
    pass


class Interrupted(TrainError):
    def __init__(self, folder: Path, step: int, steps: int) -> None:
        self.folder, self.step = folder, step
        super().__init__(f"stopped at step {step} of {steps}; the same command with --resume goes on from {folder}")


def listing(headline: str, problems: Sequence[str]) -> str:
    """Join a headline and its problems: one stays on the line, several go below it, a flood is counted."""
    if len(problems) == 1:
        return f"{headline}: {problems[0]}"
    shown = [f"  {problem}" for problem in problems[:PROBLEMS_SHOWN]]
    if len(problems) > PROBLEMS_SHOWN:
        shown.append(f"  ... and {len(problems) - PROBLEMS_SHOWN} more")
    return "\n".join([f"{headline}:", *shown])


class DemoFailed(TrainError):
    pass
