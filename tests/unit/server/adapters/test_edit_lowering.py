"""Lowering edits trusts no file and no base: what is missing, misfits, or has no place is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from server.adapters.lowering.table import lower
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.policy.reach import PromptEnds
from server.primitives.edit import READS, SUBLAYERS, place
from server.primitives.prefix import LayerShape

HIDDEN, LAYERS, SIZE = 6, 2, 4
ALL_PLACES = frozenset(place(layer, name, reads) for layer in range(LAYERS) for name in SUBLAYERS for reads in READS)
PLAIN = {"places": ["mlp"], "reads": "output", "bottleneck_size": SIZE, "non_linearity": "relu"}
WHOLE = {"down.bias": (SIZE,), "up.bias": (HIDDEN,), "down.weight": (SIZE, HIDDEN), "up.weight": (HIDDEN, SIZE)}
LOREFT = {"r": 2, "positions": "f2+l1", "tied_weights": True}
RANK_2 = {"rotate_layer.weight": (2, HIDDEN), "learned_source.weight": (2, HIDDEN), "learned_source.bias": (2,)}

# kind, config, and the shapes of the tensors behind `layers.<number>.`
CASES: Mapping[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "plain": ("bottleneck", PLAIN, {f"mlp.{part}": shape for part, shape in WHOLE.items()}),
    "everything": (
        "bottleneck",
        {**PLAIN, "places": ["attention"], "reads": "stream", "norm_before": True, "scaling": "channel"},
        {
            f"attention.{part}": shape
            for part, shape in {**WHOLE, "norm.weight": (HIDDEN,), "norm.bias": (HIDDEN,), "scaling": (HIDDEN,)}.items()
        },
    ),
    "compacter": (
        "bottleneck",
        {**PLAIN, "phm_dim": 2, "phm_rank": 1, "scaling": "learned"},
        {
            "mlp.down.bias": (SIZE,),
            "mlp.up.bias": (HIDDEN,),
            "mlp.down.phm_rule": (2, 2, 2),
            "mlp.up.phm_rule": (2, 2, 2),
            "mlp.down.phm_left": (2, 3, 1),
            "mlp.down.phm_right": (2, 1, 2),
            "mlp.up.phm_left": (2, 2, 1),
            "mlp.up.phm_right": (2, 1, 3),
            "mlp.scaling": (1,),
        },
    ),
    "loreft": ("loreft", LOREFT, RANK_2),
    "loreft-untied": (
        "loreft",
        {**LOREFT, "tied_weights": False},
        {f"{end}.{part}": shape for end in ("first", "last") for part, shape in RANK_2.items()},
    ),
}


def target(*, max_rank: int = 64, places: frozenset[str] = ALL_PLACES) -> Target:
    layers = (LayerShape(2, 4),) * LAYERS
    return Target({}, layers, HIDDEN, torch.float32, torch.device("cpu"), max_rank, 64, _no_weight, places=places)


def _no_weight(name: str) -> Tensor:
    raise AssertionError(f"an edit needs no weight of the base, not that of {name}")


def tensors(case: str, layers: range = range(LAYERS)) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"layers.{layer}.{part}": torch.randn(shape) for layer in layers for part, shape in CASES[case][2].items()}


def lowered(case: str, given: Mapping[str, Tensor], on: Target | None = None, **changes: Any) -> Lowered:
    kind, config, _ = CASES[case]
    return lower(kind, {**config, **changes}, given, on or target())


def refusal(case: str, given: Mapping[str, Tensor], on: Target | None = None, **changes: Any) -> str:
    with pytest.raises(AdapterIncompatible) as caught:
        lowered(case, given, on, **changes)
    return caught.value.message


@pytest.mark.parametrize("case", CASES)
def test_a_good_file_becomes_an_edit_for_every_layer(case: str) -> None:
    reads = {"plain": "mlp:output", "everything": "attention:stream", "compacter": "mlp:output"}.get(case, "mlp:stream")
    assert lowered(case, tensors(case)).sites.keys() == {f"layers.0.{reads}", f"layers.1.{reads}"}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_that_is_missing_misfits_or_is_no_number_is_named(case: str) -> None:
    for part, shape in CASES[case][2].items():
        name = f"layers.1.{part}"
        leaf = max(
            (one for one in (*WHOLE, *CASES["compacter"][2], *RANK_2) if part.endswith(one)), key=len, default=""
        )
        rest = {other: tensor for other, tensor in tensors(case).items() if other != name}
        assert f"lacks {leaf.removeprefix('mlp.') or part.partition('.')[2]}" in refusal(case, rest)
        wide = torch.ones(*shape[:-1], shape[-1] + 1)
        assert f"has shape {list(wide.shape)}, this base needs {list(shape)}" in refusal(case, {**rest, name: wide})
        assert "no finite number" in refusal(case, {**rest, name: torch.full(shape, torch.inf)})


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_that_is_left_over_is_named(case: str) -> None:
    assert (
        refusal(case, {**tensors(case), "layers.9.x": torch.ones(1)}) == "tensor layers.9.x is ruled out by the config"
    )
    assert "and" in refusal(case, tensors(case), layers=[1])
    assert len(lowered(case, tensors(case, range(1, 2)), layers=[1]).sites) == 1


@pytest.mark.parametrize("case", CASES)
def test_a_width_above_the_limit_is_refused_before_anything_is_made(case: str) -> None:
    width = 2 if case.startswith("loreft") else SIZE
    assert lowered(case, tensors(case), target(max_rank=width)).sites
    assert f"is above max_rank {width - 1}" in refusal(case, tensors(case), target(max_rank=width - 1))
    key = "r" if case.startswith("loreft") else "bottleneck_size"
    assert "is above max_rank" in refusal(case, tensors(case), None, **{key: 10**9})


@pytest.mark.parametrize("case", CASES)
def test_a_base_without_the_place_or_the_layer_is_named(case: str) -> None:
    assert "was not found in this base" in refusal(case, tensors(case), target(places=frozenset()))
    assert refusal(case, tensors(case), layers=[0, 7]) == "layers has 7, the base has 2 layers"


def test_the_ends_of_the_prompt_are_the_adapters_reach() -> None:
    assert lowered("loreft", tensors("loreft")).reach == PromptEnds(2, 1)
    apart = lowered("loreft-untied", tensors("loreft-untied"))
    assert [apart.reach, *(other.reach for other in apart.beside)] == [PromptEnds(2, 0), PromptEnds(0, 1)]
    assert lowered("loreft", tensors("loreft"), positions="l4", tied_weights=False).reach == PromptEnds(0, 4)
    for wrong in ("f0", "f0+l0", "all", "l1+f2", "f-1", ""):
        assert "is not f<number>, l<number> or f<number>+l<number>" in refusal(
            "loreft", tensors("loreft"), positions=wrong
        )


def test_an_activation_that_nobody_knows_is_refused() -> None:
    assert refusal("plain", tensors("plain"), non_linearity="mish") == "non_linearity mish is not served"
    assert refusal("loreft", tensors("loreft"), non_linearity="mish") == "non_linearity mish is not served"


def test_compacters_matrices_are_sums_of_kronecker_products() -> None:
    given = tensors("compacter")
    edit = lowered("compacter", given).sites["layers.1.mlp:output"].edit
    assert edit is not None
    rule, left, right = (given[f"layers.1.mlp.down.phm_{part}"] for part in ("rule", "left", "right"))
    expected = sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(2))
    assert torch.allclose(edit.parts[0].D_bH, expected.t())  # type: ignore[union-attr]
    assert "phm_dim 4 divides not both 6 and 4" in refusal("compacter", given, phm_dim=4)


def test_two_parts_of_one_adapter_are_two_terms_of_a_mixture_under_one_digest() -> None:
    graft = lowered("loreft-untied", tensors("loreft-untied")).graft("sha256:abc", "bot@1", None)
    assert {one.digest for one in (graft, *graft.beside)} == {"sha256:abc"}
    assert len({one.key for one in (graft, *graft.beside)}) == 2
    assert graft.bytes == 2 * graft.beside[0].bytes
