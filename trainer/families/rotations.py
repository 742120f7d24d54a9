"""Methods of PEFT that turn what goes into a linear module or comes out of it, and SHiRA, which moves few weights."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field

from trainer.anatomy import Anatomy
from trainer.families.linears import LinearOptions, problems_without_conv1d, shared
from trainer.method import Method


class OftOptions(LinearOptions):
    block_size: int = Field(32, ge=2, description="width of the blocks of the input; PEFT takes the nearest that fits")
    block_share: bool = Field(False, description="one rotation for all blocks of a module")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the blocks that a step leaves unturned")


class BoftOptions(LinearOptions):
    block_size: int = Field(4, ge=2, description="width of the blocks of the input, which divides it")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the blocks that a step leaves unturned")


class RoadOptions(LinearOptions):
    variant: Literal[1, 2, 4] = Field(1, description="angles and lengths that a pair of outputs has")
    group_size: int = Field(2, ge=2, multiple_of=2, description="outputs half a group apart are paired")


class ShiraOptions(LinearOptions):
    rank: int = Field(8, ge=1, description="as many entries of the weight as a LoRA of this rank has numbers")
    places_seed: int = Field(0, ge=0, lt=2**63, description="seed of where these entries are")


def oft_config(options: OftOptions, anatomy: Anatomy) -> Any:
    from peft import OFTConfig

    return OFTConfig(
        **shared(options, anatomy),
        oft_block_size=options.block_size,
        block_share=options.block_share,
        module_dropout=options.dropout,
    )


def boft_config(options: BoftOptions, anatomy: Anatomy) -> Any:
    from peft import BOFTConfig

    return BOFTConfig(**shared(options, anatomy), boft_block_size=options.block_size, boft_dropout=options.dropout)


def road_config(options: RoadOptions, anatomy: Anatomy) -> Any:
    from peft import RoadConfig

    return RoadConfig(**shared(options, anatomy), variant=f"road_{options.variant}", group_size=options.group_size)


def shira_config(options: ShiraOptions, anatomy: Anatomy) -> Any:
    from peft import ShiraConfig

    return ShiraConfig(**shared(options, anatomy), r=options.rank, random_seed=options.places_seed)


ROTATIONS: Final = (
    Method(
        "oft",
        "rotates blocks of the input of linear modules: an orthogonal change of their weights",
        OftOptions, 1e-3, oft_config, problems_without_conv1d,
    ),
    Method(
        "boft",
        "rotates small blocks of the input and stretches every output",
        BoftOptions, 2e-3, boft_config, problems_without_conv1d,
    ),
    Method(
        "road",
        "rotates and stretches pairs of outputs of linear modules, in few numbers",
        RoadOptions, 1e-2, road_config, problems_without_conv1d,
    ),
    Method(
        "shira",
        "changes few entries of the weights, at places drawn from a seed; teaches new skills",
        ShiraOptions, 2e-3, shira_config, problems_without_conv1d,
    ),
)  # fmt: skip
