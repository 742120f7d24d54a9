"""The products of weights in few bits against the dense product with the same weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.kernels.quantized import BYTE, SEVEN_BITS, Int8, Int8Plain, Rows, largest_code, round_rows

CLOSE = 1e-5  # of the sum of magnitudes, in fp32
fbgemm = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="this build of torch has no FBGEMM"
)


def int8_kinds() -> list[type[Int8] | type[Int8Plain]]:
    return [Int8, Int8Plain] if "fbgemm" in torch.backends.quantized.supported_engines else [Int8Plain]


def rounded(x: Tensor) -> Tensor:
    """Every token in codes of its own scale, widened again."""
    scales = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / BYTE
    return (x.float() / scales).round() * scales


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([0, 1, 2, 16, 33]),
    inputs=st.sampled_from([1, 16, 33, 897]),
    outputs=st.lists(st.sampled_from([1, 8, 40, 129]), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_int8_is_the_dense_product_of_rounded_tokens(
    seed: int, tokens: int, inputs: int, outputs: list[int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(wide, inputs, generator=generator) for wide in outputs]
    held = [round_rows(weight, largest_code()) for weight in weights]
    x = (torch.randn(tokens, inputs, generator=generator) * 10).to(dtype)
    dense = torch.cat([part.weight() for part in held])
    step = torch.cat(weights).abs().amax(1, keepdim=True) / largest_code()
    assert ((dense - torch.cat(weights)).abs() <= step * 0.5001).all()
    wanted = rounded(x).double() @ dense.double().t()
    room = x.float().abs().double() @ dense.abs().double().t() + 1e-6
    rough = CLOSE if dtype == torch.float32 else 2.0**-8
    whole = Rows(torch.cat([part.codes_OI for part in held]), torch.cat([part.scales_O for part in held]))
    for kind in int8_kinds():
        product = kind(whole)
        assert torch.equal(product.weight(), dense)
        y = product(x)
        assert y.dtype == dtype and y.shape == wanted.shape
        assert ((y.double() - wanted).abs() <= rough * room).all()
    joint = held[0].product(held[1:])
    assert torch.equal(joint.weight(), dense) and joint.bytes >= dense.numel()


@fbgemm
def test_sums_of_the_largest_codes_do_not_saturate() -> None:
    """Each product of two bytes is as large as it gets; the plain products cannot overflow."""
    largest = largest_code()
    rows = Rows(torch.full((16, 512), largest, dtype=torch.int8), torch.ones(16))
    for sign in (1, -1):
        x = torch.full((5, 512), 3.0 * sign)
        assert torch.equal(Int8(rows)(x), Int8Plain(rows)(x))
        torch.testing.assert_close(Int8(rows)(x), torch.full((5, 16), 3.0 * sign * 512 * largest))
    assert largest in (SEVEN_BITS, BYTE)


@pytest.mark.parametrize("kind", int8_kinds())
def test_a_token_does_not_depend_on_its_neighbours_whatever_they_are(kind: type[Int8] | type[Int8Plain]) -> None:
    generator = torch.Generator().manual_seed(3)
    product = kind(round_rows(torch.randn(40, 64, generator=generator), largest_code()))
    x = torch.randn(6, 64, generator=generator)
    alone = product(x[2:3])
    for neighbour in (0.0, 1e30, float("inf"), float("nan")):
        x[0], x[4, 7] = neighbour, neighbour
        y = product(x)
        assert torch.equal(y[2:3], alone)
        assert y[0].isfinite().all() == (neighbour in (0.0, 1e30))
