"""Our own modules on stock networks: where they are put, what they compute, how they are saved and loaded."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.base import open_base
from trainer.encode import Encoded
from trainer.errors import BaseUnfit
from trainer.families.edits import STYLES
from trainer.methods import METHODS
from trainer.modules.attach import attach
from trainer.modules.loreft import masks
from trainer.modules.places import find_layers
from trainer.recipe import parse_recipe
from trainer.train import train
from trainer.tuner import no_batches

MakeBase = Callable[..., Path]
ROUNDING = 1e-5  # fp32 sums in another order
IDS = torch.tensor([[5, 9, 77, 3, 101, 42, 64]])
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "phi": {"num_key_value_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "num_key_value_heads": 4},
    "olmo2": {},
    "mixtral": {"num_local_experts": 2},
}
OWN: dict[str, dict[str, Any]] = {
    **{f"bottleneck-{style}": {"style": style, "size": 4} for style in STYLES},
    "bottleneck-scaled": {"size": 3, "scaling": "channel", "norm": True, "layers": [1], "activation": "gelu_new"},
    "loreft": {"rank": 3, "positions": "f1+l2"},
    "loreft-tied": {"rank": 2, "positions": "f2+l1", "tied": True, "activation": "tanh"},
    "lt-sft": {"density": 0.02},
    "diff-pruning": {"density": 0.02},
    "bitfit": {},
    "bitfit-some": {"targets": ["fc1", "final_layernorm", "c_attn", "ln_f"]},
}


def method_named(name: str) -> str:
    return next(method for method in sorted(METHODS, key=len, reverse=True) if name.startswith(method))


def made(name: str, base: Path, options: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """An adapter with visible weights as training holds it, and its tuner."""
    opened, method = open_base(str(base)), METHODS[method_named(name)]
    tuner = method.tuner()
    config = method.config(method.options(**(OWN[name] if options is None else options)), opened.anatomy)
    torch.manual_seed(0)
    model = tuner.attach(opened.load_weights(torch.device("cpu")), config, no_batches)
    for key, value in model.named_parameters():
        if value.requires_grad and "parametrizations" not in key:
            value.data += torch.randn_like(value) / 3
    if config["peft_type"] == "SPARSE":
        model.graft.after_step(torch.optim.AdamW(model.graft.parameters()), config["search_steps"])
        for change in model.graft.changes:
            change.delta.data += torch.randn_like(change.delta) * change.kept
    return model.eval(), tuner


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.clone()
    return found


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", OWN)
def test_what_is_saved_computes_what_was_trained_on_a_stock_network(
    name: str, network: str, make_base: MakeBase, tmp_path: Path
) -> None:
    base = make_base(model_type=network, **NETWORKS[network])
    if name.startswith("bitfit") and not open_base(str(base)).anatomy.biased:
        pytest.skip(f"{network} has no biases")
    model, tuner = made(name, base)
    tuner.save(model, tmp_path, "base")
    stock = open_base(str(base)).load_weights(torch.device("cpu"))
    bare = logits(stock)
    loaded = attach(stock, tmp_path)
    assert (logits(loaded) - logits(model)).abs().max() < ROUNDING
    assert (logits(loaded) - bare).abs().max() > 100 * ROUNDING
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), bare)


@pytest.mark.parametrize("name", [name for name in OWN if name != "loreft-tied" and "bitfit" not in name])
def test_an_untrained_module_changes_nothing(name: str, tiny_base: Path) -> None:
    """But for LoReFT under an activation, whose W starts at R."""
    opened, method = open_base(str(tiny_base)), METHODS[method_named(name)]
    model = opened.load_weights(torch.device("cpu"))
    bare = logits(model)
    method.tuner().attach(model, method.config(method.options(**OWN[name]), opened.anatomy), no_batches)
    assert (logits(model.eval()) - bare).abs().max() < ROUNDING


@pytest.mark.parametrize("reads", ["output", "stream", "residual", "input"])
@pytest.mark.parametrize("place", ["attention", "mlp"])
def test_an_edit_reads_what_its_name_says(place: Any, reads: Any, tiny_base: Path) -> None:
    """Oracle: a llama layer written out."""
    from trainer.modules.places import hook

    model = open_base(str(tiny_base)).load_weights(torch.device("cpu"))
    block = model.model.layers[0]
    r_BTH = torch.randn(1, 4, 32)
    places = {"position_embeddings": model.model.rotary_emb(r_BTH, torch.arange(4)[None]), "attention_mask": None}

    def edited(at: str, x: Tensor, r: Tensor, n: Tensor) -> Tensor:
        v = {"output": x, "stream": r + x, "residual": r, "input": n}[reads]
        return x + torch.tanh(v) if at == place else x

    with torch.inference_mode():
        n = block.input_layernorm(r_BTH)
        after = r_BTH + edited("attention", block.self_attn(hidden_states=n, **places)[0], r_BTH, n)
        n = block.post_attention_layernorm(after)
        expected = after + edited("mlp", block.mlp(n), after, n)
        hook(find_layers(model)[0], place, reads, torch.tanh)
        assert (block(r_BTH, **places) - expected).abs().max() < ROUNDING


def test_a_network_that_scales_what_it_adds_has_no_place_for_an_edit(make_base: MakeBase) -> None:
    base = make_base(model_type="granite", residual_multiplier=0.5)
    with pytest.raises(BaseUnfit, match="does not simply add its attention to the residual stream"):
        made("bottleneck-pfeiffer", base)


def test_positions_are_the_ends_of_the_prompt_and_never_overlap() -> None:
    """Rows of 6 tokens: a prompt of 5, one of 2 padded on the left, one of 1, one of 3 with an answer behind."""
    attention = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    found = masks(attention, torch.tensor([5, 2, 1, 3]), (3, 1))
    rows = {end: mask[..., 0].int().tolist() for end, mask in found.items()}
    assert rows["first"] == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0], [0] * 6, [1, 0, 0, 0, 0, 0]]
    assert rows["last"] == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1], [0] * 6, [0, 0, 1, 0, 0, 0]]
    assert rows["ends"] == [[1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1], [0] * 6, [1, 0, 1, 0, 0, 0]]


def test_loreft_in_training_edits_what_generation_edits(tiny_base: Path) -> None:
    """A prompt and its answer in one padded batch, against the prompt alone and then the answer on its cache."""
    model, tuner = made("loreft", tiny_base)
    rows = [Encoded((5, 9, 77, 3, 101), (-100, -100, -100, 3, 101)), Encoded((8,) * 7, (*[-100] * 6, 8))]
    batch = {name: value for name, value in tuner.collate(rows, 0).items() if name != "labels"}
    with torch.inference_mode():
        together = model(**batch).logits[0, :5]
        prompt = model(input_ids=torch.tensor([[5, 9, 77]]), use_cache=True)
        answer = model(input_ids=torch.tensor([[3, 101]]), past_key_values=prompt.past_key_values).logits[0]
    assert (together - torch.cat([prompt.logits[0], answer])).abs().max() < ROUNDING


def test_lorefts_rotation_stays_orthonormal_through_training(tiny_base: Path, chats: Path, tmp_path: Path) -> None:
    """Under weight decay, too, which torch's parametrization does not bear."""
    fields = {"method": "loreft", "base": str(tiny_base), "data": str(chats), "steps": 5, "options": {"rank": 3}}
    recipe = parse_recipe({**fields, "learning_rate": 0.1, "weight_decay": 0.5}, "test")
    train(recipe, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    rotations = [value for name, value in tensors.items() if name.endswith("rotate_layer.weight")]
    assert len(rotations) == 4
    for value in rotations:
        assert torch.allclose(value @ value.T, torch.eye(3), atol=ROUNDING)


@pytest.mark.parametrize("name", ["lt-sft", "diff-pruning"])
def test_a_sparse_change_is_the_largest_entries_in_the_format_of_decision_18(
    name: str, tiny_base: Path, tmp_path: Path
) -> None:
    model, tuner = made(name, tiny_base)
    tuner.save(model, tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    weights = dict(open_base(str(tiny_base)).load_weights(torch.device("cpu")).named_modules())
    total = sum(weights[target].weight.numel() for target in open_base(str(tiny_base)).anatomy.linears)
    assert sum(config["entries"].values()) == round(0.02 * total)
    assert set(tensors) == {
        f"base_model.model.{module}.sparse_{part}" for module in config["entries"] for part in ("indices", "values")
    }
    assert set(config) == {
        "peft_type", "task_type", "revision", "density", "algorithm", "entries", "base_model_name_or_path",
        "inference_mode",
    }  # fmt: skip
    for module, count in config["entries"].items():
        indices = tensors[f"base_model.model.{module}.sparse_indices"]
        assert (indices.dtype, len(indices)) == (torch.int32, count)
        assert bool((indices.diff() > 0).all())
        weights[module].weight.data.view(-1)[indices.long()] += tensors[f"base_model.model.{module}.sparse_values"]
    stock = weights[""]
    assert (logits(stock) - logits(model)).abs().max() < ROUNDING


def test_a_lottery_ticket_is_rewound_and_only_its_entries_are_trained_on(tiny_base: Path) -> None:
    method, opened = METHODS["lt-sft"], open_base(str(tiny_base))
    options = method.options.model_validate({"density": 0.01, "search_steps": 2, "targets": ("q_proj",)})
    config = method.config(options, opened.anatomy)
    model = method.tuner().attach(opened.load_weights(torch.device("cpu")), config, no_batches).train()
    optimizer = torch.optim.AdamW(model.graft.parameters(), lr=0.01)
    moved = []
    for step in range(1, 5):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        method.tuner().after_step(model, optimizer, step)
        moved.append(sum(int((change.delta != 0).sum()) for change in model.graft.changes))
    assert moved == [2 * 32 * 32, 0, round(0.01 * 2 * 32 * 32), round(0.01 * 2 * 32 * 32)]


def test_the_price_of_gates_is_the_gradient_of_their_expected_share(tiny_base: Path) -> None:
    """Oracle: autograd through the probability that a hard-concrete gate is open."""
    model, tuner = made("diff-pruning", tiny_base)
    graft = model.graft
    graft.chosen.fill_(False)
    gates = [change.gates for change in graft.changes]
    for gate in gates:
        gate.grad = torch.zeros_like(gate)
    tuner.before_step(model)
    total = sum(gate.numel() for gate in gates)
    shift = 2 / 3 * torch.log(torch.tensor(0.1 / 1.1))
    expected = torch.autograd.grad(sum(torch.sigmoid(gate - shift).sum() for gate in gates) / total, gates)
    for gate, gradient in zip(gates, expected, strict=True):
        assert torch.allclose(gate.grad, gradient, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("bottleneck", {"terms": 2}, "terms: only with style: compacter"),
        ("bottleneck", {"style": "compacter", "size": 6}, "terms 4 does not divide the size 6"),
        ("loreft", {"positions": "4"}, "f4, l4 or f4"),
        ("loreft", {"positions": "f0+l1"}, "f4, l4 or f4"),
        ("loreft", {"positions": "f1", "tied": True}, "tied needs positions at both ends"),
        ("lt-sft", {"density": 0}, "greater than 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(method: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        METHODS[method].options(**options)
