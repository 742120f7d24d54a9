"""Methods that change few entries of the base's weights: lottery-ticket tuning and diff pruning."""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field

from trainer.anatomy import Anatomy, names
from trainer.families.edits import GENERAL, module_tuner
from trainer.method import Method, Options, Plan, unknown_targets


class SparseOptions(Options):
    density: float = Field(0.005, gt=0, le=1, description="share of the targets' weights that is changed")
    search_steps: int | None = Field(
        None, ge=1, description="steps of training all of them, to find those; default: half of the run"
    )
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="modules to change; default: every linear one"
    )


class DiffPruningOptions(SparseOptions):
    gate_price: float = Field(1.0, ge=0, description="price on the share of gates that is open, beside the loss")


def lt_sft_config(options: SparseOptions, anatomy: Anatomy) -> dict[str, Any]:
    return {**shared(options, anatomy), "algorithm": "lt-sft", "gate_price": 0.0}


def diff_pruning_config(options: DiffPruningOptions, anatomy: Anatomy) -> dict[str, Any]:
    return {**shared(options, anatomy), "algorithm": "diff-pruning", "gate_price": options.gate_price}


def shared(options: SparseOptions, anatomy: Anatomy) -> dict[str, Any]:
    wanted = options.targets
    targets = [module for module in anatomy.linears if wanted is None or any(names(one, module) for one in wanted)]
    return {
        **GENERAL,
        "peft_type": "SPARSE",
        "density": options.density,
        "targets": targets,
        "search_steps": options.search_steps or 1,
    }


def sparse_problems(options: SparseOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    head = [
        f"target {target} is the output head, of which these methods change nothing: try lora or shira"
        for target in options.targets or ()
        if names(target, anatomy.head)
    ]
    return head + unknown_targets(options.targets or (), anatomy)


def sparse_settled(options: SparseOptions, steps: int) -> SparseOptions:
    """Raises ValueError where no step is left to train what was found."""
    search = options.search_steps or max(1, steps // 2)
    if search >= steps:
        raise ValueError(f"search_steps {search} leaves none of {steps} steps to train what was found")
    return options.model_copy(update={"search_steps": search})


LT_SFT: Final = Method(
    "lt-sft",
    "changes the few entries of the weights that a full fine-tune moves most (lottery tickets); teaches new skills",
    SparseOptions, 1e-3, lt_sft_config, sparse_problems, module_tuner, sparse_settled,
)  # fmt: skip
DIFF_PRUNING: Final = Method(
    "diff-pruning",
    "changes few entries of the weights, found by gates that have a price; teaches new skills",
    DiffPruningOptions, 1e-3, diff_pruning_config, sparse_problems, module_tuner, sparse_settled,
)  # fmt: skip
