"""Training over a base in few bits: what is learnt and saved, taken up again and served, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hub.methods import METHODS as KINDS
from hub.validate import validate
from server.adapters.golden import distance
from server.config import ModelConfig
from server.model.load import load_network
from tests.oracle.conftest import Bench
from tests.unit.trainer.test_train import StopAt, contents
from trainer.base import open_base
from trainer.errors import Interrupted, MethodUnfit, RecipeInvalid
from trainer.quantize import METHODS
from trainer.recipe import Recipe, parse_recipe
from trainer.train import Workshop, check_method, plan_of, train

# Of the logits' spread, between two ways to compute with the same bits: bitsandbytes' fused products of NF4 round their
# scales and sums to bf16, and int8 rounds every input, of a packed batch as of a single row, to 8 bits.
SAME_BITS = {"nf4": 0.02, "int8": 0.04}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "dropout": 0.3},
    "adalora": {"rank": 3, "target_rank": 2, "hold_steps": 1, "final_steps": 1},
    "ia3": {},
    "prefix": {"virtual_tokens": 3, "init": "zero"},
    "prompt": {"virtual_tokens": 3},
    "p-tuning": {"virtual_tokens": 3},
}


@pytest.fixture(scope="module")
def base(make_base: Any) -> Path:
    """Widths that bitsandbytes can pack: outputs by 32, inputs by 64."""
    folder: Path = make_base(hidden_size=64, intermediate_size=128)
    return folder


def recipe(method: str, base: Path | str, data: Path | str, quantize: str, **fields: Any) -> Recipe:
    least = {"method": method, "base": str(base), "data": str(data), "options": OPTIONS.get(method, {}), "steps": 4}
    return parse_recipe({**least, "batch_size": 8, "quantize": quantize, **fields}, "test")


@pytest.mark.parametrize(
    ("method", "quantize"), [*((method, "nf4") for method in METHODS), ("lora", "int8"), ("ia3", "int8")]
)
def test_what_is_trained_over_few_bits_is_served_over_the_same(
    method: str, quantize: Any, base: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    metrics = train(recipe(method, base, chats, quantize), out).metrics
    assert metrics["eval_loss"] < metrics["base_eval_loss"]
    assert json.loads((out / "recipe.json").read_text())["quantize"] == quantize
    assert json.loads((out / "golden.json").read_text())["quantize"] == quantize
    assert f"over the base in {quantize}" in (out / "README.md").read_text()
    assert all(value.dtype == torch.float32 for value in load_file(out / "adapter_model.safetensors").values())
    kind = validate(out, base=base).kind
    network = load_network(ModelConfig(base=str(base), dtype="float32", quantize=quantize), base, name="base")
    golden = load_file(out / "golden.safetensors")
    rig = Bench(network)
    graft = rig.graft(out, kind)
    got = rig.run([(golden[f"{row}.input_ids"].tolist(), [(graft, 1.0)]) for row in range(4)])
    for row in range(4):
        assert distance(golden[f"{row}.logits"], got[row][-1]) < SAME_BITS[quantize]
    assert kind in {one.kind for one in KINDS.values()}


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_run_over_few_bits_is_taken_up_where_it_was(quantize: str, base: Path, chats: Path, tmp_path: Path) -> None:
    wanted = recipe("lora", base, chats, quantize, steps=3)
    train(wanted, tmp_path / "whole")
    stopped = StopAt(1)
    with pytest.raises(Interrupted):
        train(wanted, tmp_path / "resumed", report=stopped, stop=stopped.event)
    train(wanted, tmp_path / "resumed", workshop=Workshop(existing="resume"))
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_what_is_trained_over_few_bits_is_not_rounded_to_bfloat16(base: Path, chats: Path, tmp_path: Path) -> None:
    """TRL would; at a rate that moves nothing, the first values are those of a run over the whole base."""
    for name, quantize in (("whole", None), ("bits", "nf4")):
        train(recipe("lora", base, chats, quantize, learning_rate=1e-30, steps=1), tmp_path / name)  # type: ignore[arg-type]
    whole, bits = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "bits"))
    first = next(name for name in whole if "lora_A" in name)
    assert torch.equal(whole[first], bits[first])
    assert not torch.equal(bits[first], bits[first].bfloat16().float())


def test_gradient_checkpointing_over_few_bits_changes_nothing(base: Path, chats: Path, tmp_path: Path) -> None:
    for name in ("with", "without"):
        train(recipe("lora", base, chats, "nf4", gradient_checkpointing=name == "with", steps=2), tmp_path / name)
    one, other = (contents(tmp_path / name)["adapter_model.safetensors"] for name in ("with", "without"))
    assert one == other


@pytest.mark.parametrize(
    ("method", "quantize", "options", "says"),
    [
        ("hra", "nf4", {}, "quantize nf4 is for lora, adalora, vera, oft, road, ia3"),
        ("bottleneck", "int8", {}, "bottleneck needs the base's own weights, or is no method of"),
        ("lora", "int8", {"dora": True}, "quantize int8 and dora exclude each other"),
        ("lora", "nf4", {"init": "pissa"}, "quantize nf4 and init pissa exclude each other"),
        ("lora", "nf4", {"init": "lora_ga"}, "quantize nf4 and init lora_ga exclude each other"),
        ("lora", "nf4", {"init": "eva"}, "quantize nf4 and init eva exclude each other"),
        ("lora", "nf4", {"modules_to_save": ["o_proj"]}, "o_proj is held in few bits, so it cannot be trained whole"),
    ],
)
def test_what_needs_the_bases_own_weights_is_refused_by_name(
    method: str, quantize: str, options: dict[str, Any], says: str, base: Path
) -> None:
    assert says in refusal(recipe(method, base, "rows.jsonl", quantize, options=options))


def test_a_recipe_knows_the_words_of_hub_serve() -> None:
    assert recipe("lora", "seedling", "rows.jsonl", "none").quantize is None
    with pytest.raises(RecipeInvalid, match="quantize is 'fp4': input should be 'nf4' or 'int8'"):
        recipe("lora", "seedling", "rows.jsonl", "fp4")


def test_widths_that_cannot_be_packed_are_named(tiny_base: Path) -> None:
    says = refusal(recipe("lora", tiny_base, "rows.jsonl", "nf4"))
    assert "needs inputs in multiples of 64 and outputs in multiples of 32, and model.layers.0" in says


def refusal(wanted: Recipe) -> str:
    opened = open_base(wanted.base)
    with pytest.raises(MethodUnfit) as caught:
        check_method(wanted, opened, plan_of(wanted, opened))
    return str(caught.value)
