"""A good adapter of every kind that changes Linear layers, made by hand on the base of `makers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.unit.hub.makers import Array, linear_names, sizes, write_adapter

TARGETS = ("q_proj", "down_proj")
ROOT = "base_model.model."
RANK = 3


@dataclass(frozen=True)
class Case:
    """A good adapter: its config beside what all have, and its tensors' shapes at a Linear by (inputs, outputs)."""

    peft_type: str
    config: Mapping[str, Any]
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    shared: Mapping[str, tuple[int, ...]]
    rank: int | None


def case(
    peft_type: str,
    config: Mapping[str, Any],
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]],
    shared: Iterable[tuple[str, tuple[int, ...]]] = (),
    rank: int | None = RANK,
) -> Case:
    return Case(peft_type, config, shapes, dict(shared), rank)


def _road(width: int, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {"road_theta": (outputs * width // 2,), "road_alpha": (outputs * width // 2,)}


LORA = {"r": RANK, "lora_alpha": 6}
MASKS = {f"{module}.lora_E": [True, False, True] for module in linear_names(*TARGETS)}
OFT = {"r": 0, "oft_block_size": 8, "use_cayley_neumann": True, "peft_version": "0.21.2"}
PLACES = "shira_indices"  # whole numbers
CASES: Mapping[str, Case] = {
    "lora-dora": case(
        "LORA",
        {**LORA, "use_dora": True},
        lambda i, o: {"lora_A.weight": (RANK, i), "lora_B.weight": (o, RANK), "lora_magnitude_vector": (o,)},
    ),
    "lora-activated": case(
        "LORA",
        {**LORA, "alora_invocation_tokens": [5, 6]},
        lambda i, o: {"lora_A.weight": (RANK, i), "lora_B.weight": (o, RANK)},
    ),
    "adalora": case(
        "ADALORA",
        {"init_r": RANK, "lora_alpha": 6},
        lambda i, o: {"lora_A": (RANK, i), "lora_B": (o, RANK), "lora_E": (RANK, 1)},
    ),
    "adalora-cut": case(
        "ADALORA",
        {"init_r": RANK, "lora_alpha": 6, "rank_pattern": MASKS},
        lambda i, o: {"lora_A": (2, i), "lora_B": (o, 2), "lora_E": (2, 1)},
        rank=2,
    ),
    "vera": case(
        "VERA",
        {"r": RANK},
        lambda i, o: {"vera_lambda_b": (o,), "vera_lambda_d": (RANK,)},
        [("base_model.vera_A", (RANK, 48)), ("base_model.vera_B", (32, RANK))],
    ),
    "vera-from-its-seed": case(
        "VERA",
        {"r": RANK, "save_projection": False, "projection_prng_key": 5},
        lambda i, o: {"vera_lambda_b": (o,), "vera_lambda_d": (RANK,)},
    ),
    "loha": case(
        "LOHA",
        {"r": RANK, "alpha": 6},
        lambda i, o: {
            "hada_w1_a": (o, RANK),
            "hada_w1_b": (RANK, i),
            "hada_w2_a": (o, RANK),
            "hada_w2_b": (RANK, i),
        },
        rank=RANK * RANK,
    ),
    "hra": case("HRA", {"r": RANK}, lambda i, o: {"hra_u": (i, RANK)}),
    "miss": case("MISS", {"r": RANK}, lambda i, o: {"miss_block": (RANK, o)}),
    "miss-mini": case("MISS", {"r": RANK, "init_weights": "mini", "mini_r": 4}, lambda i, o: {"miss_block": (RANK, 4)}),
    "delora": case(
        "DELORA",
        {"r": RANK},
        lambda i, o: {"delora_A": (RANK, i), "delora_B": (o, RANK), "delora_lambda": (1,), "delora_w_norm": (i,)},
    ),
    "beft": case("BEFT", {}, lambda i, o: {"beft_bias": (1, o)}, rank=None),
    "oft": case("OFT", OFT, lambda i, o: {"oft_R.weight": (i // 8, 28)}, rank=None),
    "oft-by-count": case(
        "OFT",
        {**OFT, "r": 5, "oft_block_size": 0},  # 4 blocks of 32 inputs and of 48: 5 divides neither
        lambda i, o: {"oft_R.weight": (4, i // 4 * (i // 4 - 1) // 2)},
        rank=None,
    ),
    "oft-shared": case(
        "OFT",
        {**OFT, "block_share": True, "oft_block_size": 64},
        lambda i, o: {"oft_R.weight": (1, i * (i - 1) // 2)},
        rank=None,
    ),
    "boft": case(
        "BOFT",
        {"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 2},
        lambda i, o: {"boft_R": (2, i // 4, 4, 4), "boft_s": (o, 1)},
        rank=None,
    ),
    "boft-by-count": case(
        "BOFT",
        {"boft_block_size": 0, "boft_block_num": 4},
        lambda i, o: {"boft_R": (1, 4, i // 4, i // 4), "boft_s": (o, 1)},
        rank=None,
    ),
    **{
        f"road-{width}": case(
            "ROAD",
            {"variant": f"road_{width}", "group_size": 8},
            partial(_road, width),
            rank=None,
        )
        for width in (1, 2, 4)
    },
    "shira": case(
        "SHIRA",
        {"r": RANK},
        lambda i, o: {"shira_weight": (RANK * (i + o),), "shira_indices": (2, RANK * (i + o))},
        rank=None,
    ),
    "lokr": case(  # 32 is 4 * 8, 48 is 6 * 8, 64 is 8 * 8; the second factor is decomposed: 3 is below 8 / 2
        "LOKR",
        {"r": RANK, "alpha": 6},
        lambda i, o: {
            "lokr_w1": (o // 8, i // 8),
            "lokr_w2_a": (8, RANK),
            "lokr_w2_b": (RANK, 8),
        },
        rank=None,
    ),
    "fourierft": case(
        "FOURIERFT",
        {"n_frequency": 7, "scaling": 10.0, "random_loc_seed": 1, "n_frequency_pattern": {"down_proj": 9}},
        lambda i, o: {"fourierft_spectrum": (9 if i == 48 else 7,)},
        rank=None,
    ),
    "c3a": case(
        "C3A",
        {"block_size": 16, "block_size_pattern": {"down_proj": 8}},
        lambda i, o: {"c3a_kernel": (o // 8, i // 8, 8) if i == 48 else (o // 16, i // 16, 16)},
        rank=None,
    ),
    "hira": case("HIRA", {"r": 300}, lambda i, o: {"hira_A": (300, i), "hira_B": (o, 300)}, rank=None),
}


def config_of(one: Case, base: Path, **changes: Any) -> dict[str, Any]:
    config = {
        "peft_type": one.peft_type, "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "target_modules": list(TARGETS), **one.config, **changes,
    }  # fmt: skip
    return {key: value for key, value in config.items() if value is not Ellipsis}


def tensors_of(one: Case) -> dict[str, Array]:
    found = {name: np.ones(shape, np.float32) for name, shape in one.shared.items()}
    for module in linear_names(*TARGETS):
        for part, shape in one.shapes(*sizes(module)).items():
            found[f"{ROOT}{module}.{part}"] = np.ones(shape, np.int32 if part == PLACES else np.float32)
    return found


def write(folder: Path, one: Case, base: Path, **changes: Any) -> Path:
    return write_adapter(folder, config_of(one, base, **changes), tensors_of(one))
