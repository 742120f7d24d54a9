"""Methods of PEFT that adapt Linear layers, beside LoRA and IA3: each its options and the PEFT config they become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pydantic import Field, model_validator

from trainer.anatomy import Anatomy
from trainer.method import Method, Options, Plan, unknown_targets

if TYPE_CHECKING:
    from trainer.tuner import Tuner


class LinearOptions(Options):
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="modules to adapt; default: every linear one"
    )


class AdaloraOptions(LinearOptions):
    rank: int = Field(12, ge=2, description="rank at the start")
    target_rank: int = Field(8, ge=1, description="mean rank at the end, spread over the modules by importance")
    alpha: float | None = Field(None, gt=0, description="the delta is scaled by alpha / rank; default: twice the rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the factors")
    hold_steps: int | None = Field(None, ge=0, description="steps before ranks are cut; default: a tenth of the run")
    final_steps: int | None = Field(None, ge=0, description="steps after the last cut; default: a third of the run")
    total_steps: int | None = Field(None, ge=1, description="steps of the run, which is what it is set to")

    @model_validator(mode="after")
    def something_is_cut(self) -> AdaloraOptions:
        if self.target_rank >= self.rank:
            raise ValueError(f"target_rank {self.target_rank} must be below rank {self.rank}")
        return self


class VeraOptions(LinearOptions):
    rank: int = Field(64, ge=1, description="rank of the random pair that all modules share")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the pair")


class LohaOptions(LinearOptions):
    rank: int = Field(4, ge=1, description="rank of each of the two products; their product has its square")
    alpha: float | None = Field(None, gt=0, description="the delta is scaled by alpha / rank; default: the rank")

    @property
    def saved_rank(self) -> int:
        return self.rank**2


class HraOptions(LinearOptions):
    rank: int = Field(8, ge=2, multiple_of=2, description="number of Householder reflections, which start in pairs")
    gram_schmidt: bool = Field(False, description="make the reflections orthogonal to each other")


class MissOptions(LinearOptions):
    rank: int = Field(8, ge=1, description="number of sums of the input's features")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input")


class DeloraOptions(LinearOptions):
    rank: int = Field(8, ge=1, description="number of normed directions")
    strength: float = Field(15.0, gt=0, description="first value of the learned bound of the change (lambda)")


class BeftOptions(LinearOptions):
    pass


def shared(options: LinearOptions, anatomy: Anatomy) -> dict[str, Any]:
    return {"task_type": "CAUSAL_LM", "target_modules": list(options.targets or anatomy.linear_names)}


def adalora_config(options: AdaloraOptions, anatomy: Anatomy) -> Any:
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        **shared(options, anatomy),
        init_r=options.rank,
        target_r=options.target_rank,
        lora_alpha=2 * options.rank if options.alpha is None else options.alpha,
        lora_dropout=options.dropout,
        tinit=options.hold_steps or 0,
        tfinal=options.final_steps or 0,
        total_step=options.total_steps or 1,
        fan_in_fan_out=anatomy.conv1d,
    )


def adalora_settled(options: AdaloraOptions, steps: int) -> AdaloraOptions:
    """Raises ValueError where the phases are longer than the run."""
    hold = steps // 10 if options.hold_steps is None else options.hold_steps
    final = steps // 3 if options.final_steps is None else options.final_steps
    if options.total_steps not in (None, steps):
        raise ValueError(f"total_steps {options.total_steps} is not what the run has, which is {steps}")
    if hold + final >= steps:
        raise ValueError(f"hold_steps {hold} and final_steps {final} leave none of {steps} steps to cut ranks in")
    return options.model_copy(update={"hold_steps": hold, "final_steps": final, "total_steps": steps})


def adalora_tuner() -> Tuner:
    from trainer.adalora_tuner import AdaloraTuner

    return AdaloraTuner()


def vera_config(options: VeraOptions, anatomy: Anatomy) -> Any:
    from peft import VeraConfig

    return VeraConfig(
        **shared(options, anatomy), r=options.rank, vera_dropout=options.dropout, fan_in_fan_out=anatomy.conv1d
    )


def loha_config(options: LohaOptions, anatomy: Anatomy) -> Any:
    from peft import LoHaConfig

    return LoHaConfig(**shared(options, anatomy), r=options.rank, alpha=options.alpha or options.rank)


def hra_config(options: HraOptions, anatomy: Anatomy) -> Any:
    from peft import HRAConfig

    return HRAConfig(**shared(options, anatomy), r=options.rank, apply_GS=options.gram_schmidt)


def miss_config(options: MissOptions, anatomy: Anatomy) -> Any:
    from peft import MissConfig

    return MissConfig(**shared(options, anatomy), r=options.rank, miss_dropout=options.dropout)


def delora_config(options: DeloraOptions, anatomy: Anatomy) -> Any:
    from peft import DeloraConfig

    return DeloraConfig(**shared(options, anatomy), r=options.rank, delora_lambda=options.strength)


def beft_config(options: BeftOptions, anatomy: Anatomy) -> Any:
    from peft import BeftConfig

    return BeftConfig(**shared(options, anatomy))


def linear_problems(options: LinearOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    return unknown_targets(options.targets or (), anatomy)


def problems_without_conv1d(options: LinearOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    problems = linear_problems(options, anatomy, plan)
    if anatomy.conv1d:
        problems.append(f"{anatomy.architecture} has Conv1D modules, on which PEFT has no such adapter: try lora")
    return problems


LINEARS: Final = (
    Method(
        "adalora",
        "a LoRA whose ranks are cut while it trains, where they matter least; teaches new skills",
        AdaloraOptions, 2e-3, adalora_config, linear_problems, adalora_tuner, adalora_settled,
    ),
    Method(
        "vera",
        "trains two vectors beside each linear module, around a random pair of matrices that all share; tiny",
        VeraOptions, 1e-2, vera_config, linear_problems,
    ),
    Method(
        "loha",
        "adds the elementwise product of two LoRAs: a high rank in few numbers",
        LohaOptions, 2e-3, loha_config, problems_without_conv1d,
    ),
    Method(
        "hra",
        "reflects the input of linear modules: an orthogonal change of their weights",
        HraOptions, 2e-3, hra_config, problems_without_conv1d,
    ),
    Method(
        "miss",
        "adds a learned block of sums of the input's features; cheaper than LoRA of its rank",
        MissOptions, 1e-3, miss_config, problems_without_conv1d,
    ),
    Method(
        "delora",
        "a LoRA of normed directions whose strength is learned apart and bounded",
        DeloraOptions, 2e-3, delora_config, problems_without_conv1d,
    ),
    Method(
        "beft",
        "trains a bias on linear modules and nothing else",
        BeftOptions, 1e-2, beft_config, problems_without_conv1d,
    ),
)  # fmt: skip
