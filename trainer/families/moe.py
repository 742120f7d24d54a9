"""The method that trains a router over adapters of the hub, which stay as they are."""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field, model_validator

from trainer.anatomy import Anatomy
from trainer.families.edits import GENERAL, prompt_reading_tuner
from trainer.method import Method, Options, Plan


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
        "trained by the loss of its mixtures; default: all",
    )

    @model_validator(mode="after")
    def top_k_is_among_the_experts(self) -> LoraMoeOptions:
        if self.top_k > len(self.experts):
            raise ValueError(f"top_k {self.top_k} is above the {len(self.experts)} experts")
        return self


def lora_moe_config(options: LoraMoeOptions, anatomy: Anatomy) -> dict[str, Any]:
    return {
        **GENERAL,
        "peft_type": "LORA_MOE",
        "experts": list(options.experts),
        "top_k": options.top_k,
        "router_aux_loss_coef": options.load_balancing,
        "imitation_steps": options.imitation_steps or 0,
    }


def lora_moe_problems(options: LoraMoeOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    if plan.gradient_checkpointing:
        return ["gradient_checkpointing runs a layer twice, and with it the price on uneven use: leave it off"]
    return []


def lora_moe_settled(options: LoraMoeOptions, steps: int) -> LoraMoeOptions:
    """The experts by their digests, so that the record trains the same router again. Raises HubError, ValueError."""
    from hub.connect import open_hub
    from hub.ref import parse_reference

    hub = open_hub()
    found = [hub.resolve(parse_reference(expert)) for expert in options.experts]
    if len({one.digest for one in found}) < len(found):
        raise ValueError(f"experts {', '.join(options.experts)} name one version twice")
    imitation = steps if options.imitation_steps is None else options.imitation_steps
    pinned = tuple(f"{one.name}@{one.digest}" for one in found)
    return options.model_copy(update={"experts": pinned, "imitation_steps": imitation})


LORA_MOE: Final = Method(
    "lora-moe",
    "trains a router that gives every token its experts, LoRA adapters of the hub, and leaves those as they are",
    LoraMoeOptions, 1e-2, lora_moe_config, lora_moe_problems, prompt_reading_tuner, lora_moe_settled,
)  # fmt: skip
