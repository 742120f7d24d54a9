"""Configs: every key is served, inert, neutral or refused by name."""

from pathlib import Path
from typing import Any

import pytest

from hub.methods import METHODS, Limits, canonical_config, config_complaints, method_of
from tests.unit.hub.makers import lora_config

BASE = Path("base")


def complaints(config: dict[str, Any], **limits: int) -> dict[str, str]:
    method = method_of(config)
    assert not isinstance(method, str), method
    return dict(config_complaints(method, config, Limits(**limits)))


def test_a_config_as_peft_writes_it_has_no_complaints() -> None:
    assert complaints(lora_config(BASE)) == {}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("use_dora", 1, "true or false"),
        ("bias", "some", "served are none, all, lora_only"),
        ("bias", "vera_only", "served are none, all, lora_only"),
        ("target_parameters", "experts", "must be a list of names of weights"),
        ("target_parameters", [1], "must be a list of module names"),
        ("modules_to_save", "lm_head", "must be a list of module names"),
        ("modules_to_save", [""], "must be a list of module names"),
        ("modules_to_save", ["x"] * 5000, "above the limit of 4096"),
        ("trainable_token_indices", [-1], "must be a list of token ids"),
        ("trainable_token_indices", [True], "must be a list of token ids"),
        ("trainable_token_indices", {"embed_tokens": 3}, "must be a list of token ids"),
        ("trainable_token_indices", {"a": [], "b": [], "c": []}, "one for the embedding and one for the head"),
        ("layer_replication", [[0, 1]], "changes the network"),
        ("alora_invocation_tokens", [-5], "token ids"),
        ("alora_invocation_tokens", "assistant", "token ids"),
        ("use_qalora", True, "pools"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
        ("megatron_config", {}, "Megatron"),
        ("arrow_config", {"top_k": 3}, "routes"),
        ("kasa_config", {}, "KaSA"),
        ("monteclora_config", {}, "samples"),
        ("velora_config", {}, "VeLoRA"),
        ("ensure_weight_tying", True, "embedding"),
        ("auto_mapping", {"base_model_class": "X", "parent_library": "os"}, "Python code"),
        ("auto_mapping", {"base_model_class": "EvilForCausalLM", "parent_library": "evil"}, "Python code"),
        ("auto_mapping", {"base_model_class": "LlamaForCausalLM"}, "Python code"),
        ("auto_mapping", "transformers", "Python code"),
        ("task_type", "SEQ_CLS", "served are CAUSAL_LM"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_4", "rewrites the base"),
        ("init_lora_weights", "olora", "rewrites the base"),
        ("init_lora_weights", "corda", "rewrites the base"),
        ("init_lora_weights", "loftq", "rewrites the base"),
        ("init_lora_weights", "lora_ga", "rewrites the base"),
        ("init_lora_weights", "magic", "not served"),
        ("r", 0, "above 0, not 0"),
        ("r", "8", "above 0, not 8"),
        ("r", True, "above 0, not true"),
        ("r", 300, "rank 300 is above max_rank 256"),
        ("rank_pattern", {"q_proj": 999}, "rank 999 is above max_rank 256"),
        ("rank_pattern", {"(a+)+": 4}, "for ever"),
        ("rank_pattern", [4], "must be an object"),
        ("alpha_pattern", {"q_proj": "x"}, "finite number"),
        ("lora_alpha", None, "finite number"),
        ("target_modules", None, "must be a list"),
        ("target_modules", [], "must be a list"),
        ("target_modules", [1], "must be a list"),
        ("target_modules", "(", "no regular expression"),
        ("layers_to_transform", ["1"], "layer number"),
        ("layers_pattern", "layers", "needs layers_to_transform"),
        ("use_rslora", 1, "true or false"),
        ("lora_dropot", 0.1, "did you mean lora_dropout"),
        ("wibble", None, "is no field of LORA"),
    ],
)
def test_what_we_would_have_to_ignore_is_refused_by_name(key: str, value: Any, reason: str) -> None:
    found = complaints(lora_config(BASE, **{key: value}))
    assert list(found) == [key]
    assert reason in found[key]


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_initialisations_that_leave_the_base_alone_pass(value: Any) -> None:
    assert complaints(lora_config(BASE, init_lora_weights=value)) == {}


def test_every_complaint_is_told_at_once() -> None:
    assert set(complaints(lora_config(BASE, use_qalora=True, r=999, wibble=1, bias="some"))) == {
        "use_qalora", "r", "wibble", "bias",
    }  # fmt: skip


def test_a_required_key_that_is_missing_is_told() -> None:
    assert complaints(lora_config(BASE, r=...)) == {"r": "is missing"}


def test_the_limits_are_arguments() -> None:
    assert complaints(lora_config(BASE, r=300), max_rank=512) == {}
    prompt = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 50}
    assert "50 is above max_virtual_tokens 20" in complaints(prompt, max_virtual_tokens=20)["num_virtual_tokens"]


def test_a_pattern_excludes_layer_options_as_peft_does() -> None:
    found = complaints(lora_config(BASE, target_modules=".*q_proj", layers_to_transform=[1]))
    assert "cannot stand beside" in found["layers_to_transform"]


@pytest.mark.parametrize("peft_type", ["XLORA", "RANDLORA", None, 5, ["LORA"]])
def test_a_kind_that_is_not_served_is_refused_with_those_that_are(peft_type: Any) -> None:
    assert "served are LORA, ADALORA" in str(method_of({"peft_type": peft_type}))


def test_why_a_known_kind_is_not_served_is_told() -> None:
    assert str(method_of({"peft_type": "LILY"})).startswith("LILY is not served (its router averages")


def test_the_order_of_set_like_lists_is_not_part_of_the_canonical_config() -> None:
    one = canonical_config(lora_config(BASE, target_modules=["v_proj", "q_proj", "q_proj"]))
    other = canonical_config(lora_config(BASE, target_modules=["q_proj", "v_proj"]))
    assert one == other


OWN_KEYS = {"runtime_config", "task_id"}  # left out by PEFT of what it saves; a key of our own
OURS = {"BITFIT", "BOTTLENECK", "LOREFT", "SPARSE", "LORA_MOE"}  # PEFT has none of them


def test_the_table_knows_every_key_that_this_peft_writes_and_its_defaults_pass() -> None:
    """The table is written out by hand; PEFT's own dataclasses say when it has become old."""
    peft = pytest.importorskip("peft")
    classes = {
        "LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig, "VERA": peft.VeraConfig, "LOHA": peft.LoHaConfig,
        "HRA": peft.HRAConfig, "MISS": peft.MissConfig, "DELORA": peft.DeloraConfig, "IA3": peft.IA3Config,
        "BEFT": peft.BeftConfig, "OFT": peft.OFTConfig, "BOFT": peft.BOFTConfig, "ROAD": peft.RoadConfig,
        "SHIRA": peft.ShiraConfig, "LOKR": peft.LoKrConfig, "FOURIERFT": peft.FourierFTConfig, "C3A": peft.C3AConfig,
        "HIRA": peft.HiraConfig, "PREFIX_TUNING": peft.PrefixTuningConfig, "PROMPT_TUNING": peft.PromptTuningConfig,
        "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig,
        "P_TUNING": peft.PromptEncoderConfig, "LN_TUNING": peft.LNTuningConfig,
        "TRAINABLE_TOKENS": peft.TrainableTokensConfig,
    }  # fmt: skip
    needed = {"target_modules": ["q_proj"], "feedforward_modules": [], "num_virtual_tokens": 4, "token_dim": 8}
    assert classes.keys() | OURS == METHODS.keys()
    for peft_type, config_class in classes.items():
        demanded = {"total_step": 10} if peft_type == "ADALORA" else {}
        written = config_class(task_type="CAUSAL_LM", **demanded).to_dict()
        config = {**written, **{key: value for key, value in needed.items() if key in written}}
        config = {key: getattr(value, "value", value) for key, value in config.items()}
        assert complaints(config) == {}, peft_type
        assert set(METHODS[peft_type].fields) - OWN_KEYS == set(written), peft_type
