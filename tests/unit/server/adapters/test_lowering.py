"""Lowering trusts no file: a tensor that is missing, misfits or is left over is named. What comes out, tests/oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from server.adapters.lowering.table import LOWERINGS, lower
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.primitives.prefix import LayerShape
from server.primitives.site import SiteShape

IN, OUT, RANK = 6, 8, 3
Q, V = "layers.0.q", "layers.0.v"  # q has a bias, v has none
ROOT = "base_model.model."
WEIGHT = torch.arange(OUT * IN, dtype=torch.float32).view(OUT, IN) / 10
BIAS = torch.arange(OUT, dtype=torch.float32)
LORA = {"r": RANK, "lora_alpha": 6}

# kind, option -> config, and the shapes of the tensors at one Linear.
CASES: Mapping[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "lora": ("lora", LORA, {"lora_A.weight": (RANK, IN), "lora_B.weight": (OUT, RANK)}),
    "lora-bias": (
        "lora",
        {**LORA, "lora_bias": True},
        {"lora_A.weight": (RANK, IN), "lora_B.weight": (OUT, RANK), "lora_B.bias": (OUT,)},
    ),
    "dora": (
        "lora",
        {**LORA, "use_dora": True},
        {"lora_A.weight": (RANK, IN), "lora_B.weight": (OUT, RANK), "lora_magnitude_vector": (OUT,)},
    ),
    "adalora": (
        "adalora",
        {"init_r": RANK, "lora_alpha": 6},
        {"lora_A": (RANK, IN), "lora_B": (OUT, RANK), "lora_E": (RANK, 1)},
    ),
    "vera": (
        "vera",
        {"r": RANK, "save_projection": False},
        {"vera_lambda_b": (OUT,), "vera_lambda_d": (RANK,)},
    ),
    "loha": (
        "loha",
        {"r": RANK, "alpha": 6},
        {"hada_w1_a": (OUT, RANK), "hada_w1_b": (RANK, IN), "hada_w2_a": (OUT, RANK), "hada_w2_b": (RANK, IN)},
    ),
    "hra": ("hra", {"r": RANK}, {"hra_u": (IN, RANK)}),
    "miss": ("miss", {"r": RANK, "init_weights": True}, {"miss_block": (RANK, OUT)}),
    "miss-mini": ("miss", {"r": RANK, "init_weights": "mini", "mini_r": 2}, {"miss_block": (RANK, 2)}),
    "delora": (
        "delora",
        {"r": RANK},
        {"delora_A": (RANK, IN), "delora_B": (OUT, RANK), "delora_lambda": (1,), "delora_w_norm": (IN,)},
    ),
    "ia3": ("ia3", {"feedforward_modules": []}, {"ia3_l": (OUT, 1)}),
    "ia3-in": ("ia3", {"feedforward_modules": ["q", "v"]}, {"ia3_l": (1, IN)}),
    "beft": ("beft", {}, {"beft_bias": (1, OUT)}),
}
RANKED = [case for case in CASES if case not in ("ia3", "ia3-in", "beft")]
TRAINS_BIASES = [case for case in CASES if case not in ("loha", "ia3", "ia3-in", "beft")]


def target(max_rank: int = 64) -> Target:
    sites = {Q: SiteShape(IN, OUT, BIAS), V: SiteShape(IN, OUT, None)}
    layers = (LayerShape(2, 4),)
    return Target(sites, layers, IN, torch.float32, torch.device("cpu"), max_rank, 64, lambda name: WEIGHT)


def tensors(case: str, *modules: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    _, _, shapes = CASES[case]
    return {f"{ROOT}{module}.{part}": torch.randn(shape) for module in modules for part, shape in shapes.items()}


def lowered(case: str, given: Mapping[str, Tensor], *, max_rank: int = 64, **changes: Any) -> Lowered:
    kind, config, _ = CASES[case]
    return lower(kind, {**config, **changes}, given, target(max_rank))


def refusal(case: str, given: Mapping[str, Tensor], **changes: Any) -> str:
    with pytest.raises(AdapterIncompatible) as caught:
        lowered(case, given, **changes)
    return caught.value.message


def test_every_kind_that_changes_linears_is_here() -> None:
    others = {"prefix", "prompt", "p-tuning", "bottleneck", "loreft"}
    assert {kind for kind, _, _ in CASES.values()} | others == LOWERINGS.keys()


@pytest.mark.parametrize("case", CASES)
def test_a_good_file_becomes_a_site_for_every_module(case: str) -> None:
    assert lowered(case, tensors(case, Q, V)).sites.keys() == {Q, V}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_that_is_missing_is_named(case: str) -> None:
    for part in CASES[case][2]:
        given = tensors(case, Q, V)
        del given[f"{ROOT}{Q}.{part}"]
        if len(CASES[case][2]) > 1:
            assert refusal(case, given) == f"{Q} lacks {part}"
        else:  # nothing tells that the module was meant
            assert lowered(case, given).sites.keys() == {V}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_of_a_wrong_shape_is_named_with_both_shapes(case: str) -> None:
    for part, shape in CASES[case][2].items():
        given = tensors(case, Q)
        given[f"{ROOT}{Q}.{part}"] = torch.ones(*shape[:-1], shape[-1] + 1)
        says = refusal(case, given)
        assert says == f"{part} of {Q} has shape {[*shape[:-1], shape[-1] + 1]}, this base needs {list(shape)}"


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_that_is_left_over_is_named(case: str) -> None:
    says = refusal(case, {**tensors(case, Q), f"{ROOT}{Q}.lora_C.weight": torch.ones(1)})
    assert says == f"{Q} has lora_C.weight, which its config rules out"
    says = refusal(case, {**tensors(case, Q), f"{ROOT}layers.9.q.x": torch.ones(1)})
    assert says == f"tensor {ROOT}layers.9.q.x belongs to no Linear of this base"
    assert "does not start with" in refusal(case, {**tensors(case, Q), "q.x": torch.ones(1)})


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_finite_number_is_refused(case: str) -> None:
    for part, shape in CASES[case][2].items():
        given = {**tensors(case, Q), f"{ROOT}{Q}.{part}": torch.full(shape, torch.inf)}
        assert "is no finite number" in refusal(case, given)


@pytest.mark.parametrize("case", RANKED)
def test_a_rank_above_the_limit_is_refused_before_anything_is_made(case: str) -> None:
    rank = RANK * RANK if case == "loha" else RANK
    given = tensors(case, Q)
    assert lowered(case, given, max_rank=rank).sites
    with pytest.raises(AdapterIncompatible, match=f"rank {rank} .*is above max_rank {rank - 1}"):
        lowered(case, given, max_rank=rank - 1)
    key = "init_r" if case == "adalora" else "r"
    assert "is above max_rank" in refusal(case, given, **{key: 10**9})


@pytest.mark.parametrize("case", TRAINS_BIASES)
def test_the_bases_own_bias_is_replaced_as_a_difference(case: str) -> None:
    without = lowered(case, tensors(case, Q)).sites[Q].bias
    given = {**tensors(case, Q), f"{ROOT}{Q}.base_layer.bias": BIAS + 5}
    found = lowered(case, given, bias="all").sites[Q].bias
    assert found is not None
    assert torch.allclose(found.bias_O, torch.full((OUT,), 5.0) + (0 if without is None else without.bias_O))


def test_biases_stand_where_the_config_says_and_nowhere_else() -> None:
    lone = {**tensors("lora", V), f"{ROOT}{Q}.bias": BIAS + 5}
    found = lowered("lora", lone, bias="all").sites[Q]
    assert found.lowrank is None
    assert found.bias is not None
    assert torch.equal(found.bias.bias_O, torch.full((OUT,), 5.0))
    wrapped = {**tensors("lora", Q), f"{ROOT}{Q}.base_layer.bias": BIAS}
    for given, bias, says in (
        (lone, "none", f"{Q} lacks lora_A.weight"),
        (lone, "lora_only", f"{Q} has bias, which its config rules out"),
        (wrapped, "none", f"{Q} has base_layer.bias, which its config rules out"),
        (tensors("lora", Q), "lora_only", f"{Q} lacks base_layer.bias: the adapter's bias is lora_only"),
        (tensors("lora", V), "all", f"{Q} lacks bias: the adapter's bias is all"),
        ({**wrapped, f"{ROOT}{Q}.bias": BIAS}, "all", f"{Q} has bias, which its config rules out"),
        ({**tensors("lora", Q), f"{ROOT}{Q}.bias": BIAS}, "all", f"{Q} has bias, which its config rules out"),
        ({f"{ROOT}{Q}.base_layer.bias": BIAS}, "all", f"{Q} has base_layer.bias and nothing else"),
        (
            {**wrapped, f"{ROOT}{V}.base_layer.bias": BIAS},
            "lora_only",
            f"{V} has base_layer.bias, but the base has no bias there",
        ),
    ):
        assert refusal("lora", given, bias=bias) == says


def test_dora_leaves_the_bases_bias_alone_and_ia3_scales_it() -> None:
    dora, ia3 = lowered("dora", tensors("dora", Q)).sites[Q], lowered("ia3", tensors("ia3", Q)).sites[Q]
    assert dora.scale_out is not None
    assert dora.bias is None
    assert ia3.scale_out is not None
    assert ia3.bias is not None
    assert torch.allclose(ia3.bias.bias_O, ia3.scale_out.excess_F * BIAS)


def test_triplets_that_were_cut_are_not_there() -> None:
    mask = {f"{Q}.lora_E": [True, False, True], f"{V}.lora_E": [False] * 3}
    given = {f"{ROOT}{V}.lora_A": torch.ones(0, IN), f"{ROOT}{V}.lora_B": torch.ones(OUT, 0)}
    given |= {f"{ROOT}{V}.lora_E": torch.ones(0, 1), f"{ROOT}{Q}.lora_A": torch.ones(2, IN)}
    given |= {f"{ROOT}{Q}.lora_B": torch.ones(OUT, 2), f"{ROOT}{Q}.lora_E": torch.ones(2, 1)}
    sites = lowered("adalora", given, rank_pattern=mask).sites
    kept = sites[Q].lowrank
    assert kept is not None
    assert kept.A_RI.shape == (2, IN)
    assert sites[V].lowrank is None
    assert "has shape [0, 6], this base needs [3, 6]" in refusal("adalora", given)


def test_veras_shared_pair_is_saved_or_made_but_not_both() -> None:
    given = tensors("vera", Q, V)
    shared = {"base_model.vera_A": torch.ones(RANK, IN), "base_model.vera_B": torch.ones(OUT, RANK)}
    assert lowered("vera", {**given, **shared}, save_projection=True).sites.keys() == {Q, V}
    assert refusal("vera", given, save_projection=True) == "base_model.vera_A is missing, but save_projection is true"
    wide = {**shared, "base_model.vera_A": torch.ones(RANK, IN + 1)}
    assert "vera_A of base_model has shape [3, 7]" in refusal("vera", {**given, **wide}, save_projection=True)
    assert "which save_projection false rules out" in refusal("vera", {**given, **shared})
    assert "for no Linear of this base" in refusal("vera", {})


def test_miss_needs_a_rank_and_a_width_that_fit_the_linear() -> None:
    assert "r 7 and mini_r 8 do not fit the 6 inputs and 8 outputs" in refusal("miss", tensors("miss", Q), r=7)
    assert "mini_r 3 do not fit" in refusal("miss-mini", tensors("miss-mini", Q), mini_r=3)


def test_reflections_that_depend_on_each_other_have_no_gram_schmidt() -> None:
    given = {f"{ROOT}{Q}.hra_u": torch.ones(IN, RANK)}
    assert lowered("hra", given).sites
    assert "column 1 depends on those before it" in refusal("hra", given, apply_GS=True)


def test_a_kind_that_nobody_knows_is_refused() -> None:
    with pytest.raises(AdapterIncompatible, match="kind road is not served; served are adalora, beft"):
        lower("road", {}, {}, target())
