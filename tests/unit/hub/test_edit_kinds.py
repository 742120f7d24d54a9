"""What a push checks of the kinds that edit the residual stream: their options, and the names and shapes of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hub.errors import Refused
from hub.families.loreft import ends
from hub.validate import validate
from tests.unit.hub.makers import HIDDEN, LAYERS, Array, write_adapter

SIZE, RANK = 4, 3
PLAIN = {"peft_type": "BOTTLENECK", "places": ["attention", "mlp"], "reads": "output", "bottleneck_size": SIZE}
PLAIN |= {"non_linearity": "relu"}
WHOLE = {"down.weight": (SIZE, HIDDEN), "down.bias": (SIZE,), "up.weight": (HIDDEN, SIZE), "up.bias": (HIDDEN,)}
LOREFT = {"peft_type": "LOREFT", "r": RANK, "positions": "f2+l1", "tied_weights": True}
SOURCE = {
    "rotate_layer.weight": (RANK, HIDDEN),
    "learned_source.weight": (RANK, HIDDEN),
    "learned_source.bias": (RANK,),
}
BIASES = {"down.bias": (SIZE,), "up.bias": (HIDDEN,), "down.phm_rule": (2, 2, 2), "up.phm_rule": (2, 2, 2)}
Shapes = Mapping[str, tuple[int, ...]]


def at(parts: Shapes, *before: str, layers: range = range(LAYERS)) -> Shapes:
    return {
        f"layers.{layer}.{one}{part}": shape
        for layer in layers
        for one in before or ("",)
        for part, shape in parts.items()
    }


# config beside what all have, and every tensor
CASES: Mapping[str, tuple[dict[str, Any], Shapes]] = {
    "houlsby": (PLAIN, at(WHOLE, "attention.", "mlp.")),
    "one-layer": ({**PLAIN, "layers": [1], "places": ["mlp"]}, at(WHOLE, "mlp.", layers=range(1, 2))),
    "normed-and-scaled": (
        {**PLAIN, "norm_before": True, "scaling": "channel"},
        at({**WHOLE, "norm.weight": (HIDDEN,), "norm.bias": (HIDDEN,), "scaling": (HIDDEN,)}, "attention.", "mlp."),
    ),
    "sizes": (
        {**PLAIN, "places": ["mlp"], "layer_sizes": {"1": 2}, "scaling": "learned"},
        {
            **at({**WHOLE, "scaling": (1,)}, "mlp.", layers=range(1)),
            "layers.1.mlp.down.weight": (2, HIDDEN),
            "layers.1.mlp.down.bias": (2,),
            "layers.1.mlp.up.weight": (HIDDEN, 2),
            "layers.1.mlp.up.bias": (HIDDEN,),
            "layers.1.mlp.scaling": (1,),
        },
    ),
    "compacter": (
        {**PLAIN, "phm_dim": 2, "phm_rank": 1},
        at(
            {
                **BIASES,
                "down.phm_left": (2, HIDDEN // 2, 1),
                "down.phm_right": (2, 1, SIZE // 2),
                "up.phm_left": (2, SIZE // 2, 1),
                "up.phm_right": (2, 1, HIDDEN // 2),
            },
            "attention.",
            "mlp.",
        ),
    ),
    "compacter-whole": (
        {**PLAIN, "phm_dim": 2},
        at(
            {**BIASES, "down.phm_weight": (2, HIDDEN // 2, SIZE // 2), "up.phm_weight": (2, SIZE // 2, HIDDEN // 2)},
            "attention.",
            "mlp.",
        ),
    ),
    "loreft": (LOREFT, at(SOURCE)),
    "loreft-untied": ({**LOREFT, "tied_weights": False}, at(SOURCE, "first.", "last.")),
    "loreft-one-end": ({**LOREFT, "positions": "l4", "tied_weights": False}, at(SOURCE)),
}


def config_of(case: str, base: Path, **changes: Any) -> dict[str, Any]:
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), **CASES[case][0], **changes}
    return {key: value for key, value in config.items() if value is not Ellipsis}


def tensors_of(case: str) -> dict[str, Array]:
    return {name: np.ones(shape, np.float32) for name, shape in CASES[case][1].items()}


def problems(folder: Path) -> str:
    with pytest.raises(Refused) as refusal:
        validate(folder)
    return "\n".join(str(problem) for problem in refusal.value.problems)


@pytest.mark.parametrize("case", CASES)
def test_a_good_adapter_gives_its_manifest(case: str, tmp_path: Path, base: Path) -> None:
    manifest = validate(write_adapter(tmp_path / "a", config_of(case, base), tensors_of(case)))
    kind = "loreft" if case.startswith("loreft") else "bottleneck"
    assert (manifest.kind, manifest.rank) == (kind, RANK if kind == "loreft" else SIZE)


@pytest.mark.parametrize("case", CASES)
def test_each_tensor_that_is_missing_misfits_or_is_too_many_is_named(case: str, tmp_path: Path, base: Path) -> None:
    whole = tensors_of(case)
    for name, array in whole.items():
        rest = {other: kept for other, kept in whole.items() if other != name}
        found = problems(write_adapter(tmp_path / "a", config_of(case, base), rest))
        assert f"{name}: is missing; the config and the base demand it with shape" in found
        wrong = {**whole, name: np.ones((*array.shape, 1), np.float32)}
        assert f"{name}: has shape" in problems(write_adapter(tmp_path / "a", config_of(case, base), wrong))
    extra = {**whole, "layers.7.mlp.down.weight": np.ones(1, np.float32)}
    found = problems(write_adapter(tmp_path / "a", config_of(case, base), extra))
    assert "layers.7.mlp.down.weight: is no tensor of this kind of adapter" in found


@pytest.mark.parametrize(
    ("case", "changes", "reason"),
    [
        ("houlsby", {"places": []}, "places: must be a list of attention and mlp, each at most once"),
        ("houlsby", {"places": ["mlp", "mlp"]}, "places: must be a list of attention and mlp"),
        ("houlsby", {"places": [{}]}, "places: must be a list of attention and mlp"),
        ("houlsby", {"places": "mlp"}, "places: must be a list of attention and mlp"),
        ("houlsby", {"reads": "hidden"}, "reads: hidden is not served; served are output, stream, residual, input"),
        ("houlsby", {"reads": ...}, "reads: is missing"),
        ("houlsby", {"bottleneck_size": 0}, "bottleneck_size: must be a whole number above 0, not 0"),
        ("houlsby", {"bottleneck_size": 10**9}, "bottleneck_size: rank 1000000000 is above max_rank 256"),
        ("houlsby", {"layer_sizes": {"1": 300}}, "layer_sizes: rank 300 is above max_rank 256"),
        ("houlsby", {"layer_sizes": {"01": 3}}, "layer_sizes: 01 is no layer number"),
        ("houlsby", {"layer_sizes": {"1": 0}}, "layer_sizes: 1 must be a whole number above 0"),
        ("houlsby", {"layer_sizes": {"5": 3}}, "layer_sizes: has layer 5, but base tiny-llama has 2 layers"),
        ("houlsby", {"layer_sizes": [3]}, "layer_sizes: must be an object"),
        ("houlsby", {"layers": []}, "layers: must be a list of layer numbers or null"),
        ("houlsby", {"layers": [True]}, "layers: must be a list of layer numbers or null"),
        ("houlsby", {"layers": [0, 2]}, "layers: has layer 2, but base tiny-llama has 2 layers"),
        ("houlsby", {"non_linearity": "mish"}, "non_linearity: mish is not served; served are relu"),
        ("houlsby", {"scaling": "row"}, "scaling: must be a finite number, learned or channel, not row"),
        ("houlsby", {"scaling": True}, "scaling: must be a finite number"),
        ("houlsby", {"norm_before": 1}, "norm_before: must be true or false"),
        ("houlsby", {"phm_rank": 1}, "phm_rank: needs phm_dim"),
        ("compacter", {"phm_dim": 3}, "phm_dim: 3 does not divide 32"),
        ("compacter", {"phm_dim": 8}, "phm_dim: 8 does not divide 4"),
        ("houlsby", {"use_gating": True}, "use_gating: is no field of BOTTLENECK"),
        ("houlsby", {"ln_after": True}, "ln_after: is no field of BOTTLENECK"),
        ("houlsby", {"inv_adapter": "nice"}, "inv_adapter: is no field of BOTTLENECK"),
        ("loreft", {"r": 0}, "r: must be a whole number above 0"),
        ("loreft", {"r": 33}, "r: 33 is above the 32 features of the stream"),
        ("loreft", {"r": 300}, "r: rank 300 is above max_rank 256"),
        ("loreft", {"positions": ...}, "positions: is missing"),
        ("loreft", {"positions": "all"}, "positions: must be f<number>, l<number> or f<number>+l<number>"),
        ("loreft", {"positions": "f0+l0"}, "not all of them 0"),
        ("loreft", {"positions": 4}, "positions: must be f<number>"),
        ("loreft", {"tied_weights": ...}, "tied_weights: is missing: positions names both ends"),
        ("loreft", {"tied_weights": "yes"}, "tied_weights: must be true or false"),
        ("loreft", {"non_linearity": "mish"}, "non_linearity: mish is not served"),
        ("loreft", {"component": "mlp_output"}, "component: is no field of LOREFT"),
    ],
)
def test_an_option_that_is_not_served_is_refused_by_name(
    case: str, changes: dict[str, Any], reason: str, tmp_path: Path, base: Path
) -> None:
    assert reason in problems(write_adapter(tmp_path / "a", config_of(case, base, **changes), tensors_of(case)))


def test_the_ends_of_the_prompt_are_read_as_pyreft_writes_them() -> None:
    given = ("f4", "l1", "f4+l2", "f0+l3", "", "l1+f4", "f1+", "f٣", "f9999999")
    assert [ends(one) for one in given] == [(4, 0), (0, 1), (4, 2), (0, 3), *[(0, 0)] * 5]
