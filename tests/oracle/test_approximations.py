"""Changes of full rank at a rank that is too low for them: the error that is told is the error that there is.

The exact change of a Linear is what PEFT's own layer answers to the unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.errors import AdapterIncompatible
from server.primitives.graft import Graft
from tests.oracle.conftest import Bench, TinyBase
from tests.oracle.kinds import make_adapter, rows
from tests.oracle.test_fusion import ROOT, affine_maps

LIMIT, TOO_STRICT, MAX_RANK = 0.8, 0.01, 10
SAME = 1e-4  # of an error measured on fp32 matrices, one of which went through PEFT's layer
PROMPT = torch.tensor([5, 9, 77, 3, 101, 42, 64, 8])

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what these adapters are on purpose


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("lokr", "qwen2"), ("fourierft", "qwen2"), ("c3a", "qwen2"), ("hira", "qwen2"), ("fourierft", "gpt2")],
)
def test_the_error_that_is_told_is_that_of_what_is_served(
    name: str,
    architecture: str,
    tiny_base: Callable[[str], TinyBase],
    bench: Callable[[str], Bench],
    tmp_path: Path,
) -> None:
    base, rig = tiny_base(architecture), bench(architecture)
    peft = make_adapter(base, rows(architecture)[name], tmp_path, seed=1)
    rig.max_delta_error, rig.max_rank = LIMIT, MAX_RANK
    lowered = rig.lower(tmp_path, name)
    plain = affine_maps(base.fresh(), lowered.sites)
    tuned = affine_maps(peft, [ROOT + module for module in lowered.sites])
    errors = {}
    for module, site in lowered.sites.items():
        assert site.lowrank is not None
        exact = tuned[module][0] - plain[module][0]
        served = site.lowrank.B_OR @ site.lowrank.A_RI
        errors[module] = ((served - exact).norm() / exact.norm()).item()
    assert lowered.approximation == pytest.approx(max(errors.values()), abs=SAME)
    assert SAME < max(errors.values()) <= LIMIT
    rig.max_delta_error = TOO_STRICT
    with pytest.raises(AdapterIncompatible, match=rf"of rank {MAX_RANK} .* the closest is off by") as refusal:
        rig.lower(tmp_path, name)
    assert any(module in refusal.value.message for module in errors)
    got = rig.run([(PROMPT.tolist(), [(Graft("approximated", name, lowered.sites), 1.0)])])[0]
    with torch.inference_mode():
        wanted = peft(input_ids=PROMPT[None]).logits[0].float()
    assert not torch.allclose(got, wanted, atol=SAME), "an approximation that is exact shows nothing"
