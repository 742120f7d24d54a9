"""What a push checks of each kind that changes Linear layers: its options, and the names and shapes of its tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub.base import describe_base, modules
from hub.errors import Refused
from hub.methods import METHODS, Limits
from hub.validate import validate, validate_kept
from tests.unit.hub.kinds import CASES, RANK, ROOT, TARGETS, Case, config_of, tensors_of, write
from tests.unit.hub.makers import Array, base_tensors, write_adapter, write_base

Q0 = "model.layers.0.self_attn.q_proj"


def problems(folder: Path, **options: Any) -> list[str]:
    with pytest.raises(Refused) as refusal:
        validate(folder, **options)
    return [str(problem) for problem in refusal.value.problems]


def test_every_kind_has_a_name_of_its_own() -> None:
    assert len({method.kind for method in METHODS.values()}) == len(METHODS)
    assert {one.peft_type for one in CASES.values()} <= METHODS.keys()


def test_the_table_of_kinds_needs_no_torch() -> None:
    """Though it says what each computes."""
    script = "import sys, hub.validate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_example_for_contributors_is_the_kind_itself() -> None:
    root = Path(__file__).parents[3]
    code = (root / "hub/families/miss.py").read_text().partition("from hub.ref import printable\n")[2].strip()
    assert f"```python\n{code}\n```\n" in (root / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("name", CASES)
def test_a_good_adapter_gives_its_manifest(name: str, tmp_path: Path, base: Path) -> None:
    one = CASES[name]
    manifest = validate(write(tmp_path / "a", one, base))
    assert (manifest.kind, manifest.rank) == (METHODS[one.peft_type].kind, one.rank)
    assert manifest.targets == ("down_proj", "q_proj")


@pytest.mark.parametrize("name", CASES)
def test_each_tensor_that_is_missing_is_named(name: str, tmp_path: Path, base: Path) -> None:
    whole = tensors_of(CASES[name])
    for tensor in [*CASES[name].shared, *(other for other in whole if Q0 in other)]:
        rest = {other: array for other, array in whole.items() if other != tensor}
        folder = write_adapter(tmp_path / "a", config_of(CASES[name], base), rest)
        [problem] = problems(folder)
        assert f"{tensor}: is missing; the config and the base demand it with shape" in problem


@pytest.mark.parametrize("name", CASES)
def test_each_tensor_of_a_wrong_shape_is_named_with_both(name: str, tmp_path: Path, base: Path) -> None:
    whole = tensors_of(CASES[name])
    for tensor in [*CASES[name].shared, *(other for other in whole if Q0 in other)]:
        shape = whole[tensor].shape
        wrong = np.ones((*shape[:-1], shape[-1] + 1), whole[tensor].dtype)
        folder = write_adapter(tmp_path / "a", config_of(CASES[name], base), {**whole, tensor: wrong})
        [problem] = problems(folder)
        assert f"{tensor}: has shape" in problem
        assert f"but the config and the base demand ({', '.join(map(str, shape))})" in problem


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_that_is_misnamed_or_too_many_is_named(name: str, tmp_path: Path, base: Path) -> None:
    whole = tensors_of(CASES[name])
    part = next(iter(CASES[name].shapes(1, 1)))
    other, nowhere = "model.layers.0.self_attn.v_proj", "model.layers.9.self_attn.q_proj"
    extra = {
        f"{ROOT}{other}.{part}": f"belongs to {other}, which the config does not target",
        f"{ROOT}{nowhere}.{part}": f"belongs to {nowhere}, which is no Linear layer of the base",
        f"{ROOT}{Q0}.{part}x": "is no tensor of this kind of adapter",
        f"{ROOT}{Q0}.base_layer.weight": "a copy of the base's own weight",
        f"{ROOT}{Q0}.base_layer.bias": "a bias of the base's own that the config has not trained",
    }
    many = {**whole, **{tensor: np.ones(1, np.float32) for tensor in extra}}
    found = "\n".join(problems(write_adapter(tmp_path / "a", config_of(CASES[name], base), many)))
    for tensor, reason in extra.items():
        assert f"{tensor}: {reason}" in found
    assert len(found.splitlines()) == len(extra)


@pytest.mark.parametrize("name", CASES)
def test_a_key_that_is_unknown_is_refused(name: str, tmp_path: Path, base: Path) -> None:
    [problem] = problems(write(tmp_path / "a", CASES[name], base, wibble=1))
    assert f"wibble: is no field of {CASES[name].peft_type}" in problem


@pytest.mark.parametrize("name", [name for name in CASES if "miss-mini" not in name and "adalora-cut" not in name])
def test_the_output_head_takes_an_adapter_of_every_kind(name: str, tmp_path: Path, base: Path) -> None:
    one = replace(CASES[name], shared={n: (64, RANK) if n.endswith("B") else s for n, s in CASES[name].shared.items()})
    head = {
        f"{ROOT}lm_head.{part}": np.ones(shape, np.int32 if part.endswith("indices") else np.float32)
        for part, shape in one.shapes(32, 64).items()
    }
    config, whole = config_of(one, base, target_modules=[*TARGETS, "lm_head"]), {**tensors_of(one), **head}
    assert "lm_head" in validate(write_adapter(tmp_path / "a", config, whole)).targets
    copy = {f"{ROOT}lm_head.base_layer.weight": np.ones((64, 32), np.float32)}  # PEFT writes it, or not
    assert validate(write_adapter(tmp_path / "a", config, {**whole, **copy}))
    [problem] = problems(
        write_adapter(tmp_path / "a", config, {**whole, next(iter(copy)): np.ones((70, 32), np.float32)})
    )
    assert "a vocabulary of another size is not served" in problem


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("lora-activated", {"use_dora": True}, "use_dora: cannot stand beside alora_invocation_tokens"),
        ("lora-activated", {"bias": "all"}, "bias: cannot stand beside alora_invocation_tokens"),
        ("lora-activated", {"alora_invocation_tokens": [5, 10**6]}, "token 1000000 is not in the base's vocabulary of"),
        ("lora-dora", {"lora_bias": True}, "lora_bias: cannot stand beside use_dora"),
        ("lora-dora", {"init_lora_weights": "mica"}, "init_lora_weights: cannot stand beside use_dora"),
        ("lora-dora", {"use_dora": 1}, "use_dora: must be true or false"),
        ("lora-dora", {"bias": "vera_only"}, "bias: vera_only is not served; served are none, all, lora_only"),
        ("adalora", {"use_dora": True}, "use_dora: true is not served"),
        ("adalora", {"use_rslora": True}, "use_rslora: true is not served (AdaLoRA scales by init_r)"),
        ("adalora", {"lora_bias": True}, "lora_bias: true is not served"),
        ("adalora", {"alpha_pattern": {"q": 1}}, "is not served (AdaLoRA has one alpha)"),
        ("adalora", {"lora_alpha": 0}, "lora_alpha: must be above 0, not 0"),
        ("adalora", {"init_r": ...}, "init_r: is missing"),
        ("adalora", {"init_r": 10**12}, "init_r: rank 1000000000000 is above max_rank 256"),
        ("adalora", {"rank_pattern": {"(": [True]}}, "'(' is not <module>.lora_E"),
        ("adalora", {"rank_pattern": {f"{Q0}.lora_E": [1]}}, "must be a list of true and false"),
        ("adalora", {"rank_pattern": [True]}, "rank_pattern: must be an object of at most 4096 masks"),
        ("adalora", {"rank_pattern": {f"{Q0}.lora_E": [True]}}, "has 1 values, init_r is 3"),
        ("adalora", {"rank_pattern": {"x.lora_E": [True] * 3}}, "x.lora_E belongs to no module that is adapted"),
        ("adalora", {"init_lora_weights": "pissa"}, "rewrites the base's weights"),
        ("vera", {"projection_prng_key": 2**64}, "projection_prng_key: must be a whole number of 64 bits"),
        ("vera", {"projection_prng_key": 1.5}, "projection_prng_key: must be a whole number of 64 bits"),
        ("vera", {"exclude_modules": ["v_proj"]}, "exclude_modules: is no field of VERA"),
        ("vera", {"bias": "lora_only"}, "served are none, all, vera_only"),
        ("vera", {"r": 300}, "r: rank 300 is above max_rank 256"),
        ("vera", {"save_projection": False}, "base_model.vera_A: "),
        ("loha", {"r": 17}, "r: 17 makes rank 289, which is above max_rank 256"),
        ("loha", {"rank_pattern": {"q_proj": 20}}, "rank_pattern: rank 400 is above max_rank 256"),
        ("loha", {"bias": "none"}, "bias: is no field of LOHA"),
        ("hra", {"apply_GS": "yes"}, "apply_GS: must be true or false"),
        ("hra", {"r": 257}, "r: rank 257 is above max_rank 256"),
        ("miss", {"init_weights": "bat"}, "init_weights: bat is not served (it multiplies blocks"),
        ("miss", {"init_weights": "new"}, "init_weights: new is not served; served are true, false, mini"),
        ("miss", {"r": 33}, f"r: 33 is above the 32 inputs of {Q0}"),
        ("miss-mini", {"mini_r": 5}, "mini_r: 5 does not divide the 32 outputs of model.layers.0.mlp.down_proj"),
        ("miss-mini", {"mini_r": 0}, "mini_r: must be a whole number above 0"),
        ("delora", {"lambda_pattern": {"(a+)+": 1}}, "lambda_pattern: the pattern '(a+)+' could take for ever"),
        ("delora", {"rank_pattern": {"q_proj": 300}}, "rank_pattern: rank 300 is above max_rank 256"),
        ("beft", {"target_modules": ...}, "target_modules: is missing"),
        ("beft", {"feedforward_modules": []}, "feedforward_modules: is no field of BEFT"),
        ("oft", {"r": 2}, "oft_block_size: 8 beside r 2: exactly one of the two must be 0"),
        ("oft", {"oft_block_size": 0}, "oft_block_size: 0 beside r 0: exactly one of the two must be 0"),
        ("oft", {"oft_block_size": -8}, "oft_block_size: must be a whole number, not -8"),
        ("oft", {"oft_block_size": ...}, "oft_block_size: is missing"),
        ("oft", {"use_cayley_neumann": ...}, "use_cayley_neumann: is missing"),
        ("oft", {"peft_version": "0.17.1"}, "use_cayley_neumann: true is another series before PEFT 0.18"),
        ("oft", {"peft_version": "0.18.0.dev0@1f2e"}, "peft_version is 0.18.0.dev0@1f2e: train it anew"),
        ("oft", {"peft_version": None}, "peft_version is missing: train it anew"),
        ("oft", {"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms: must be a whole number above 0"),
        ("oft", {"coft": "yes"}, "coft: must be true or false"),
        ("oft", {"bias": "lora_only"}, "served are none, all, oft_only"),
        ("boft", {"boft_block_num": 4}, "boft_block_size: 4 beside boft_block_num 4: exactly one of the two must be 0"),
        ("boft", {"boft_block_size": 5}, "boft_block_size: 5 does not divide the 48 inputs of"),
        (
            "boft",
            {"boft_block_size": 32},
            "boft_n_butterfly_factor: 2 needs blocks of an even size, and 32 inputs to be",
        ),
        ("boft", {"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor: 0 is not served"),
        (
            "boft",
            {"boft_n_butterfly_factor": 1},
            "boft_R: has shape (2, 8, 4, 4), but the config and the base demand (1",
        ),
        ("boft-by-count", {"boft_block_num": 5}, "boft_block_num: 5 does not divide the 48 inputs of"),
        ("road-1", {"group_size": 12}, "group_size: 12 does not divide the 32 outputs of model"),
        ("road-1", {"group_size": 7}, "group_size: must be even, not 7"),
        ("road-1", {"group_size": True}, "group_size: must be a whole number above 0, not true"),
        ("road-1", {"variant": "road_3"}, "variant: road_3 is not served; served are road_1, road_2, road_4"),
        ("road-1", {"variant": ...}, "variant: is missing"),
        ("road-1", {"bias": "none"}, "bias: is no field of ROAD"),
        ("shira", {"r": 17}, f"r: 17 makes 1088 entries, above the 1024 weights of {Q0}"),
        ("shira", {"random_seed": "x"}, "random_seed: must be a whole number of 64 bits"),
        ("lokr", {"decompose_factor": 0}, "decompose_factor: must be a whole number above 0, not 0"),
        ("lokr", {"decompose_factor": 8}, "lokr_w1: has shape (4, 4), but the config and the base demand (8, 8)"),
        ("lokr", {"init_weights": "new"}, "init_weights: new is not served; served are true, false, lycoris"),
        ("lokr", {"bias": "none"}, "bias: is no field of LOKR"),
        ("fourierft", {"n_frequency": 1025}, f"n_frequency: 1025 is above the 1024 weights of {Q0}"),
        ("fourierft", {"random_loc_seed": None}, "random_loc_seed: must be a whole number of 64 bits, not null"),
        ("fourierft", {"scaling": ...}, "scaling: is missing"),
        ("fourierft", {"n_frequency_pattern": {"(a+)+": 3}}, "could take for ever"),
        ("c3a", {"block_size": 12}, f"block_size: 12 does not divide the 32 inputs and 32 outputs of {Q0}"),
        ("c3a", {"exclude_modules": ["x"]}, "exclude_modules: is no field of C3A"),
        (
            "c3a",
            {"block_size_pattern": {"q_proj": 0}},
            "block_size_pattern: q_proj must be a whole number above 0, not 0",
        ),
        ("hira", {"r": 0}, "r: must be a whole number above 0, not 0"),
        ("hira", {"init_weights": "pissa"}, "init_weights: pissa is not served"),
        ("hira", {"bias": "none"}, "bias: is no field of HIRA"),
    ],
)
def test_an_option_that_is_not_served_is_refused_by_name(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path, base: Path
) -> None:
    assert reason in "\n".join(problems(write(tmp_path / "a", CASES[name], base, **changes)))


def test_the_rank_of_loha_is_limited_as_it_is_served(tmp_path: Path, base: Path) -> None:
    folder = write(tmp_path / "a", CASES["loha"], base)
    assert validate(folder, limits=Limits(max_rank=9)).rank == 9
    assert "3 makes rank 9, which is above max_rank 8" in problems(folder, limits=Limits(max_rank=8))[0]


@pytest.mark.parametrize("name", CASES)
def test_a_kind_that_peft_cannot_put_on_conv1d_is_refused_there(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 10}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"transformer.h.0.attn.c_attn.weight": np.zeros((8, 24), np.float32)}, folder / "model.safetensors")
    one = replace(CASES[name], config={**CASES[name].config, "target_modules": ["c_attn"]})
    found = "\n".join(problems(write(tmp_path / "a", one, folder)))
    refused = one.peft_type not in ("LORA", "ADALORA", "VERA", "FOURIERFT", "HIRA")
    assert ("c_attn is a Conv1D layer, on which PEFT has no such adapter" in found) == refused


BIASES = {
    **{f"model.layers.{layer}.self_attn.q_proj.bias": np.zeros(32, np.float32) for layer in (0, 1)},
    **{f"model.layers.{layer}.self_attn.k_proj.bias": np.zeros(16, np.float32) for layer in (0, 1)},
}


def biased_base(folder: Path, **more: Array) -> Path:
    """As the other base, with biases on queries and keys."""
    write_base(folder)
    save_file({**base_tensors(), **BIASES, **more}, folder / "model.safetensors")
    return folder


def with_biases(one: Case, trained: str) -> dict[str, Array]:
    """What PEFT saves: wrapped for the adapted queries, bare for the keys."""
    found = tensors_of(one)
    for layer in (0, 1):
        found[f"{ROOT}model.layers.{layer}.self_attn.q_proj.base_layer.bias"] = np.ones(32, np.float32)
        if trained == "all":
            found[f"{ROOT}model.layers.{layer}.self_attn.k_proj.bias"] = np.ones(16, np.float32)
    return found


OWN = {
    "lora-dora": "lora_only", "adalora": "lora_only", "vera": "vera_only", "hra": "hra_only", "miss": "MiSS_only",
    "delora": "delora_only", "oft": "oft_only", "boft": "boft_only", "fourierft": "fourier_only", "c3a": "c3a_only",
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("every", [True, False])
def test_the_biases_that_a_config_has_trained_are_demanded(name: str, every: bool, tmp_path: Path) -> None:
    base, trained = biased_base(tmp_path / "base"), "all" if every else OWN[name]
    config, whole = config_of(CASES[name], base, bias=trained), with_biases(CASES[name], trained)
    assert validate(write_adapter(tmp_path / "a", config, whole)).rank == CASES[name].rank
    for tensor in whole.keys() - tensors_of(CASES[name]).keys():
        rest = {other: array for other, array in whole.items() if other != tensor}
        [problem] = problems(write_adapter(tmp_path / "a", config, rest))
        assert f"{tensor}: is missing" in problem
        wrong = {**whole, tensor: np.ones(7, np.float32)}
        [problem] = problems(write_adapter(tmp_path / "a", config, wrong))
        assert f"{tensor}: has shape (7)" in problem
    more = {**whole, f"{ROOT}model.layers.0.mlp.up_proj.bias": np.ones(48, np.float32)}
    [problem] = problems(write_adapter(tmp_path / "a", config, more))
    assert "model.layers.0.mlp.up_proj" in problem


def test_where_the_base_is_described_without_its_biases_they_may_be_there(tmp_path: Path) -> None:
    base = biased_base(tmp_path / "base")
    known = modules(base)
    assert known.biased == frozenset(name.removesuffix(".bias") for name in BIASES)
    one = CASES["lora-dora"]
    for tensors in (with_biases(one, "all"), tensors_of(one)):
        folder = write_adapter(tmp_path / "a", config_of(one, base, bias="all"), tensors)
        names = {path.name: path.stat().st_size for path in folder.iterdir()}

        def opened(name: str, folder: Path = folder, names: dict[str, int] = names) -> Any:
            return (folder / name).open("rb"), names[name]

        manifest = validate_kept(
            "a", names, opened, base=describe_base(base, name="base"), modules=replace(known, biased=None)
        )
        assert manifest.rank == RANK


def test_all_biases_of_a_base_are_those_of_its_norms_too(tmp_path: Path) -> None:
    base = biased_base(tmp_path / "base", **{"model.norm.bias": np.zeros(32, np.float32)})
    one = CASES["lora-dora"]
    config, whole = config_of(one, base, bias="all"), with_biases(one, "all")
    [problem] = problems(write_adapter(tmp_path / "a", config, whole))
    assert f"{ROOT}model.norm.bias: is missing" in problem
    whole[f"{ROOT}model.norm.bias"] = np.ones(32, np.float32)
    assert validate(write_adapter(tmp_path / "a", config, whole))


def test_all_biases_of_a_base_where_something_else_has_one_are_refused(tmp_path: Path) -> None:
    base = biased_base(tmp_path / "base", **{"model.strange.bias": np.zeros(32, np.float32)})
    one = CASES["lora-dora"]
    folder = write_adapter(tmp_path / "a", config_of(one, base, bias="all"), with_biases(one, "all"))
    [problem] = problems(folder)
    assert "bias: all also trains biases that are not served, of 1 modules, model.strange among them" in problem
