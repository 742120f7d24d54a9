"""DoRA on a base in half precision or quantised: its norms are those of the weights that the base really has.

The reference is an fp32 network that was given those weights before anything ran, and PEFT's DoRA on it. PEFT itself
cannot be asked on the quantised base: its norms are garbage once a CPU has packed the weights, and int8 has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from server.config import ModelConfig
from server.kernels.quantized import largest_code, round_rows
from server.model.load import load_network
from tests.oracle.conftest import SMALL, Bench, TinyBase
from tests.oracle.kinds import COMMON, Row, make_adapter

# Of the logits' spread. bf16: 8 bits in every product and activation; nf4: a fused product may round scales and sums to
# bf16; int8: activations are quantised, too, at 0.6 % an input.
LIMITS = {"bfloat16": 0.03, "nf4": 0.02, "int8": 0.04}
# Of the factor m / ||W + s B A||: bf16 stores what is beyond one in 8 bits; a packed scale of nf4 has 8 bits.
FACTOR_LIMITS = {"bfloat16": 2**-8, "nf4": 2**-8, "int8": 1e-5}
CONFIGS = {
    "bfloat16": ModelConfig(base="tiny", dtype="bfloat16"),
    "nf4": ModelConfig(base="tiny", dtype="float32", quantize="nf4"),
    "int8": ModelConfig(base="tiny", dtype="float32", quantize="int8"),
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
PROMPT = [5, 9, 77, 3, 101, 42, 64, 8, 12, 90]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    """Widths that bitsandbytes can pack: outputs by 32, inputs by 64."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**{**SMALL, "hidden_size": 64, "intermediate_size": 128})).save_pretrained(folder)
    return TinyBase("llama", folder)


def loaded(base: TinyBase, stored: str) -> Any:
    """The base as it is stored, before any product."""
    if stored == "int8":
        network: Any = base.fresh()
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = round_rows(module.weight.detach(), largest_code()).weight()
        return network
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if stored == "nf4":
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantization = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.float32)
        options = {"dtype": torch.float32, "quantization_config": quantization, "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(base.folder, **options)


@pytest.mark.parametrize("stored", CONFIGS)
def test_dora_has_the_norms_of_the_weights_as_they_are_stored(stored: str, base: TinyBase, tmp_path: Path) -> None:
    if stored == "nf4":
        pytest.importorskip("bitsandbytes")
    row = Row("lora", LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=TARGETS, **COMMON))
    on_full_weights = make_adapter(base, row, tmp_path, seed=1)
    reference = base.fresh()
    for name, module in loaded(base, stored).named_modules():
        if isinstance(module, nn.Linear):
            reference.get_submodule(name).weight.data = dequantize_module_weight(module).detach().float()
        elif hasattr(module, "weight"):
            reference.get_submodule(name).weight.data = module.weight.detach().float()
    expected = PeftModel.from_pretrained(reference, tmp_path).eval()

    rig = Bench(load_network(CONFIGS[stored], base.folder, name="tiny"))  # it runs its probes: anything is packed now
    graft = rig.graft(tmp_path, "lora")
    for module, site in graft.sites.items():
        assert site.scale_out is not None
        wanted, unquantised = _factor(expected, module), _factor(on_full_weights, module)
        off = (1 + site.scale_out.excess_F.float() - wanted).abs().max() / wanted.abs().max()
        assert off < FACTOR_LIMITS[stored], f"{module}: {off:.1e}"
        if stored != "bfloat16":
            apart = (unquantised - wanted).abs().max() / wanted.abs().max()
            assert apart > FACTOR_LIMITS[stored], "the limit does not tell these norms from those of the full weights"
    got = rig.run([(PROMPT, [(graft, 1.0)])])[0]
    with torch.inference_mode():
        wanted_logits = expected(input_ids=torch.tensor([PROMPT])).logits[0]
    distance = (got - wanted_logits).square().mean().sqrt() / wanted_logits.std()
    assert distance < LIMITS[stored], f"logits are off by {distance:.1e} of their spread"


def _factor(model: PeftModel, module: str) -> torch.Tensor:
    """m / ||W + s B A|| by PEFT's own parameters."""
    layer: Any = model.get_submodule(f"base_model.model.{module}")
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    norms = (layer.base_layer.weight + delta).norm(dim=1)
    return (layer.lora_magnitude_vector["default"].weight / norms).detach()
