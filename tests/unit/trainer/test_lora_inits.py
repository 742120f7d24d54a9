"""LoRA from PEFT's initialisations: what is saved is a plain LoRA of the base as it is."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from hub.validate import validate
from trainer.base import open_base
from trainer.data import load_dataset
from trainer.methods import METHODS, LoraOptions
from trainer.modules.attach import attach
from trainer.progress import SILENT
from trainer.recipe import method_of, parse_recipe
from trainer.train import adapted, first_batches, plan_of, prepare

ROUNDING = 1e-5  # fp32, a weight that was split and put together again
IDS = torch.tensor([[5, 9, 77, 3, 101, 42, 64]])
INITS = get_args(LoraOptions.model_fields["init"].annotation)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_what_is_saved_computes_on_the_base_as_it_is_what_was_trained(
    init: str, rslora: bool, tiny_base: Path, chats: Path, tmp_path: Path
) -> None:
    options = {"rank": 4, "alpha": 5, "rslora": rslora, "init": init, "targets": ["q_proj", "down_proj"]}
    fields = {"method": "lora", "base": str(tiny_base), "data": str(chats), "steps": 2, "options": options}
    recipe = parse_recipe({**fields, "batch_size": 8}, "test")
    base, cpu = open_base(str(tiny_base)), torch.device("cpu")
    lesson = prepare(recipe, load_dataset(recipe), base, plan_of(recipe, base), SILENT)
    model = adapted(recipe, base, cpu, lambda: first_batches(recipe, lesson, base, cpu)).eval()
    bare = base.load_weights(cpu)
    assert (logits(model) - logits(bare)).abs().max() < ROUNDING, "an untrained adapter changes nothing"
    torch.manual_seed(3)
    for value in model.parameters():
        if value.requires_grad:
            value.data += torch.randn_like(value) / 5
    out = tmp_path / "out"
    out.mkdir()
    method_of(recipe).tuner().save(model, out, "base")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == (8 if init.startswith(("olora", "pissa", "corda", "lora_ga")) else 4)
    assert validate(out, base=tiny_base).kind == "lora"
    loaded = attach(base.load_weights(cpu), out)
    assert (logits(loaded) - logits(model)).abs().max() < ROUNDING
    assert (logits(loaded) - logits(bare)).abs().max() > 100 * ROUNDING


def test_dora_and_an_init_that_changes_the_weight_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="dora and init: pissa exclude each other"):
        METHODS["lora"].options.model_validate({"dora": True, "init": "pissa"})
