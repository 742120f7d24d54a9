"""Methods of PEFT whose change of a weight has full rank: a server makes the closest of low rank and measures it."""

from __future__ import annotations

from math import gcd
from typing import Any, Final

from pydantic import Field

from trainer.anatomy import Anatomy, names
from trainer.families.linears import LinearOptions, linear_problems, problems_without_conv1d, shared
from trainer.method import Method


class LokrOptions(LinearOptions):
    rank: int = Field(8, ge=1, description="rank of the larger factor, where that saves numbers")
    alpha: float | None = Field(None, gt=0, description="the delta is scaled by alpha / rank; default: the rank")
    factor: int | None = Field(None, ge=2, description="width of the smaller factor; default: the nearest to the root")
    decompose_both: bool = Field(False, description="the smaller factor is of low rank, too")


class FourierftOptions(LinearOptions):
    frequencies: int = Field(256, ge=1, description="learned frequencies of each weight's change")
    scaling: float = Field(150.0, gt=0, description="the change is scaled by it")
    places_seed: int = Field(777, ge=0, lt=2**63, description="seed of where these frequencies are")


class C3aOptions(LinearOptions):
    block_size: int | None = Field(
        None,
        ge=1,
        description="width of the circulant blocks; default: the largest that divides every input and output",
    )


class HiraOptions(LinearOptions):
    rank: int = Field(8, ge=1, description="rank of the matrix that the weight is multiplied with, entry by entry")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input")


def lokr_config(options: LokrOptions, anatomy: Anatomy) -> Any:
    from peft import LoKrConfig

    return LoKrConfig(
        **shared(options, anatomy),
        r=options.rank,
        alpha=options.alpha or options.rank,
        decompose_factor=options.factor or -1,
        decompose_both=options.decompose_both,
    )


def fourierft_config(options: FourierftOptions, anatomy: Anatomy) -> Any:
    from peft import FourierFTConfig

    return FourierFTConfig(
        **shared(options, anatomy),
        n_frequency=options.frequencies,
        scaling=options.scaling,
        random_loc_seed=options.places_seed,
        init_weights=True,  # which is what makes the untrained adapter change nothing
        fan_in_fan_out=anatomy.conv1d,
    )


def c3a_config(options: C3aOptions, anatomy: Anatomy) -> Any:
    from peft import C3AConfig

    return C3AConfig(**shared(options, anatomy), block_size=options.block_size or largest_block(options, anatomy))


def largest_block(options: LinearOptions, anatomy: Anatomy) -> int:
    targets = options.targets or anatomy.linear_names
    meant = [widths for module, widths in anatomy.widths.items() if any(names(one, module) for one in targets)]
    return gcd(*(width for both in meant for width in both)) or 1


def hira_config(options: HiraOptions, anatomy: Anatomy) -> Any:
    from peft import HiraConfig

    return HiraConfig(
        **shared(options, anatomy), r=options.rank, hira_dropout=options.dropout, fan_in_fan_out=anatomy.conv1d
    )


FULL_RANK: Final = (
    Method(
        "lokr",
        "adds the Kronecker product of two small matrices; served with a measured error",
        LokrOptions, 5e-3, lokr_config, problems_without_conv1d,
    ),
    Method(
        "fourierft",
        "adds a change that few learned frequencies make; served with a measured error",
        FourierftOptions, 3e-2, fourierft_config, linear_problems,
    ),
    Method(
        "c3a",
        "adds circulant blocks, each one learned row; served with a measured error",
        C3aOptions, 1e-1, c3a_config, problems_without_conv1d,
    ),
    Method(
        "hira",
        "multiplies the weight, entry by entry, with a low-rank matrix; served with a measured error",
        HiraOptions, 1e-2, hira_config, linear_problems,
    ),
)  # fmt: skip
