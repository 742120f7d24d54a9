"""Adapters of routers and experts in mixed batches: fused, and beside requests of the bare base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.model.experts import ROWS
from server.primitives.graft import Graft, check_mixture
from tests.oracle.conftest import Bench, TinyBase
from tests.oracle.kinds import ATTENTION_AND_MLP, ROUTERS, make_adapter, mixture_rows
from tests.oracle.test_kinds_against_peft import TOLERANCE, _logits, prompt

ROOT = "base_model.model."
OVERFLOWS = (6, 8)  # neighbours that carry experts, and one layer's experts

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what these adapters are on purpose


@pytest.mark.parametrize("architecture", ROUTERS)
def test_a_fusion_of_experts_is_the_weighted_sum_of_their_deltas(
    architecture: str, tiny_base: Callable[[str], TinyBase], bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    """Against the stock network whose weights were summed by hand; base requests beside it are not moved by a bit."""
    base, rig = tiny_base(architecture), bench(architecture)
    grafts, deltas = _made(base, rig, tmp_path)
    mixture = dict(zip(grafts, (0.7, -0.4, 1.3, 0.3, -0.8, 0.5), strict=True))
    terms = [(grafts[name], weight) for name, weight in mixture.items()]
    check_mixture(terms)
    summed = base.fresh()
    for name, parameter in summed.named_parameters():
        parameter.data += sum(weight * deltas[one].get(name, torch.zeros(())) for one, weight in mixture.items())
    ids = prompt(5, 21)
    got = rig.run([(ids, terms), (prompt(6, 17), []), (ids, [(grafts["lora-router"], 1.0)])])
    expected = _logits(summed, ids)
    assert (got[0] - expected).abs().max() < TOLERANCE
    assert (expected - _logits(base.fresh(), ids)).abs().max() > 100 * TOLERANCE
    alone = rig.run([(ids, []), (prompt(6, 17), []), (ids, [])])
    assert torch.equal(got[1], alone[1])


@pytest.mark.parametrize("architecture", ROUTERS)
def test_a_token_of_the_base_is_the_same_to_the_bit_wherever_its_neighbours_are_routed(
    architecture: str, tiny_base: Callable[[str], TinyBase], bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    """The neighbours send an expert anything from none to many more tokens, and some of them overflow."""
    rig = bench(architecture)
    grafts, _ = _made(tiny_base(architecture), rig, tmp_path)
    requests: list[tuple[list[int], list[tuple[Graft, float]]]] = []
    for seed in range(12):
        requests += [(prompt(seed, 1 + seed), []), (prompt(50 + seed, 6), [])]
    calm = rig.run(requests, new=3)
    everybody = list(grafts.values())
    for seed in range(12):
        requests[2 * seed + 1] = (
            requests[2 * seed + 1][0],
            [(everybody[seed % len(everybody)], 1e38 if seed in OVERFLOWS else 2.0)],
        )
    wild = rig.run(requests, new=3)
    assert not all(torch.equal(calm[index], wild[index]) for index in range(1, 24, 2)), "the neighbours did nothing"
    for index in OVERFLOWS:
        lost = wild[2 * index + 1]  # no numbers, or a norm has made zeros of them
        assert not lost.isfinite().all() or not lost.any(), "this neighbour was meant to overflow"
    for index in range(0, 24, 2):
        assert torch.equal(calm[index], wild[index]), f"request {index} on {architecture}, rows by {ROWS}"


def _made(base: TinyBase, rig: Bench, folder: Path) -> tuple[dict[str, Graft], dict[str, dict[str, Tensor]]]:
    """Every row of a mixture of experts as a graft, and what PEFT adds to each weight of the base for it."""
    first = ATTENTION_AND_MLP[base.architecture][0][0]
    grafts, deltas = {}, {}
    for seed, (name, row) in enumerate(mixture_rows(base.architecture, first).items()):
        model = make_adapter(base, row, folder / name, seed)
        grafts[name] = rig.graft(folder / name, row.kind)
        deltas[name] = _deltas(model)
    return grafts, deltas


def _deltas(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        layer: Any = module
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            own = name.removeprefix(ROOT).replace(".base_layer", "")
            found[f"{own}.{getattr(layer, 'parameter_name', 'weight')}"] = layer.get_delta_weight("default").detach()
    return found
