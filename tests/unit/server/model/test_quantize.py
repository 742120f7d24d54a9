"""Which weights are held in few bits, and that what is held is what was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from server.config import ModelConfig
from server.errors import StartupRefused
from server.kernels.quantized import Coded, Rows
from server.model.load import load_network
from server.model.quantize import hold

CPU = torch.device("cpu")


class Small(nn.Module):
    """Two Linears, of which the second is the head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(96, 40)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("inputs", [128, 96])  # blocks of 64 end with the rows, or go on in the next
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_codes_of_bitsandbytes_are_its_weights(inputs: int, nested: bool, kind: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    numbers = torch.randn(64, inputs)

    def rounded(outputs: int, inputs: int) -> Any:
        linear: Any = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.float32)
        linear.weight = bitsandbytes.nn.Params4bit(
            numbers.view(outputs, inputs), requires_grad=False, quant_type=kind, compress_statistics=nested
        )
        return linear.to("cpu").eval()

    linear = rounded(64, inputs)
    blocks = rounded(inputs, 64)  # the same blocks, a row each: other rows are read wrongly by it on some CPUs
    expected = bitsandbytes.functional.dequantize_4bit(blocks.weight.data, blocks.weight.quant_state).view(64, inputs)
    held = hold("nf4", Small(linear), CPU)
    assert isinstance(held["body"], Coded) and isinstance(held["head"], Rows)
    torch.testing.assert_close(held["body"].weight(), expected, rtol=1e-6, atol=0)
    assert held["body"].product([]).bytes < 64 * inputs * 0.7


def test_each_method_holds_what_it_says() -> None:
    small = Small(nn.Linear(32, 96))
    kinds = {method: {name: type(one) for name, one in hold(method, small, CPU).items()} for method in ("int8", "fp8")}
    assert kinds == {"int8": {"body": Rows, "head": Rows}, "fp8": {"body": Coded, "head": Rows}}
    assert hold("none", small, CPU) == {}


def test_an_unknown_method_is_refused_by_name() -> None:
    base = Path(__file__).parents[4] / "hub" / "bases" / "seedling"
    with pytest.raises(StartupRefused, match="--quantize q5: known are none, int8, nf4, fp8"):
        load_network(ModelConfig(base="seedling", quantize="q5"), base, name="seedling")
