"""Whole modules, rows of the vocabulary, norms and biases: what a config demands, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub.errors import Refused
from hub.manifest import Manifest
from hub.validate import validate
from tests.unit.hub.makers import Array, base_tensors, lora_config, lora_tensors, write_adapter, write_base

ROOT = "base_model.model."
EMBED, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
INNER = [f"model.layers.{layer}.input_layernorm" for layer in (0, 1)]
V, E = 64, 32  # the base of `makers`
LN = {"peft_type": "LN_TUNING", "r": ..., "lora_alpha": ..., "lora_dropout": ..., "bias": ..., "use_dora": ...}
LN |= {"init_lora_weights": ..., "rank_pattern": ..., "alpha_pattern": ...}
TOKENS = {**LN, "peft_type": "TRAINABLE_TOKENS", "token_indices": [9, 3], "target_modules": EMBED}
BITFIT = {**LN, "peft_type": "BITFIT", "target_modules": None}


def ones(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    return {f"{ROOT}{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}


def push(folder: Path, base: Path, shapes: Mapping[str, tuple[int, ...]], **changes: Any) -> Manifest:
    own = {} if "r" in changes else lora_tensors()
    return validate(write_adapter(folder, lora_config(base, **changes), {**own, **ones(shapes)}))


def refusal(folder: Path, base: Path, shapes: Mapping[str, tuple[int, ...]], **changes: Any) -> str:
    with pytest.raises(Refused) as caught:
        push(folder, base, shapes, **changes)
    return "\n".join(map(str, caught.value.problems))


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    folder = tmp_path / "tied"
    folder.mkdir()
    write_base(folder, tie_word_embeddings=True)
    tensors = {name: array for name, array in base_tensors().items() if name != f"{HEAD}.weight"}
    save_file(tensors, folder / "model.safetensors")
    return folder


GOOD: list[tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = [
    ({"modules_to_save": [HEAD]}, {f"{HEAD}.weight": (V, E)}),
    ({"modules_to_save": ["embed_tokens"]}, {f"{EMBED}.weight": (V, E)}),
    ({"modules_to_save": ["norm"]}, {f"{name}.weight": (E,) for name in [NORM, *INNER]}),  # an end without a dot
    ({"modules_to_save": ["0.mlp.up_proj"]}, {"model.layers.0.mlp.up_proj.weight": (48, E)}),
    ({"trainable_token_indices": [5, 7, 1]}, {f"{EMBED}.token_adapter.trainable_tokens_delta": (3, E)}),
    (
        {"trainable_token_indices": {"embed_tokens": [5], HEAD: [7, 8]}},
        {
            f"{EMBED}.token_adapter.trainable_tokens_delta": (1, E),
            f"{HEAD}.token_adapter.trainable_tokens_delta": (2, E),
        },
    ),
    ({**LN, "target_modules": ["norm"]}, {f"{NORM}.ln_tuning_layers.weight": (E,)}),
    (
        {**LN, "target_modules": ["input_layernorm"], "modules_to_save": [HEAD]},
        {f"{HEAD}.weight": (V, E), **{f"{name}.ln_tuning_layers.weight": (E,) for name in INNER}},
    ),
    (TOKENS, {f"{EMBED}.trainable_tokens_delta": (2, E)}),
]


@pytest.mark.parametrize(("changes", "shapes"), GOOD)
def test_what_a_config_asks_for_is_demanded_with_its_shape(
    changes: dict[str, Any], shapes: dict[str, tuple[int, ...]], tmp_path: Path, base: Path
) -> None:
    assert push(tmp_path / "a", base, shapes, **changes).parameters
    for name, shape in shapes.items():
        without = {other: found for other, found in shapes.items() if other != name}
        assert f"{name}: is missing" in refusal(tmp_path / "a", base, without, **changes)
        assert f"{name}: has shape" in refusal(tmp_path / "a", base, {**shapes, name: (*shape[:-1], 7)}, **changes)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"modules_to_save": ["mlp"]}, "replaces model.layers.0.mlp, which is no Linear layer, norm or embedding"),
    ({"modules_to_save": ["classifier"]}, "modules_to_save: classifier is not in the base"),
    ({"modules_to_save": ["q_proj"]}, "model.layers.0.self_attn.q_proj is adapted, or its bias is trained, too"),
    ({"trainable_token_indices": [V]}, f"token {V} is not in the base's vocabulary of {V}, which is not resized"),
    ({"trainable_token_indices": [3, 3]}, "trainable_token_indices: names a token twice"),
    ({"trainable_token_indices": {"norm": [1]}}, "norm is no embedding or output head"),
    (
        {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        f"{EMBED} is adapted or replaced, too",
    ),
    (
        {"alora_invocation_tokens": [4], "modules_to_save": [HEAD]},
        "modules_to_save: cannot stand beside alora_invocation_tokens",
    ),
    ({"target_modules": ["embed_tokens"], "lora_bias": True}, f"cannot stand beside the embedding {EMBED}"),
    ({**LN, "target_modules": ["q_proj"]}, "q_proj is no norm; only a norm is served"),
    ({**TOKENS, "token_indices": [70]}, "token 70 is not in the base's vocabulary"),
    ({**TOKENS, "target_modules": ["norm"]}, f"{NORM} is no embedding or output head"),
    ({**TOKENS, "modules_to_save": [HEAD]}, "modules_to_save: is no field of TRAINABLE_TOKENS"),
    (BITFIT, "target_modules: the base has no biases"),
    ({"peft_type": "VERA", "r": 4, "target_modules": ["embed_tokens"]}, f"{EMBED} is no Linear layer"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_what_is_not_served_is_refused_by_name(
    changes: dict[str, Any], reason: str, tmp_path: Path, base: Path
) -> None:
    assert reason in refusal(tmp_path / "a", base, {}, **changes)


def test_the_embedding_takes_lora_with_its_options(tmp_path: Path, base: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {f"{EMBED}.lora_embedding_A": (2, V), f"{EMBED}.lora_embedding_B": (E, 2)}
    changes: dict[str, Any] = {"r": 2, "target_modules": ["embed_tokens"]}
    assert push(tmp_path / "a", base, shapes, **changes).rank == 2
    assert push(tmp_path / "a", base, {**shapes, f"{EMBED}.base_layer.weight": (V, E)}, **changes).rank == 2
    assert "another size" in refusal(
        tmp_path / "a", base, {**shapes, f"{EMBED}.base_layer.weight": (V + 1, E)}, **changes
    )
    dora = {**changes, "use_dora": True}
    assert push(tmp_path / "a", base, {**shapes, f"{EMBED}.lora_magnitude_vector": (E,)}, **dora).rank == 2
    assert "is missing" in refusal(tmp_path / "a", base, shapes, **dora)


def test_all_linear_means_neither_the_embedding_nor_the_head(tmp_path: Path, base: Path) -> None:
    text = refusal(tmp_path / "a", base, {}, target_modules="all-linear", r=4)
    assert "up_proj" in text
    assert EMBED not in text
    assert HEAD not in text


def test_a_head_that_is_tied_follows_the_embedding(tmp_path: Path, tied: Path) -> None:
    rows = f"{EMBED}.token_adapter.trainable_tokens_delta"
    same = {"embed_tokens": [3, 4], HEAD: [3, 4]}
    assert push(tmp_path / "a", tied, {rows: (2, E)}, trainable_token_indices=same)
    both: dict[str, tuple[int, ...]] = {f"{name}.trainable_tokens_delta": (2, E) for name in (EMBED, HEAD)}
    assert push(tmp_path / "a", tied, both, **TOKENS)
    one = {f"{EMBED}.trainable_tokens_delta": (2, E)}
    assert f"{HEAD}.trainable_tokens_delta: is missing" in refusal(tmp_path / "a", tied, one, **TOKENS)
    named = {**TOKENS, "target_modules": ["embed_tokens", HEAD]}
    assert f"{HEAD} is tied to {EMBED}: name that alone" in refusal(tmp_path / "a", tied, both, **named)


def test_biases_alone_are_those_that_the_base_has(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "biased"
    folder.mkdir()
    write_base(folder)
    biases = {f"{name}.bias": (32,) for name in ("model.layers.0.self_attn.q_proj", NORM)}
    save_file(
        {**base_tensors(), **{name: np.zeros(shape, np.float32) for name, shape in biases.items()}},
        folder / "model.safetensors",
    )
    manifest = push(tmp_path / "a", folder, biases, **BITFIT)
    assert (manifest.kind, manifest.targets) == ("bitfit", ("norm", "q_proj"))
    one = {f"{NORM}.bias": (32,)}
    assert push(tmp_path / "a", folder, one, **{**BITFIT, "target_modules": ["norm"]}).targets == ("norm",)
    assert "q_proj.bias: is missing" in refusal(tmp_path / "a", folder, one, **BITFIT)
    strange = {**BITFIT, "target_modules": ["norm", "v_proj"]}
    assert "v_proj is no module with a bias" in refusal(tmp_path / "a", folder, one, **strange)


def test_a_head_with_a_bias_takes_no_rows(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "biased"
    folder.mkdir()
    write_base(folder)
    save_file({**base_tensors(), f"{HEAD}.bias": np.zeros(V, np.float32)}, folder / "model.safetensors")
    rows = {f"{HEAD}.token_adapter.trainable_tokens_delta": (1, E)}
    text = refusal(tmp_path / "a", folder, rows, trainable_token_indices={HEAD: [3]})
    assert "lm_head has a bias, which PEFT drops" in text
