"""Every base that is claimed to be served, with one adapter of each sort, against PEFT running each of them alone.

Those that run with every kind, in test_kinds_against_peft.py, are left out of the first test here: its rows run there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from hub.base import Linear, describe_base, modules
from hub.validate import validate
from server.config import ModelConfig
from server.errors import StartupRefused
from server.model.load import load_network
from tests.oracle.conftest import ARCHITECTURES, MORE_BASES, SMALL, Bench, TinyBase
from tests.oracle.kinds import ATTENTION_AND_MLP, COMMON, CONV1D, DEFAULT, ROUTERS, Row, make_adapter, mixture_rows
from tests.oracle.test_kinds_against_peft import NEW_TOKENS, TOLERANCE, _greedy, _logits, prompt
from trainer.base import read_anatomy

BASES = (*ARCHITECTURES, *MORE_BASES)

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what these adapters are on purpose


@pytest.mark.parametrize("architecture", MORE_BASES)
def test_a_base_and_adapters_of_each_sort_in_one_batch_equal_peft_alone(
    architecture: str, tiny_base: Callable[[str], TinyBase], bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    base, rig = tiny_base(architecture), bench(architecture)
    plain = base.fresh()
    requests: list[tuple[list[int], Any]] = [(prompt(99, 13), []), (prompt(98, 4), [])]
    references = [plain, plain]
    for seed, (name, row) in enumerate(_rows(architecture).items()):
        references.append(make_adapter(base, row, tmp_path / name, seed))
        assert validate(tmp_path / name, base=base.folder).kind == row.kind
        requests.append((prompt(seed, 9 + 4 * seed), [(rig.graft(tmp_path / name, row.kind), 1.0)]))
    got = rig.run(requests, new=NEW_TOKENS)
    assert rig.mixed_steps > NEW_TOKENS - 2, "the requests did not share steps"
    for index, ((ids, mixture), reference) in enumerate(zip(requests, references, strict=True)):
        name = mixture[0][0].label if mixture else "base"
        expected = _logits(reference, ids)
        error = (got[index][: len(ids)] - expected).abs().max().item()
        assert error < TOLERANCE, f"{name} on {architecture} differs by {error:.1e}"
        assert rig.sequences[index].tokens[len(ids) :] == _greedy(reference, ids), f"greedy text of {name}"
        if mixture:
            effect = (expected - _logits(plain, ids)).abs().max().item()
            assert effect > 100 * TOLERANCE, f"{name} has no visible effect ({effect:.1e})"


@pytest.mark.parametrize("architecture", BASES)
def test_what_the_hub_says_of_a_base_is_what_is_loaded(
    architecture: str, tiny_base: Callable[[str], TinyBase], bench: Callable[[str], Bench]
) -> None:
    """Every module with a weight by its name, every Linear and every weight of an expert by its sizes."""
    base = tiny_base(architecture)
    loaded, told, facts = base.fresh(), modules(base.folder), bench(architecture).network.facts
    linears = {name: _sizes(one) for name, one in loaded.named_modules() if isinstance(one, nn.Linear | Conv1D)}
    assert told.linears == linears
    own = {name: dict(one.named_parameters(recurse=False)) for name, one in loaded.named_modules()}
    weighted = {name for name, held in own.items() if held and held.keys() != {"sinks"}}
    assert told.linears.keys() | told.others == weighted
    assert set(told.biased or ()) == {name for name, held in own.items() if any(part.endswith("bias") for part in held)}
    anatomy = read_anatomy(loaded, base.folder, None)
    assert {*anatomy.linears, anatomy.head} == linears.keys()
    described = describe_base(base.folder)
    assert (anatomy.heads, anatomy.kv_heads, anatomy.head_dim) == (
        described.heads,
        described.kv_heads,
        described.head_dim,
    )
    hub_says = [(name, (one.experts, one.inputs, one.outputs)) for name, one in told.parameters.items()]
    grafted = [(name, (one.experts, one.in_features, one.out_features)) for name, one in facts.parameters.items()]
    assert sorted(hub_says, key=_module) == sorted(grafted, key=_module), "the order within a module counts"
    assert {(layer.kv_heads, layer.head_dim) for layer in facts.layers} == {(described.kv_heads, described.head_dim)}
    assert (described.layers, described.hidden_size) == (len(facts.layers), facts.hidden_size)


@pytest.mark.parametrize("architecture", BASES)
def test_sizes_that_a_config_leaves_out_are_those_that_transformers_takes(architecture: str, tmp_path: Path) -> None:
    """config.json holds what differs from the defaults, no more."""
    options = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    options |= {"num_attention_heads": 32, "hidden_size": 256, "num_hidden_layers": 1}
    options |= (
        dict.fromkeys(("num_local_experts", "num_experts", "num_experts_per_tok"), 1) if architecture in ROUTERS else {}
    )
    if architecture in ("gpt2",):
        options = {"vocab_size": 128, "n_layer": 1, "n_head": 32, "n_embd": 256}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**options))
    model.save_pretrained(tmp_path)
    described = describe_base(tmp_path)
    loaded = load_network(ModelConfig(base=architecture), tmp_path, name=architecture).facts.layers[0]
    assert (described.kv_heads, described.head_dim) == (loaded.kv_heads, loaded.head_dim)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            }
        },
        "rope_type longrope chooses frequencies by the longest sequence of the batch",
    ),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        "rope_type dynamic chooses frequencies by the longest sequence of the batch",
    ),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}, "architecture bloom has its own attention"),
    "falcon": ("falcon", {}, "architecture falcon has its own attention"),
    "stablelm": ("stablelm", {}, "its layers do not hand the forward pass's arguments on to their attention"),
    "deepseek": (
        "deepseek_v3",
        {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
            "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
        },
        r"key shape \(1, 4, 12, 16\) differs from value shape \(1, 4, 12, 8\)",
    ),
    "attention in some layers": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"]},
        r"attention ran in layers \[1\], the base has 2",
    ),
    "a state beside attention": (
        "falcon_h1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        "packed logits differ from transformers' own by",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_that_is_not_proved_is_refused_by_name_with_the_reason(case: str, tmp_path: Path) -> None:
    architecture, options, reason = REFUSED[case]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**{**SMALL, "num_hidden_layers": 2, **options})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(StartupRefused, match=f"base my-{architecture}: {reason}"):
        load_network(ModelConfig(base="tiny"), tmp_path, name=f"my-{architecture}")


def _rows(architecture: str) -> dict[str, Row]:
    targets, feedforward = ATTENTION_AND_MLP.get(architecture, DEFAULT)
    options = {"fan_in_fan_out": True, **COMMON} if architecture in CONV1D else COMMON
    ia3 = IA3Config(target_modules=[*targets[:2], feedforward], feedforward_modules=[feedforward], **options)
    return {
        "lora": Row("lora", LoraConfig(r=4, lora_alpha=16, target_modules=targets, **options)),
        "ia3": Row("ia3", ia3),
        "prefix": Row("prefix", PrefixTuningConfig(num_virtual_tokens=5, **COMMON)),
        **(mixture_rows(architecture, targets[0]) if architecture in ROUTERS else {}),
    }


def _sizes(linear: nn.Module) -> Linear:
    if isinstance(linear, Conv1D):
        return Linear(linear.weight.shape[0], linear.weight.shape[1])
    assert isinstance(linear, nn.Linear)
    return Linear(linear.in_features, linear.out_features)


def _module(named: tuple[str, object]) -> str:
    return named[0].rpartition(".")[0]
