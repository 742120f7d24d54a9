"""What PEFT itself saves is accepted, for every kind on every family of bases; and PEFT loads what was pulled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from hub.errors import Refused
from hub.manifest import Manifest
from hub.ref import parse_reference
from hub.registry import LocalHub
from hub.validate import validate

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT warns of what these adapters are on purpose: biases without a base bias, Conv1D, a head saved whole.
pytestmark = pytest.mark.filterwarnings("ignore")

COMMON: Mapping[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2: Mapping[str, Any] = {
    "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# family: (config class, its arguments, two target modules of which the second is scaled at its input by IA3)
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], tuple[str, str]]] = {
    "llama": ("LlamaConfig", COMMON, ("q_proj", "down_proj")),
    "qwen2": ("Qwen2Config", COMMON, ("v_proj", "down_proj")),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 16}, ("q_proj", "down_proj")),
    "mistral": ("MistralConfig", COMMON, ("k_proj", "down_proj")),
    "gemma2": ("Gemma2Config", {**COMMON, "head_dim": 16}, ("o_proj", "down_proj")),
    "phi": ("PhiConfig", COMMON, ("dense", "fc2")),
    "phi3": ("Phi3Config", COMMON, ("qkv_proj", "down_proj")),
    "gpt2": ("GPT2Config", GPT2, ("c_attn", "mlp.c_proj")),
}


def configs(family: str, targets: tuple[str, str]) -> dict[str, Any]:
    """One PEFT config per row: every option that changes which tensors there are, or their shapes."""
    task, both = {"task_type": "CAUSAL_LM"}, list(targets)
    table, norm = {"gpt2": ("wte", "ln_f"), "phi": ("embed_tokens", "final_layernorm")}.get(
        family, ("embed_tokens", "model.norm")
    )
    rows = {
        "lora": peft.LoraConfig(r=4, target_modules=both, rank_pattern={targets[0]: 2}, lora_bias=True, **task),
        "lora, all linear": peft.LoraConfig(r=3, target_modules="all-linear", use_rslora=True, **task),
        "lora, one layer": peft.LoraConfig(r=4, target_modules=both, layers_to_transform=[1], **task),
        "lora, pattern": peft.LoraConfig(r=4, target_modules=rf".*\.1\..*{targets[1]}", **task),
        "lora, orthogonal": peft.LoraConfig(r=4, target_modules=both, init_lora_weights="orthogonal", **task),
        "lora, no task": peft.LoraConfig(r=4, target_modules=both),
        "lora, dora": peft.LoraConfig(r=4, target_modules=both, use_dora=True, bias="lora_only", **task),
        "lora, biases": peft.LoraConfig(r=4, target_modules=both, lora_bias=True, bias="all", **task),
        "adalora": peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=both, bias="lora_only", **task),
        "vera": peft.VeraConfig(r=4, target_modules=both, bias="all", **task),
        "vera, from its seed": peft.VeraConfig(r=4, target_modules=both, save_projection=False, **task),
        "lora, head and embedding": peft.LoraConfig(r=4, target_modules=[*both, table, "lm_head"], **task),
        "lora, dora of the embedding": peft.LoraConfig(r=4, target_modules=[table], use_dora=True, **task),
        "lora, tokens": peft.LoraConfig(r=4, target_modules=both, trainable_token_indices=[3, 5], **task),
        "lora, whole": peft.LoraConfig(r=4, target_modules=both, modules_to_save=["lm_head", table, norm], **task),
        "trainable-tokens": peft.TrainableTokensConfig(token_indices=[3, 5], **task),
        "ln-tuning": peft.LNTuningConfig(target_modules=[norm], modules_to_save=["lm_head"], **task),
        "ia3": peft.IA3Config(target_modules=both, feedforward_modules=both[1:], **task),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, **task),
        "prefix, projected": peft.PrefixTuningConfig(
            num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, **task
        ),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, **task),
        "multitask-prompt": peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_ranks=2, **task),
        "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **task),
    }
    if family != "gpt2":  # PEFT cannot put these on Conv1D
        rows |= {
            "loha": peft.LoHaConfig(r=4, rank_pattern={targets[0]: 3}, target_modules="all-linear", **task),
            "hra": peft.HRAConfig(r=4, bias="hra_only", target_modules=both, **task),
            "miss": peft.MissConfig(r=5, bias="MiSS_only", target_modules=both, **task),
            "miss, mini": peft.MissConfig(r=4, init_weights="mini", mini_r=8, target_modules=both, **task),
            "delora": peft.DeloraConfig(
                r=4, rank_pattern={targets[0]: 3}, bias="delora_only", target_modules=both, **task
            ),
            "beft": peft.BeftConfig(target_modules=both, **task),
        }
    return rows


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, tuple[str, str]]:
    name, arguments, targets = FAMILIES[request.param]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments))
    folder = tmp_path_factory.mktemp("bases") / request.param
    model.save_pretrained(folder)
    return model, folder, targets


def save(model: Any, config: Any, folder: Path, base: Path) -> Path:
    """A fresh adapter on a copy of the model, as PEFT saves it."""
    model.name_or_path = str(base)
    copy = type(model)(model.config)
    copy.name_or_path = str(base)
    peft.get_peft_model(copy, config).save_pretrained(folder)
    return folder


def test_every_kind_on_this_family_is_accepted_as_peft_saves_it(
    family: tuple[Any, Path, tuple[str, str]], tmp_path: Path
) -> None:
    model, base, targets = family
    for row, config in configs(model.config.model_type, targets).items():
        manifest: Manifest = validate(save(model, config, tmp_path / row, base))
        assert row.startswith(manifest.kind)
        assert manifest.base.model_type == model.config.model_type


def test_peft_loads_what_was_pulled_with_the_same_weights(
    family: tuple[Any, Path, tuple[str, str]], tmp_path: Path
) -> None:
    model, base, targets = family
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM")
    pushed = save(model, config, tmp_path / "made", base)
    hub = LocalHub(tmp_path / "home")
    hub.push(pushed, "legal")
    hub.pull(parse_reference("legal"), tmp_path / "pulled")
    loaded = peft.PeftModel.from_pretrained(type(model)(model.config), tmp_path / "pulled")
    expected = peft.utils.load_peft_weights(str(pushed), device="cpu")
    found = peft.get_peft_model_state_dict(loaded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_peft_saves_of_a_vocabulary_that_was_resized_is_refused(tmp_path: Path) -> None:
    name, arguments, _ = FAMILIES["llama"]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments))
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(Refused, match="a vocabulary of another size is not served"):
        validate(tmp_path / "adapter")
