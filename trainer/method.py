"""One method of `hub train`: its options, the config they become on a base, and how that config is trained.

Imports torch only where a tuner is made: listing and validating need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from trainer.anatomy import Anatomy, names

if TYPE_CHECKING:
    from trainer.export import Finishing
    from trainer.tuner import Tuner


class Options(BaseModel):
    """What a user may set of one method; each subclass is one method's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Plan:
    """What a method must know of the run beside its options."""

    max_length: int
    gradient_checkpointing: bool


def peft_tuner() -> Tuner:
    from trainer.tuner import PeftTuner

    return PeftTuner()


def unchanged(options: Any, steps: int) -> Any:
    return options


def unnamed(options: Any, name: str) -> Any:
    return options


def nothing_beside(finishing: Finishing) -> None:
    """Most methods make one adapter."""


@dataclass(frozen=True)
class Method:
    """`named` fills in what follows from the name that a run is pushed under; `beside` completes the adapters of their
    own that lie in the folder of the one that needs them, before that one is measured.
    """

    name: str
    summary: str
    options: type[Options]
    learning_rate: float  # the default, where the recipe gives none
    config: Callable[[Any, Anatomy], Any]  # (options, anatomy) -> what the tuner takes: a PeftConfig, or our own
    problems: Callable[[Any, Anatomy, Plan], list[str]]
    tuner: Callable[[], Tuner] = peft_tuner
    settled: Callable[[Any, int], Any] = (
        unchanged  # (options, steps of the run) -> options; ValueError if they do not fit
    )
    named: Callable[[Any, str], Any] = unnamed  # (options, name) -> options; ValueError if they do not fit
    beside: Callable[[Finishing], None] = nothing_beside
    found_by_prompts: bool = True  # whether model auto may choose it; a router's prompts are those of its experts


def unknown_targets(targets: Iterable[str], anatomy: Anatomy) -> list[str]:
    problems = []
    for target in targets:
        if not anatomy.has_linear(target) and not names(target, anatomy.head):
            near = get_close_matches(target, anatomy.linear_names, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            problems.append(
                f"target {target} is not in the base{hint}; its linear modules: {', '.join(anatomy.linear_names)}"
            )
    return problems
