"""Lowering trusts no file: a tensor that is missing, misfits or is left over is named. What comes out, tests/oracle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import BOFTConfig
from peft.tuners.boft.layer import Linear as BoftLinear
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
from torch import Tensor

from hub.families import oft
from hub.families.lokr import factors
from hub.methods import METHODS
from server.adapters.lowering.stored import check_finite
from server.adapters.lowering.table import LOWERINGS, OWN, lower
from server.adapters.lowering.target import Lowered, Target
from server.adapters.tensor_file import TensorFiles
from server.errors import AdapterIncompatible
from server.primitives import rotate
from server.primitives.experts import ParameterShape
from server.primitives.prefix import LayerShape
from server.primitives.site import SiteShape

IN, OUT, RANK = 6, 8, 3
Q, V = "layers.0.q", "layers.0.v"  # q has a bias, v has none
ROOT = "base_model.model."
WEIGHT = torch.arange(OUT * IN, dtype=torch.float32).view(OUT, IN) / 10
BIAS = torch.arange(OUT, dtype=torch.float32)
LORA = {"r": RANK, "lora_alpha": 6}
EXPERTS, INNER = 4, 5
PARAMETERS = {
    "layers.0.experts.up": ParameterShape(EXPERTS, IN, INNER),
    "layers.0.experts.down": ParameterShape(EXPERTS, INNER, IN),
    "layers.0.gate.weight": ParameterShape(1, IN, EXPERTS),
}

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
    "oft": ("oft", {"r": 0, "oft_block_size": 3, "use_cayley_neumann": False}, {"oft_R.weight": (2, 3)}),
    "boft": (
        "boft",
        {"boft_block_size": 3, "boft_block_num": 0},
        {"boft_R": (1, 2, 3, 3), "boft_s": (OUT, 1)},
    ),
    "road": (
        "road",
        {"variant": "road_1", "group_size": 4},
        {"road_theta": (OUT // 2,), "road_alpha": (OUT // 2,)},
    ),
    "shira": ("shira", {"r": 1}, {"shira_weight": (IN + OUT,), "shira_indices": (2, IN + OUT)}),
    "lokr": (
        "lokr",
        {"r": 1, "alpha": 2},
        {"lokr_w1": (2, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 3)},
    ),
    "fourierft": (
        "fourierft",
        {"n_frequency": 7, "scaling": 9.0, "random_loc_seed": 1},
        {"fourierft_spectrum": (7,)},
    ),
    "c3a": ("c3a", {"block_size": 2}, {"c3a_kernel": (OUT // 2, IN // 2, 2)}),
    "hira": ("hira", {"r": RANK}, {"hira_A": (RANK, IN), "hira_B": (OUT, RANK)}),
}
PLACES = ("shira_indices",)
RANKED = ["lora", "lora-bias", "dora", "adalora", "vera", "loha", "hra", "miss", "miss-mini", "delora"]
TRAINS_BIASES = [*(case for case in RANKED if case != "loha"), "oft", "boft", "fourierft", "c3a"]


def target(max_rank: int = 64) -> Target:
    sites = {Q: SiteShape(IN, OUT, BIAS), V: SiteShape(IN, OUT, None)}
    layers = (LayerShape(2, 4),)
    device = torch.device("cpu")
    return Target(sites, layers, IN, torch.float32, device, max_rank, 64, lambda name: WEIGHT, parameters=PARAMETERS)


def tensors(case: str, *modules: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    _, _, shapes = CASES[case]
    return {f"{ROOT}{module}.{part}": tensor(part, shape) for module in modules for part, shape in shapes.items()}


def tensor(part: str, shape: tuple[int, ...]) -> Tensor:
    places = torch.arange(shape[-1], dtype=torch.int32)
    return (places % IN).expand(shape) if part in PLACES else torch.randn(shape)


def lowered(case: str, given: Mapping[str, Tensor], *, max_rank: int = 64, **changes: Any) -> Lowered:
    kind, config, _ = CASES[case]
    return lower(kind, {**config, **changes}, given, target(max_rank))


def refusal(case: str, given: Mapping[str, Tensor], **changes: Any) -> str:
    with pytest.raises(AdapterIncompatible) as caught:
        lowered(case, given, **changes)
    return caught.value.message


def test_every_kind_of_the_hub_is_lowered_in_one_place() -> None:
    assert LOWERINGS.keys() == {method.kind for method in METHODS.values()}
    assert {method.kind for method in METHODS.values() if method.at_linear is not None}.isdisjoint(OWN)


@pytest.mark.parametrize("case", CASES)
def test_a_good_file_becomes_a_site_for_every_module(case: str) -> None:
    assert lowered(case, tensors(case, Q, V)).sites.keys() == {Q, V}


@pytest.mark.parametrize("case", CASES)
def test_what_is_approximated_is_what_the_table_calls_of_full_rank(case: str) -> None:
    [method] = [method for method in METHODS.values() if method.kind == CASES[case][0]]
    assert (lowered(case, tensors(case, Q)).approximation is not None) == method.full_rank


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
        if part in PLACES:
            continue
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
    assert refusal("miss", tensors("miss", Q), r=7) == f"r: 7 is above the {IN} inputs of {Q}"
    says = refusal("miss-mini", tensors("miss-mini", Q), mini_r=3)
    assert says == f"mini_r: 3 does not divide the {OUT} outputs of {Q}"


def test_reflections_that_depend_on_each_other_have_no_gram_schmidt() -> None:
    given = {f"{ROOT}{Q}.hra_u": torch.ones(IN, RANK)}
    assert lowered("hra", given).sites
    assert "column 1 depends on those before it" in refusal("hra", given, apply_GS=True)


def test_road_turns_the_bases_bias_too_and_boft_leaves_it_alone() -> None:
    road, boft = lowered("road", tensors("road", Q)).sites[Q], lowered("boft", tensors("boft", Q)).sites[Q]
    assert boft.rotate_in is not None
    assert boft.bias is None
    assert road.rotate_out is not None
    assert road.bias is not None
    turned = rotate.apply_loop(BIAS[None], BIAS[None], torch.ones(1, 1), [(0, road.rotate_out)])
    assert torch.allclose(road.bias.bias_O, (turned - BIAS)[0], atol=1e-5)


def test_a_pair_costs_four_numbers_however_far_apart_it_is() -> None:
    for group in (2, 4, 8):
        rotation = lowered("road", tensors("road", Q), group_size=group).sites[Q].rotate_out
        assert rotation is not None
        assert rotation.bytes == OUT * 2 * 4


@pytest.mark.parametrize("terms", range(1, 8))
def test_the_neumann_series_is_pefts(terms: int) -> None:
    Q_11 = torch.randn(2, 3, 3, dtype=torch.float64) * 0.3
    skew, upper = Q_11 - Q_11.transpose(1, 2), torch.triu_indices(3, 3, 1)
    module = OFTRotationModule(2, 3, 3, 6)
    expected = module._cayley_batch(skew[:, upper[0], upper[1]], 3, True, terms)
    assert torch.allclose(oft.neumann(skew, terms), expected, atol=1e-12)


def test_a_butterfly_of_several_factors_is_pefts() -> None:
    """PEFT itself multiplies several only on a GPU; here its own factors and permutations are multiplied."""
    features, size, count = 16, 4, 4
    for count_of_factors in (2, 3):
        layer = BoftLinear(torch.nn.Linear(features, 2), "default", BOFTConfig(boft_block_size=size))
        together = 1 << (count_of_factors - 1)
        learned = torch.randn(count_of_factors, count, size, size, dtype=torch.float64)
        expected = torch.eye(features, dtype=torch.float64)
        for factor in range(count_of_factors):
            order = layer.block_butterfly_perm(features, count >> factor, size // 2, count_of_factors - 1)
            permutation = layer.perm2mat(order).double()
            blocks = torch.block_diag(*layer.cayley_batch(learned[factor].float()).double())
            expected = permutation @ blocks @ permutation.t() @ expected
        config = {"boft_block_size": size, "boft_block_num": 0, "boft_n_butterfly_factor": count_of_factors}
        given = {f"{ROOT}{Q}.boft_R": learned.float(), f"{ROOT}{Q}.boft_s": torch.ones(2, 1)}
        onto = replace(target(), sites={Q: SiteShape(features, 2, None)})
        rotation = lower("boft", config, given, onto).sites[Q].rotate_in
        assert rotation is not None
        assert rotation.excess_BSS.shape == (count // together, size * together, size * together)
        got = torch.block_diag(*rotation.excess_BSS) + torch.eye(features)
        assert torch.allclose(got.t(), expected.float(), atol=1e-5)


def test_blocks_that_do_not_fit_are_refused() -> None:
    assert "boft_block_size: 4 does not divide the 6" in refusal("boft", tensors("boft", Q), boft_block_size=4)
    assert "needs blocks of an even size" in refusal("boft", tensors("boft", Q), boft_n_butterfly_factor=2)
    assert "group_size: 6 does not divide the 8 outputs" in refusal("road", tensors("road", Q), group_size=6)
    assert "block_size: 3 does not divide the 6 inputs and 8 outputs" in refusal("c3a", tensors("c3a", Q), block_size=3)
    assert "n_frequency: 49 is above the 48 weights" in refusal("fourierft", tensors("fourierft", Q), n_frequency=49)


@pytest.mark.parametrize("size", range(1, 130))
def test_sizes_are_found_as_peft_finds_them(size: int) -> None:
    for wanted in (-1, *range(1, 14), 64, 500):
        assert factors(size, wanted) == factorization(size, wanted)
    for wanted in range(1, size):
        adjusted = OFTLayer.adjust_oft_parameters(None, size, wanted)
        assert oft.fitting(size, wanted) == (wanted if size % wanted == 0 else adjusted)
    assert oft.fitting(size, size + 3) == size


def test_places_of_entries_are_checked() -> None:
    good = tensors("shira", Q)
    rows = {**good, f"{ROOT}{Q}.shira_indices": good[f"{ROOT}{Q}.shira_indices"] + 1}
    assert f"{Q} has an entry in column 6, outside 0 to 5" in refusal("shira", rows)
    below = {**good, f"{ROOT}{Q}.shira_indices": good[f"{ROOT}{Q}.shira_indices"] - 1}
    assert f"{Q} has an entry in row -1, outside 0 to 7" in refusal("shira", below)
    floats = {**good, f"{ROOT}{Q}.shira_indices": good[f"{ROOT}{Q}.shira_indices"].float()}
    assert "shira_indices of layers.0.q is torch.float32, places are whole numbers" in refusal("shira", floats)


def sparse(places: list[int], values: list[float]) -> dict[str, Tensor]:
    return {
        f"{ROOT}{Q}.sparse_indices": torch.tensor(places, dtype=torch.int32),
        f"{ROOT}{Q}.sparse_values": torch.tensor(values),
    }


def test_a_sparse_change_stands_row_by_row() -> None:
    site = lower("sparse", {"entries": {Q: 3}}, sparse([0, 7, 47], [1.0, 2.0, 3.0]), target()).sites[Q]
    assert site.delta is not None
    expected = torch.zeros(OUT, IN)
    expected[0, 0], expected[1, 1], expected[7, 5] = 1, 2, 3
    assert torch.equal(site.delta.matrix_OI.to_dense(), expected)


@pytest.mark.parametrize(
    ("places", "values", "entries", "says"),
    [
        ([0, 7, 48], [1, 2, 3], {Q: 3}, f"{Q} has an entry in row 8, outside 0 to 7"),
        ([-1, 7, 9], [1, 2, 3], {Q: 3}, f"{Q} has an entry in row -1, outside 0 to 7"),
        ([7, 7, 9], [1, 2, 3], {Q: 3}, f"{Q}: sparse_indices do not ascend strictly"),
        ([9, 7, 8], [1, 2, 3], {Q: 3}, f"{Q}: sparse_indices do not ascend strictly"),
        ([7, 8, 9], [1, 2, 3], {Q: 2}, f"sparse_indices of {Q} has shape [3], this base needs [2]"),
        ([7, 8, 9], [1, 2], {Q: 3}, f"sparse_values of {Q} has shape [2], this base needs [3]"),
        ([7, 8, 9], [1, 2, torch.inf], {Q: 3}, "is no finite number"),
        ([7, 8, 9], [1, 2, 3], {V: 3}, f"sparse_indices of {Q} has shape [3], this base needs [0]"),
        ([7, 8, 9], [1, 2, 3], {Q: 3, V: 3}, f"{V} lacks sparse_indices, but the config has entries for it"),
    ],
)
def test_a_sparse_change_that_is_unusable_is_refused(
    places: list[int], values: list[float], entries: dict[str, int], says: str
) -> None:
    with pytest.raises(AdapterIncompatible) as caught:
        lower("sparse", {"entries": entries}, sparse(places, values), target())
    assert says in caught.value.message


def test_a_kind_that_nobody_knows_is_refused() -> None:
    with pytest.raises(AdapterIncompatible, match="kind lily is not served; served are adalora, beft"):
        lower("lily", {}, {}, target())


def mixture_tensors() -> dict[str, Tensor]:
    """As PEFT nests them: the last weight of a module outermost."""
    torch.manual_seed(0)
    shapes = {
        "experts.base_layer.lora_A": (RANK * EXPERTS, IN),
        "experts.base_layer.lora_B": (INNER, RANK * EXPERTS),
        "experts.lora_A": (RANK * EXPERTS, INNER),
        "experts.lora_B": (IN, RANK * EXPERTS),
        "gate.lora_A": (RANK, IN),
        "gate.lora_B": (EXPERTS, RANK),
    }
    return {f"{ROOT}layers.0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


MIXTURE: dict[str, Any] = {"target_parameters": ["experts.up", "experts.down", "gate.weight"]}


def test_an_expert_has_its_own_rows_of_a_and_its_own_columns_of_b() -> None:
    given = mixture_tensors()
    sites = lowered("lora", {**given, **tensors("lora", Q)}, **MIXTURE).sites
    assert sites.keys() == {Q, *PARAMETERS}
    up, gate = sites["layers.0.experts.up"].experts, sites["layers.0.gate.weight"].lowrank
    assert up is not None
    assert gate is not None
    A, B = (
        given[f"{ROOT}layers.0.experts.base_layer.lora_A.weight"],
        given[f"{ROOT}layers.0.experts.base_layer.lora_B.weight"],
    )
    for expert in range(EXPERTS):
        assert torch.equal(up.A_ERI[expert], A[expert * RANK : (expert + 1) * RANK])
        assert torch.equal(up.B_EOR[expert], 2 * B[:, expert::EXPERTS])
    assert torch.equal(gate.B_OR, 2 * given[f"{ROOT}layers.0.gate.lora_B.weight"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"target_parameters": ["experts.side"]},
            "target parameter experts.side is no weight of a router or of experts",
        ),
        ({"target_parameters": ["experts.up"]}, "experts.lora_A.weight of layers.0.experts.up has shape [12, 5]"),
        ({"target_parameters": None}, "belongs to no Linear"),
        ({"use_dora": True}, "use_dora True cannot stand beside target_parameters"),
        ({"bias": "all"}, "bias all cannot stand beside target_parameters"),
        ({"lora_bias": True}, "lora_bias True cannot stand beside target_parameters"),
        ({"r": 2}, "has shape [12, 5], this base needs [8, 5]"),
        ({"rank_pattern": {"down": 65}}, "rank 65 of layers.0.experts.down is above max_rank 64"),
    ],
)
def test_a_config_that_does_not_fit_the_experts_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert reason in refusal("lora", mixture_tensors(), **{**MIXTURE, **changes})


def test_every_tensor_of_experts_that_is_missing_or_left_over_is_named() -> None:
    for name in mixture_tensors():
        given = mixture_tensors()
        del given[name]
        assert refusal("lora", given, **MIXTURE).endswith(f"lacks {name}")
        given = {**mixture_tensors(), name: torch.full_like(mixture_tensors()[name], torch.inf)}
        assert "is no finite number" in refusal("lora", given, **MIXTURE)
    given = {**mixture_tensors(), f"{ROOT}layers.1.experts.lora_A.weight": torch.ones(1)}
    assert "layers.1.experts.lora_A.weight belongs to no Linear of this base" in refusal("lora", given, **MIXTURE)


def from_file(given: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """As they lie in a file of that dtype."""
    weights = {name: one.to(dtype) if one.is_floating_point() else one.contiguous() for name, one in given.items()}
    return TensorFiles().read(memoryview(bytearray(safetensors.torch.save(weights))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_factors_of_a_lora_keep_the_files_dtype_and_lie_rank_by_rank_their_scaling_beside(
    dtype: torch.dtype,
) -> None:
    given = from_file(tensors("lora", Q, V), dtype)
    found = lowered("lora", given)
    for module in (Q, V):
        low = found.sites[module].lowrank
        assert low is not None
        for laid, stored in ((low.A_RI, "lora_A"), (low.B_OR, "lora_B")):
            assert laid.dtype == dtype
            assert torch.equal(laid, given[f"{ROOT}{module}.{stored}.weight"])
        assert low.A_RI.is_contiguous() and low.B_OR.t().is_contiguous()
        assert low.scaling == 2
    assert found.graft("", "", None).bytes == sum(one.nbytes for one in given.values())


def test_factors_that_the_bases_dtype_cannot_hold_are_in_it_with_their_scaling_inside() -> None:
    given = from_file(tensors("lora", Q), torch.float32)
    half = replace(target(), dtype=torch.bfloat16)
    low = lower("lora", LORA, given, half).sites[Q].lowrank
    assert low is not None
    assert low.scaling == 1
    assert low.A_RI.dtype == torch.bfloat16
    assert torch.equal(low.B_OR, (2 * given[f"{ROOT}{Q}.lora_B.weight"]).bfloat16())


@pytest.mark.parametrize("case", CASES)
def test_nothing_that_is_resident_keeps_the_rest_of_its_file(case: str) -> None:
    """What a graft says that it takes is what it takes: views of a file would keep all of it."""
    given = from_file({**tensors(case, Q, V), "spare": torch.zeros(4096)}, torch.float32)
    spare = given.pop("spare")
    graft = lowered(case, given).graft("", "", None)
    assert graft.bytes
    assert all(one.untyped_storage().nbytes() < spare.nbytes for one in all_tensors(graft))


def all_tensors(value: object) -> list[Tensor]:
    """Those of a record and of the records in it, but the base's."""
    if isinstance(value, Tensor):
        sparse = value.layout == torch.sparse_csr
        return [value.crow_indices(), value.col_indices(), value.values()] if sparse else [value]
    if isinstance(value, Mapping):
        return [tensor for one in value.values() for tensor in all_tensors(one)]
    if is_dataclass(value):
        return [tensor for one in fields(value) for tensor in all_tensors(getattr(value, one.name))]
    return []


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight"])
def test_a_value_that_is_no_number_is_found_among_all_of_a_file(part: str) -> None:
    for value in (torch.inf, -torch.inf, torch.nan):
        given = from_file(tensors("lora", Q, V), torch.bfloat16)
        given[f"{ROOT}{V}.{part}"][1, 1] = value
        assert refusal("lora", given) == f"{ROOT}{V}.{part} holds a value that is no finite number in torch.bfloat16"


def test_whole_numbers_between_the_weights_of_a_file_are_no_weights() -> None:
    given = tensors("shira", Q)
    given[f"{ROOT}{Q}.shira_indices"] = given[f"{ROOT}{Q}.shira_indices"].contiguous()
    odd = {"a": torch.full((4,), -1, dtype=torch.int32)}  # as fp32, not a number
    both = TensorFiles().read(memoryview(bytearray(safetensors.torch.save({**given, **odd, "b": torch.zeros(4)}))))
    assert check_finite(both) == max(float(one.abs().max()) for one in given.values() if one.is_floating_point())


def test_a_scaling_that_overflows_beside_finite_factors_is_refused() -> None:
    given = from_file(tensors("lora", Q), torch.bfloat16)
    given[f"{ROOT}{Q}.lora_B.weight"][0, 0] = 2e38
    assert "times 2, is no finite number in torch.float32" in refusal("lora", given)
    given[f"{ROOT}{Q}.lora_B.weight"][0, 0] = 1
    given[f"{ROOT}{Q}.lora_A.weight"][0, 0] = 2e38  # nothing multiplies A
    assert lowered("lora", given).sites[Q].lowrank is not None
