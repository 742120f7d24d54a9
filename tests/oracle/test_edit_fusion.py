"""Edits of the residual stream fused with each other and with other changes, against a network built by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from server.primitives.graft import check_mixture
from tests.oracle.conftest import Bench, TinyBase
from tests.oracle.edited import Edited
from tests.oracle.kinds import make_adapter, rows
from tests.oracle.test_fusion import ROOT, affine_maps, leaves, set_sum

TOLERANCE = 1e-4  # fp32; the packed products sum in another order
PROMPT = [5, 9, 77, 3, 101, 42, 64, 8, 23]
OTHERS = ("lora", "dora", "ia3-attention", "ln-tuning")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what these adapters are on purpose


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi"])
def test_every_pair_with_an_edit_is_exactly_the_weighted_sum_at_each_place(
    architecture: str,
    tiny_base: Callable[[str], TinyBase],
    bench: Callable[[str], Bench],
    tmp_path: Path,
) -> None:
    """The modules have the sum of all changes, and hooks add the sum of all edits, each of the one stream that is."""
    rig, base, random = bench(architecture), tiny_base(architecture), Random(7)
    wanted = {name: row for name, row in rows(architecture).items() if row.edits or name in OTHERS}
    made = {name: make_adapter(base, row, tmp_path / name, seed) for seed, (name, row) in enumerate(wanted.items())}
    edits = [name for name, row in wanted.items() if row.edits]
    grafts = {name: rig.graft(tmp_path / name, row.kind) for name, row in wanted.items()}
    # In gemma2 a norm makes what Houlsby's adapter reads.
    crossed = [(edit, OTHERS[index % len(OTHERS)]) for index, edit in enumerate(edits)] + [("houlsby", "ln-tuning")]
    fused = [*combinations_with_replacement(edits, 2), *crossed, (*edits, "lora", "ln-tuning")]
    mixtures = []
    for names in fused:
        shares = {name: random.choice([-1, 1]) * random.uniform(0.2, 0.9) * 2 / len(names) for name in names}
        check_mixture([(grafts[name], weight) for name, weight in shares.items()])
        mixtures.append(shares)
    got = rig.run(
        [(PROMPT, []), *((PROMPT, [(grafts[name], weight) for name, weight in shares.items()]) for shares in mixtures)]
    )
    stock: Any = base.fresh()
    modules = leaves(stock)
    plain = affine_maps(stock, modules)
    maps = {name: affine_maps(made[name], [ROOT + module for module in modules]) for name in OTHERS}
    edited = Edited(stock, architecture, [])
    for shares, logits in zip(mixtures, got[1:], strict=True):
        set_sum(stock, plain, [(maps[name], weight) for name, weight in shares.items() if name in maps])
        edited.load([(tmp_path / name, weight) for name, weight in shares.items() if name in edits])
        with torch.inference_mode():
            expected = edited(input_ids=torch.tensor([PROMPT])).logits[0].float()
        error = (logits - expected).abs().max().item()
        assert error < TOLERANCE, f"{shares} on {architecture} differs by {error:.1e}"
        assert not torch.allclose(logits, got[0], atol=100 * TOLERANCE), f"{shares} has no visible effect"
