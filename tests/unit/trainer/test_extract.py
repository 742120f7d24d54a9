"""A whole fine-tune as an adapter: exact where the change is of low rank, measured where it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hub.registry import LocalHub
from tests.unit.trainer.conftest import MakeBase
from trainer.base import open_base
from trainer.errors import ExtractionRefused
from trainer.export import load_adapter
from trainer.extract import Extracted, Plan, extract

LOGIT_TOLERANCE = 1e-4  # fp32; the sum of a weight and its change is rounded in another order
ROUNDING = 1e-6  # of a change that fp32 weights of its size hold
RANK = 3
IDS = torch.tensor([[5, 9, 77, 3, 101, 42, 64, 8]])

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of Conv1D


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tune(base: Path, folder: Path, change: Callable[[str, nn.Parameter], None], **saving: Any) -> Path:
    """A copy of the base with every parameter given to `change`."""
    torch.manual_seed(1)
    model = load(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    model.save_pretrained(folder, **saving)
    shutil.copy(base / "tokenizer.json", folder)
    return folder


def low_rank(*leaves: str) -> Callable[[str, nn.Parameter], None]:
    def change(name: str, parameter: nn.Parameter) -> None:
        if name.endswith(tuple(f"{leaf}.weight" for leaf in leaves)):
            rows, columns = parameter.shape
            parameter.data += 0.1 * torch.randn(rows, RANK) @ torch.randn(RANK, columns)

    return change


def everywhere(name: str, parameter: nn.Parameter) -> None:
    parameter.data += 0.02 * torch.randn_like(parameter)


def run(base: Path, tuned: Path, out: Path, plan: Plan, *, strict: bool = False) -> Extracted:
    out.mkdir()
    return extract(str(base), str(tuned), out, plan=plan, strict=strict)


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("model_type", "leaves"),
    [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_attn", "c_fc")), ("gemma2", ("k_proj",))],
)
def test_a_change_of_low_rank_is_found_exactly(
    model_type: str, leaves: tuple[str, ...], make_base: MakeBase, tmp_path: Path
) -> None:
    base = make_base(model_type=model_type, **({"n_positions": 64} if model_type == "gpt2" else {}))
    tuned = tune(base, tmp_path / "tuned", low_rank(*leaves), max_shard_size="20KB")
    made = run(base, tuned, tmp_path / "out", Plan(rank=RANK, energy=None, max_rank=256), strict=True)
    assert made.metrics["relative_error"] < ROUNDING and made.metrics["left_out"] == {}
    assert {name.rpartition(".")[2] for name in made.metrics["linears"]} == set(leaves)
    adapter = load_adapter(tmp_path / "out", open_base(str(base)), torch.device("cpu"))
    torch.testing.assert_close(logits(adapter), logits(load(tuned)), atol=LOGIT_TOLERANCE, rtol=0)
    assert not torch.allclose(logits(adapter), logits(load(base)), atol=100 * LOGIT_TOLERANCE)
    hub = LocalHub(tmp_path / "home")
    manifest = hub.manifest(hub.push(tmp_path / "out", "tuned").digest)
    assert manifest.kind == "lora" and manifest.rank == RANK
    assert manifest.recipe is not None and manifest.recipe["tuned"]["name"] == "tuned"


def test_a_share_of_the_energy_is_kept_at_every_linear(tiny_base: Path, tmp_path: Path) -> None:
    tuned = tune(tiny_base, tmp_path / "tuned", everywhere)
    made = run(tiny_base, tuned, tmp_path / "out", Plan(rank=None, energy=0.6, max_rank=256))
    before, after = load(tiny_base).state_dict(), load(tuned).state_dict()
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = set()
    for name, one in made.metrics["linears"].items():
        change = (after[f"{name}.weight"] - before[f"{name}.weight"]).double()
        A, B = (tensors[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB")
        squares = torch.linalg.svdvals(change).square()
        assert one["rank"] == int((squares.cumsum(0) < 0.6 * squares.sum()).sum()) + 1 == A.shape[0]
        lost = float((change - B @ A).norm() / change.norm())
        assert lost == pytest.approx(one["relative_error"], rel=1e-4)
        assert lost**2 <= 0.4 + ROUNDING
        ranks.add(one["rank"])
    assert len(ranks) > 1 and made.metrics["linears_below_energy"] == 0
    assert LocalHub(tmp_path / "home").push(tmp_path / "out", "tuned").version == 1
    capped = run(tiny_base, tuned, tmp_path / "capped", Plan(rank=None, energy=0.6, max_rank=2))
    assert capped.metrics["largest_rank"] == 2
    assert capped.metrics["linears_below_energy"] == len(capped.metrics["linears"])


def test_what_differs_outside_the_linears_is_named_and_measured(tiny_base: Path, tmp_path: Path) -> None:
    def change(name: str, parameter: nn.Parameter) -> None:
        low_rank("q_proj")(name, parameter)
        if "norm" in name or "embed" in name:
            parameter.data *= 1.25

    tuned = tune(tiny_base, tmp_path / "tuned", change)
    made = run(tiny_base, tuned, tmp_path / "out", Plan(rank=RANK, energy=None, max_rank=256))
    left_out = made.metrics["left_out"]
    norms = {name for name in load(tiny_base).state_dict() if "norm" in name}
    assert norms | {"model.embed_tokens.weight"} == set(left_out)
    assert all(one["relative_change"] == pytest.approx(0.25, rel=1e-5) for one in left_out.values())
    assert made.metrics["relative_error"] < ROUNDING < 0.1 < made.metrics["whole_relative_error"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["left_out"] == left_out
    with pytest.raises(ExtractionRefused, match=r"differs in 6 tensors: .*norm.weight .by 0.25 of its norm"):
        run(tiny_base, tuned, tmp_path / "strict", Plan(rank=RANK, energy=None, max_rank=256), strict=True)


def test_a_head_of_its_own_is_compared_with_the_tied_one(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base(tie_word_embeddings=True)
    tuned = tune(base, tmp_path / "tuned", low_rank("q_proj"))
    tensors = load_file(tuned / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    made = run(base, tuned, tmp_path / "out", Plan(rank=RANK, energy=None, max_rank=256))
    assert {name: one["relative_change"] for name, one in made.metrics["left_out"].items()} == {
        "lm_head.weight": pytest.approx(1.0)
    }


def test_another_dtype_is_compared_by_its_values(tiny_base: Path, tmp_path: Path) -> None:
    tuned = tune(tiny_base, tmp_path / "tuned", low_rank("q_proj"))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tuned / "model.safetensors").items()}
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    made = run(tiny_base, tuned, tmp_path / "out", Plan(rank=RANK, energy=None, max_rank=256))
    changed = made.metrics["linears"]["model.layers.0.self_attn.q_proj"]["relative_error"]
    only_rounded = made.metrics["linears"]["model.layers.0.self_attn.k_proj"]["relative_error"]
    assert changed < 0.01 < 0.5 < only_rounded


def test_what_is_no_fine_tune_of_the_base_is_refused_with_both_values(
    tiny_base: Path, make_base: MakeBase, tmp_path: Path
) -> None:
    plan = Plan(rank=RANK, energy=None, max_rank=256)
    with pytest.raises(ExtractionRefused, match="intermediate_size 48 against 64"):
        run(tiny_base, make_base(intermediate_size=64), tmp_path / "shape", plan)
    tuned = tune(tiny_base, tmp_path / "tuned", low_rank("q_proj"))
    (tuned / "tokenizer.json").write_text("{}")
    with pytest.raises(ExtractionRefused, match=r"tokenizer [0-9a-f]{64} against [0-9a-f]{64}"):
        run(tiny_base, tuned, tmp_path / "tokenizer", plan)
    (tuned / "tokenizer.json").unlink()
    with pytest.raises(ExtractionRefused, match=r"tokenizer [0-9a-f]{64} against None .*put that tokenizer.json"):
        run(tiny_base, tuned, tmp_path / "none", plan)
    with pytest.raises(ExtractionRefused, match=r"no Linear of .* differs"):
        run(tiny_base, tiny_base, tmp_path / "same", plan)


def test_a_value_that_is_no_number_is_refused_by_name(tiny_base: Path, tmp_path: Path) -> None:
    def change(name: str, parameter: nn.Parameter) -> None:
        if name == "model.layers.1.mlp.up_proj.weight":
            parameter[0, 0] = float("nan")

    with pytest.raises(ExtractionRefused, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinite values"):
        run(tiny_base, tune(tiny_base, tmp_path / "t", change), tmp_path / "out", Plan(RANK, None, 256))
