"""What a base Linear multiplies with, read back from every form in which it may be stored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.model.weights import base_weight

bitsandbytes = pytest.importorskip("bitsandbytes")

ROWS, COLUMNS = 64, 128
PACKED = 2**-7  # the scale of a block, a nested one twice, and the weight are rounded to bfloat16, which has 8 bits
FUSED = 2**-7  # its product rounds the table and the answer so, too
NF4_ERROR = 0.1  # of the norm of normally distributed numbers: 0.093 are lost
HALF = 2**-10  # int8 products answer in float16, which has 11 bits


def nf4(*, nested: bool, compute: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    linear = bitsandbytes.nn.Linear4bit(COLUMNS, ROWS, bias=False, compute_dtype=compute)
    linear.weight = bitsandbytes.nn.Params4bit(
        torch.randn(ROWS, COLUMNS, dtype=compute), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    return linear.to("cpu").eval()


def answered(linear: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight by what the Linear makes of the unit vectors."""
    with torch.inference_mode():
        return linear(torch.eye(COLUMNS, dtype=dtype)).float().t()


def test_a_linear_and_a_conv1d_give_outputs_by_inputs() -> None:
    linear, conv = nn.Linear(COLUMNS, ROWS, bias=False), Conv1D(ROWS, COLUMNS)
    nn.init.normal_(conv.weight)
    assert torch.equal(base_weight(linear), linear.weight)
    assert base_weight(conv).shape == (ROWS, COLUMNS)
    assert torch.allclose(base_weight(conv), answered(conv) - conv.bias[:, None], atol=1e-6)


def test_a_weight_in_half_precision_is_read_in_full() -> None:
    linear = nn.Linear(COLUMNS, ROWS, bias=False).bfloat16()
    assert base_weight(linear).dtype == torch.float32
    assert torch.equal(base_weight(linear), linear.weight.float())


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_nf4_is_dequantised_before_and_after_products(nested: bool, compute: torch.dtype) -> None:
    linear = nf4(nested=nested, compute=compute)
    before = base_weight(linear)
    assert torch.equal(before, bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state))
    product = answered(linear, compute)
    assert torch.allclose(base_weight(linear), product, rtol=FUSED, atol=0)
    assert torch.allclose(base_weight(linear), before, rtol=PACKED, atol=0)
    assert torch.equal(answered(linear, compute), product), "reading has changed the Linear"


def test_nf4_of_rows_that_are_no_whole_blocks_is_read_as_it_was_rounded() -> None:
    """bitsandbytes reads such rows wrongly on CPUs with AVX-512."""
    torch.manual_seed(0)
    weight = torch.randn(ROWS, 96)
    linear = bitsandbytes.nn.Linear4bit(96, ROWS, bias=False, compute_dtype=torch.float32)
    linear.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    off = base_weight(linear.to("cpu").eval()) - weight
    assert off.norm() < NF4_ERROR * weight.norm()


@pytest.mark.parametrize("nested", [True, False])
def test_nf4_that_is_packed_for_a_cpu_with_bfloat16_products_is_read_as_it_was(nested: bool) -> None:
    linear = nf4(nested=nested)
    before = base_weight(linear)
    if not getattr(linear.weight.quant_state, "packing_format_for_cpu", False):  # what the first product does there
        linear.weight.data, linear.weight.quant_state = bitsandbytes.functional._convert_weight_packed_for_cpu(
            linear.weight.data, copy.copy(linear.weight.quant_state)
        )
    assert torch.allclose(base_weight(linear), before, rtol=PACKED, atol=0)


def test_int8_is_dequantised_before_and_after_products() -> None:
    torch.manual_seed(0)
    linear = bitsandbytes.nn.Linear8bitLt(COLUMNS, ROWS, bias=False, has_fp16_weights=False)
    linear.weight = bitsandbytes.nn.Int8Params(torch.randn(ROWS, COLUMNS), requires_grad=False, has_fp16_weights=False)
    linear = linear.to("cpu").eval()
    before = base_weight(linear)
    assert torch.allclose(answered(linear), before, rtol=HALF, atol=1e-6)
    assert torch.equal(base_weight(linear), before)
