"""What each method can be trained on, and what it says where it cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.base import choose_device, open_base
from trainer.errors import BaseUnfit, DeviceMissing, MethodUnfit
from trainer.method import Plan
from trainer.methods import METHODS, Ia3Options, LoraOptions, PromptOptions
from trainer.recipe import Recipe, parse_recipe
from trainer.train import check_method, check_servable, plan_of

MakeBase = Callable[..., Path]


def recipe(method: str, base: Path | str, **fields: Any) -> Recipe:
    return parse_recipe({"method": method, "base": str(base), "data": "rows.jsonl", "steps": 1, **fields}, "test")


def refusal(wanted: Recipe) -> str:
    base = open_base(wanted.base)
    with pytest.raises(MethodUnfit) as caught:
        check_method(wanted, base, plan_of(wanted, base))
    return str(caught.value)


NEEDED: dict[str, dict[str, Any]] = {
    "lora-moe": {"experts": ["a@1", "b@2"]},
    "trainable-tokens": {"tokens": ["<|assistant|>"]},
}


@pytest.mark.parametrize("method", [method for method in METHODS if method != "bitfit"])
def test_every_method_fits_the_shipped_base(method: str) -> None:
    """But for the one that trains biases, which it has not."""
    base = open_base("seedling")
    needed = NEEDED.get(method, {})
    plan = plan_of(recipe(method, "seedling", options=needed), base)
    options = METHODS[method].options.model_validate(needed)
    assert METHODS[method].problems(options, base.anatomy, plan) == []
    assert METHODS[method].config(options, base.anatomy) is not None


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_target_that_the_base_lacks_is_named_with_the_nearest(method: str, tiny_base: Path) -> None:
    says = refusal(recipe(method, tiny_base, options={"targets": ["q_prj", "v_proj"]}))
    assert f"{method} cannot be trained on {tiny_base} in this way: target q_prj is not in the base" in says
    assert "(nearest: q_proj); its linear modules: down_proj, gate_proj" in says


def test_the_output_head_is_no_target_of_methods_that_never_look_there(tiny_base: Path) -> None:
    says = refusal(recipe("lt-sft", tiny_base, options={"targets": ["lm_head"]}))
    assert "target lm_head is the output head, of which these methods change nothing" in says


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("bitfit", {}, "LlamaForCausalLM has no biases here: try beft"),
        ("ln-tuning", {"targets": ["input_layrnorm"]}, "has no norm in the base (nearest: input_layernorm)"),
        ("trainable-tokens", {"tokens": [261]}, "token 261 is not in the base's vocabulary, which has 261, from 0 on"),
        ("trainable-tokens", {"tokens": ["a", ""]}, "the text '' has no tokens"),
        ("oft", {"targets": ["q_prj"]}, "target q_prj is not in the base (nearest: q_proj)"),
    ],
)
def test_what_a_method_cannot_train_on_this_base_is_named(
    method: str, options: dict[str, Any], says: str, tiny_base: Path
) -> None:
    assert says in refusal(recipe(method, tiny_base, options=options))


def test_biases_that_are_not_there_are_named(make_base: MakeBase) -> None:
    base = make_base(model_type="phi", num_key_value_heads=4)
    says = refusal(recipe("bitfit", base, options={"targets": ["lm_head", "embed_tokens"]}))
    assert "target embed_tokens has no bias in the base; these have: dense, fc1, fc2" in says
    assert "target lm_head" not in says


@pytest.mark.parametrize("method", ["oft", "boft", "road", "shira", "lokr", "c3a"])
def test_what_peft_cannot_put_on_conv1d_is_refused(method: str, make_base: MakeBase) -> None:
    base = make_base(model_type="gpt2", n_embd=32, n_layer=1, n_head=4, num_key_value_heads=4)
    assert "has Conv1D modules, on which PEFT has no such adapter" in refusal(recipe(method, base))


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("boft", {"block_size": 5}, "boft_block_size 5 does not divide the"),
        ("road", {"group_size": 12}, "group_size 12 does not divide the"),
        ("shira", {"rank": 12}, "r 12 makes 576 entries, above the 512 weights of"),
        ("fourierft", {"frequencies": 513}, "n_frequency 513 is above the 512 weights of"),
        ("c3a", {"block_size": 12}, "block_size 12 does not divide the 48 inputs and 32 outputs"),
    ],
)
def test_what_the_hub_would_not_take_is_refused_before_it_is_trained(
    method: str, options: dict[str, Any], says: str, tiny_base: Path
) -> None:
    base = open_base(str(tiny_base))
    with pytest.raises(MethodUnfit) as caught:
        check_servable(recipe(method, tiny_base, options=options), base)
    assert says in str(caught.value)


def test_a_target_may_be_the_last_parts_of_a_name(tiny_base: Path) -> None:
    base = open_base(str(tiny_base))
    plan = Plan(max_length=16, gradient_checkpointing=False)
    for target in ("mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        assert METHODS["lora"].problems(LoraOptions(targets=(target,)), base.anatomy, plan) == []


def test_lora_on_a_mixture_of_experts_adapts_what_it_says(make_base: MakeBase) -> None:
    """PEFT would take the Linears of a dense layer for the fused weights of the experts in the others."""
    sizes = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    folder = make_base(**sizes, mlp_only_layers=[0])
    base = open_base(str(folder))
    assert "down_proj" in base.anatomy.linear_names
    config = METHODS["lora"].config(LoraOptions(), base.anatomy)
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    says = refusal(recipe("lora", folder, options={"targets": ["q_proj", "mlp.down_proj"]}))
    assert "target mlp.down_proj: on qwen3_moe, PEFT takes it for experts or a router" in says


@pytest.mark.parametrize("dora", [True, False])
def test_dora_is_an_option_of_lora(dora: bool, tiny_base: Path) -> None:
    from peft import get_peft_model

    base = open_base(str(tiny_base))
    config = METHODS["lora"].config(LoraOptions(rank=2, dora=dora, targets=("q_proj",)), base.anatomy)
    model = get_peft_model(base.load_weights(torch.device("cpu")), config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_magnitude_vector" in name for name in trained) == dora
    assert config.to_dict()["use_dora"] is dora


def test_ia3_needs_targets_where_peft_knows_none(make_base: MakeBase) -> None:
    folder = make_base(model_type="olmo2")
    assert "no default targets are known for model type olmo2" in refusal(recipe("ia3", folder))
    base = open_base(str(folder))
    options = Ia3Options(targets=("k_proj", "v_proj", "down_proj"), feedforward=("down_proj",))
    assert METHODS["ia3"].problems(options, base.anatomy, Plan(16, False)) == []


def test_prefix_and_gradient_checkpointing_exclude_each_other(tiny_base: Path) -> None:
    assert "gradient_checkpointing and a prefix" in refusal(recipe("prefix", tiny_base, gradient_checkpointing=True))


def test_prefix_needs_the_attention_interface(make_base: MakeBase) -> None:
    folder = make_base(model_type="bloom", n_head=4, n_layer=2)
    assert "BloomForCausalLM does not attend through transformers' attention interface" in refusal(
        recipe("prefix", folder)
    )


def test_prefix_needs_heads_that_share_evenly(make_base: MakeBase) -> None:
    folder = make_base()
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_key_value_heads": 2', '"num_key_value_heads": 3'))
    assert "4 attention heads do not share 3 key/value heads evenly" in refusal(recipe("prefix", folder))


def test_prefix_needs_heads_of_one_shape(make_base: MakeBase) -> None:
    folder = make_base(
        model_type="deepseek_v3", kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=16, first_k_dense_replace=1,
    )  # fmt: skip
    assert "not alike in shape" in refusal(recipe("prefix", folder))


def test_a_prefix_must_fit_the_sliding_window(make_base: MakeBase) -> None:
    folder = make_base(model_type="mistral", sliding_window=8)
    says = refusal(recipe("prefix", folder, options={"virtual_tokens": 8}))
    assert "virtual_tokens 8 fills the base's sliding window of 8" in says


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
def test_virtual_tokens_and_the_longest_row_share_the_context(method: str, tiny_base: Path) -> None:
    says = refusal(recipe(method, tiny_base, options={"virtual_tokens": 16}, max_length=120))
    assert "virtual_tokens 16 and max_length 120 together are above the base's context of 128 tokens" in says
    says = refusal(recipe(method, tiny_base, options={"virtual_tokens": 128}))
    assert "virtual_tokens 128 leaves nothing of the base's context of 128 tokens" in says


def test_rows_longer_than_the_context_are_refused(tiny_base: Path) -> None:
    says = refusal(recipe("lora", tiny_base, max_length=129))
    assert "max_length 129 is above the base's context of 128 tokens" in says


def test_the_longest_row_takes_what_the_virtual_tokens_leave(tiny_base: Path) -> None:
    base = open_base(str(tiny_base))
    assert plan_of(recipe("lora", tiny_base), base).max_length == 128
    assert plan_of(recipe("prompt", tiny_base, options={"virtual_tokens": 28}), base).max_length == 100


def test_an_init_text_longer_than_the_prompt_is_refused(tiny_base: Path) -> None:
    says = refusal(recipe("prompt", tiny_base, options={"virtual_tokens": 4, "init": "text", "init_text": "seven c"}))
    assert "init_text has 7 tokens, more than virtual_tokens 4" in says


def test_the_prompt_starts_from_the_embeddings_of_its_text(tiny_base: Path) -> None:
    from peft import get_peft_model

    base = open_base(str(tiny_base))
    options = PromptOptions(virtual_tokens=5, init="text", init_text="ab")
    model = get_peft_model(base.load_weights(torch.device("cpu")), METHODS["prompt"].config(options, base.anatomy))
    a, b = base.tokenizer.encode("ab")
    assert torch.equal(
        model.prompt_encoder["default"].embedding.weight.data,
        model.get_base_model().get_input_embeddings().weight[[a, b, a, b, a]],
    )


def test_weights_that_are_missing_or_broken_are_refused(make_base: MakeBase) -> None:
    weights = make_base() / "model.safetensors"
    base = open_base(str(weights.parent))
    whole = load_file(weights)
    save_file({name: value for name, value in whole.items() if "1.mlp.up_proj" not in name}, weights, {"format": "pt"})
    with pytest.raises(BaseUnfit, match=r"lacks 1 of its tensors, model.layers.1.mlp.up_proj.weight among them"):
        base.load_weights(torch.device("cpu"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BaseUnfit, match="cannot be loaded"):
        base.load_weights(torch.device("cpu"))


def test_weights_that_are_only_there_as_a_pickle_are_never_read(make_base: MakeBase) -> None:
    weights = make_base() / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(BaseUnfit, match="cannot be loaded"):
        open_base(str(weights.parent)).load_weights(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("auto").type == "cpu"
    with pytest.raises(DeviceMissing, match="device cuda was asked for"):
        choose_device("cuda")


def test_a_folder_that_holds_no_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(BaseUnfit, match="no causal language model"):
        open_base(str(tmp_path))
