"""Edits of the residual stream fused with each other and with what changes Linears, against a network built by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement
from random import Random

import pytest
import torch

from server.primitives.graft import check_mixture
from tests.oracle.conftest import Adapter, Bench, TinyBase
from tests.oracle.edited import Edited
from tests.oracle.test_fusion import affine_maps, set_sum

TOLERANCE = 1e-4  # fp32; the packed products sum in another order
PROMPT = [5, 9, 77, 3, 101, 42, 64, 8, 23]

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what these adapters are on purpose


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi"])
def test_every_pair_with_an_edit_is_exactly_the_weighted_sum_at_each_place(
    architecture: str,
    tiny_base: Callable[[str], TinyBase],
    bench: Callable[[str], Bench],
    adapters: Callable[[str], dict[str, Adapter]],
) -> None:
    """The Linears have the sum of all changes, and hooks add the sum of all edits, each of the one stream that is."""
    rig, base, random = bench(architecture), tiny_base(architecture), Random(7)
    made = {name: one for name, one in adapters(architecture).items() if not (one.row.virtual or one.row.invoked)}
    edits = [name for name, one in made.items() if one.row.edits]
    linears = [name for name in made if name not in edits]
    grafts = {name: rig.graft(one.folder, one.row.kind) for name, one in made.items()}
    plain = affine_maps(base.fresh())
    crossed = list(zip(edits, random.sample(linears, len(edits)), strict=True))
    fused = [*combinations_with_replacement(edits, 2), *crossed, (*edits, "lora", "dora")]
    mixtures = []
    for names in fused:
        shares = {name: random.choice([-1, 1]) * random.uniform(0.2, 0.9) * 2 / len(names) for name in names}
        check_mixture([(grafts[name], weight) for name, weight in shares.items()])
        mixtures.append(shares)
    got = rig.run(
        [(PROMPT, []), *((PROMPT, [(grafts[name], weight) for name, weight in shares.items()]) for shares in mixtures)]
    )
    used = {name for shares in mixtures for name in shares}
    maps = {name: affine_maps(made[name].peft) for name in linears if name in used}
    stock = base.fresh()
    edited = Edited(stock, architecture, [])
    for shares, logits in zip(mixtures, got[1:], strict=True):
        set_sum(stock, plain, [(maps[name], weight) for name, weight in shares.items() if name in maps])
        edited.load([(made[name].folder, shares[name]) for name in shares if name in edits])
        with torch.inference_mode():
            expected = edited(input_ids=torch.tensor([PROMPT])).logits[0].float()
        error = (logits - expected).abs().max().item()
        assert error < TOLERANCE, f"{shares} on {architecture} differs by {error:.1e}"
        assert not torch.allclose(logits, got[0], atol=100 * TOLERANCE), f"{shares} has no visible effect"
