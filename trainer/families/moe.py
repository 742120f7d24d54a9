"""The method that trains a router over adapters of the hub, which stay as they are or are trained on with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from pydantic import Field, field_validator, model_validator

from hub.ref import is_name
from trainer.anatomy import Anatomy
from trainer.families.edits import GENERAL
from trainer.method import Method, Options, Plan

if TYPE_CHECKING:
    from trainer.export import Finishing
    from trainer.tuner import Tuner

EXPERT_RATE: Final = 0.03


class LoraMoeOptions(Options):
    experts: tuple[str, ...] = Field(
        min_length=2, max_length=256, description="LoRA adapters of the hub, such as code@3, in the order of the rows"
    )
    top_k: int = Field(2, ge=2, description="experts that serve a token; one alone would teach the router nothing")
    load_balancing: float = Field(0.01, ge=0, description="price on uneven use of the experts, beside the loss")
    imitation_steps: int | None = Field(
        None,
        ge=0,
        description="first steps, in which the router learns which single expert knows a row best, before it is "
        "trained by the loss of its mixtures, for which a lower learning rate is wise; default: all",
    )
    experts_are: Literal["frozen", "trained"] = Field(
        "frozen", description="frozen: the router pins those of the hub; trained: on with it, into versions of its own"
    )
    expert_names: tuple[str, ...] | None = Field(
        None, description="names that trained experts are pushed under, in order; default with --push NAME: NAME-EXPERT"
    )
    expert_rate: float | None = Field(
        None, gt=0, le=1, description=f"share of the learning rate that trained experts take; default: {EXPERT_RATE}"
    )
    trained_only: ClassVar[tuple[str, ...]] = ("expert_names", "expert_rate")

    @field_validator("experts", mode="before")
    @classmethod
    def experts_are_adapters(cls, value: Any) -> Any:
        alone = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value  # a flag makes a list of it
        if str(alone).isdecimal():
            raise ValueError(
                f"experts {alone}: a router is trained over adapters of the hub, not over a number of new ones; "
                "train those first, with --method lora on the rows of each"
            )
        return value

    @model_validator(mode="after")
    def top_k_is_among_the_experts(self) -> LoraMoeOptions:
        if self.top_k > len(self.experts):
            raise ValueError(f"top_k {self.top_k} is above the {len(self.experts)} experts")
        return self

    @model_validator(mode="after")
    def frozen_experts_get_no_names_and_learn_nothing(self) -> LoraMoeOptions:
        given = [name for name in self.trained_only if getattr(self, name) is not None]
        if self.experts_are == "frozen" and given:
            raise ValueError(f"{', '.join(given)}: only with experts_are: trained")
        return self

    @model_validator(mode="after")
    def every_trained_expert_gets_a_name_of_its_own(self) -> LoraMoeOptions:
        complaint = None if self.expert_names is None else names_complaint(self.expert_names, self.experts)
        if complaint is not None:
            raise ValueError(complaint)
        return self


def names_complaint(names: Sequence[str], experts: Sequence[str]) -> str | None:
    """Why trained experts cannot have these names, or None."""
    if len(names) != len(experts):
        return f"expert_names are {len(names)}, experts {len(experts)}"
    unfit = next((name for name in names if not is_name(name)), None)
    if unfit is not None:
        return f"expert_names: {unfit!r} does not fit [namespace/]slug"
    taken = next((name for name in names if name in {name_of(expert) for expert in experts}), None)
    if taken is not None:
        return f"expert_names: whoever asks for {taken} would get what was trained for this router alone"
    if len({name.replace("/", "-") for name in names}) < len(names):
        return f"expert_names {', '.join(names)} name one folder twice"
    return None


def name_of(reference: str) -> str:
    return reference.partition("@")[0]


def lora_moe_config(options: LoraMoeOptions, anatomy: Anatomy) -> dict[str, Any]:
    return {
        **GENERAL,
        "peft_type": "LORA_MOE",
        "experts": list(options.experts),
        "top_k": options.top_k,
        "router_aux_loss_coef": options.load_balancing,
        "imitation_steps": options.imitation_steps or 0,
        "experts_are": options.experts_are,
        "expert_names": options.expert_names,
        "expert_rate": options.expert_rate,
    }


def lora_moe_problems(options: LoraMoeOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    problems = []
    if plan.gradient_checkpointing:
        problems.append("gradient_checkpointing runs a layer twice, and with it the price on uneven use: leave it off")
    if options.experts_are == "trained" and options.expert_names is None:
        problems.append(
            "trained experts are adapters of their own, which the router pins by name and digest: "
            "give expert_names, or --push NAME for NAME-EXPERT"
        )
    return problems


def lora_moe_settled(options: LoraMoeOptions, steps: int) -> LoraMoeOptions:
    """The experts by their digests, so that the record trains the same router again. Raises HubError, ValueError."""
    from hub.connect import open_hub
    from hub.ref import parse_reference

    hub = open_hub()
    found = [hub.resolve(parse_reference(expert)) for expert in options.experts]
    if len({one.digest for one in found}) < len(found):
        raise ValueError(f"experts {', '.join(options.experts)} name one version twice")
    settled: dict[str, Any] = {
        "experts": tuple(f"{one.name}@{one.digest}" for one in found),
        "imitation_steps": steps if options.imitation_steps is None else options.imitation_steps,
    }
    if options.experts_are == "trained":
        settled["expert_rate"] = options.expert_rate or EXPERT_RATE
    return options.model_copy(update=settled)


def lora_moe_named(options: LoraMoeOptions, name: str) -> LoraMoeOptions:
    """Trained experts as NAME-EXPERT, where the recipe names none. Raises ValueError."""
    if options.experts_are == "frozen":
        return options
    names = options.expert_names
    if names is None:
        names = tuple(f"{name}-{name_of(expert).rpartition('/')[2]}" for expert in options.experts)
        complaint = names_complaint(names, options.experts)
        if complaint is not None:
            raise ValueError(f"{complaint}: give others")
    if name in names:
        raise ValueError(f"expert_names: {name} is the router's own")
    return options.model_copy(update={"expert_names": names})


def router_tuner() -> Tuner:
    from trainer.tuner import RouterTuner

    return RouterTuner()


def complete_experts(finishing: Finishing) -> None:
    from trainer.trained_experts import complete

    complete(finishing)


LORA_MOE: Final = Method(
    "lora-moe",
    "trains a router that gives every token its experts, LoRA adapters of the hub; on request trains those with it",
    LoraMoeOptions, 3e-2, lora_moe_config, lora_moe_problems, router_tuner, lora_moe_settled, lora_moe_named,
    complete_experts, found_by_prompts=False,
)  # fmt: skip
