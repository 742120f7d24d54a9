"""Which adapters may be mixed."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from server.errors import MixtureRefused
from server.primitives.graft import Graft, check_mixture
from server.primitives.lowrank import LowRank
from server.primitives.rotate import Rotate
from server.primitives.scale import Scale
from server.primitives.site import SiteValue

SCALE = Scale(torch.ones(4))


def graft(label: str, value: SiteValue, site: str = "q") -> Graft:
    return Graft(f"digest of {label}", label, {site: value})


ROTATE = Rotate(torch.ones(2, 2, 2))
OFT = graft("oft@1", SiteValue(rotate_in=ROTATE))
ROAD = graft("road@1", SiteValue(rotate_out=ROTATE))
SCALES_IN = graft("in@1", SiteValue(scale_in=SCALE))
SCALES_OUT = graft("out@1", SiteValue(scale_out=SCALE))
SCALES_BOTH = graft("both@1", SiteValue(scale_in=SCALE, scale_out=SCALE))
DORA = graft("dora@1", SiteValue(scale_out=SCALE, lowrank=LowRank(torch.ones(1, 4), torch.ones(4, 1))))
LORA = graft("lora@1", SiteValue(lowrank=LowRank(torch.ones(1, 4), torch.ones(4, 1))))


@pytest.mark.parametrize("terms", permutations([(SCALES_OUT, 0.5), (DORA, -2.0), (LORA, 3.0), (ROAD, 0.7)]))
def test_what_transforms_one_side_and_low_ranks_add(terms: list[tuple[Graft, float]]) -> None:
    check_mixture(terms)


def test_rotations_and_scales_of_the_input_add() -> None:
    check_mixture([(OFT, 0.5), (SCALES_IN, 2.0), (LORA, 1.0)])
    with pytest.raises(MixtureRefused, match="oft@1 transforms the input and road@1 the output of q"):
        check_mixture([(ROAD, 1.0), (OFT, 1.0)])


@pytest.mark.parametrize("other", [SCALES_OUT, DORA, SCALES_BOTH, ROAD])
def test_two_that_transform_both_sides_of_a_linear_are_refused_in_any_order(other: Graft) -> None:
    for terms in permutations([(SCALES_IN, 1.0), (LORA, 1.0), (other, 1.0)]):
        with pytest.raises(MixtureRefused, match=r"in@1 transforms the input and .* the output of q"):
            check_mixture(terms)
    check_mixture([(SCALES_IN, 1.0), (graft("far@1", SiteValue(scale_out=SCALE), site="v"), 1.0)])
    check_mixture([(SCALES_IN, 1.0), (other, 0.0)])


def test_one_that_transforms_both_sides_goes_alone_and_whole() -> None:
    check_mixture([(SCALES_BOTH, 1.0), (LORA, 0.5)])
    for terms in (
        [(SCALES_BOTH, 0.5)],
        [(SCALES_BOTH, 1.0), (SCALES_OUT, 1.0)],
        [(SCALES_OUT, 1.0), (SCALES_BOTH, 1.0)],
    ):
        with pytest.raises(MixtureRefused, match="both@1 transforms the input"):
            check_mixture(terms)
