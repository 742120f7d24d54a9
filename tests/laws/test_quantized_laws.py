"""The products of weights in few bits against the dense product with the same weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.kernels import native
from server.kernels.products import Product
from server.kernels.quantized import (
    BYTE,
    SEVEN_BITS,
    Coded,
    Int8,
    Int8Ordered,
    Int8Panels,
    Int8Plain,
    Int8Tiled,
    Rows,
    has_fbgemm,
    has_ordered_bytes,
    in_panels,
    largest_code,
    multiply_by_tiles,
    pack,
    round_float8,
    round_rows,
    unpack,
)

CLOSE = 1e-5  # of the sum of magnitudes, in fp32
BETWEEN = 2.0**-14  # FBGEMM adds 128 before it rounds, in fp32
Bytes = type[Int8] | type[Int8Ordered] | type[Int8Tiled] | type[Int8Panels] | type[Int8Plain]


def int8_kinds() -> list[Bytes]:
    fast: list[Bytes] = [Int8] if has_fbgemm() else []
    fast += [Int8Ordered] if has_ordered_bytes() else []
    fast += [Int8Tiled] if native.LIBRARY is not None else []  # where there is no matrix unit by its plain loop
    fast += [Int8Panels] if native.has_panels() else []
    return [*fast, Int8Plain]


def largest_of(kind: type[Product]) -> int:
    """Of its codes here: FBGEMM has a bit less to add in where there is no VNNI."""
    return SEVEN_BITS if kind is Int8 and not torch.cpu._is_vnni_supported() else BYTE


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every token in codes of its own scale, widened again; and what that may be off by, just between two codes."""
    scales = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / BYTE
    codes = x.float() / scales
    return codes.round() * scales, ((codes - codes.floor() - 0.5).abs() < BETWEEN) * scales


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([0, 1, 2, 16, 33]),
    inputs=st.sampled_from([1, 16, 33, 128, 897]),
    outputs=st.lists(st.sampled_from([1, 8, 40, 129]), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    largest=st.sampled_from([SEVEN_BITS, BYTE]),
)
def test_int8_is_the_dense_product_of_rounded_tokens_or_of_tokens_as_they_are(
    seed: int, tokens: int, inputs: int, outputs: list[int], dtype: torch.dtype, largest: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(wide, inputs, generator=generator) for wide in outputs]
    held = [round_rows(weight, largest) for weight in weights]
    x = (torch.randn(tokens, inputs, generator=generator) * 10).to(dtype)
    dense = torch.cat([part.weight() for part in held])
    step = torch.cat(weights).abs().amax(1, keepdim=True) / largest
    assert ((dense - torch.cat(weights)).abs() <= step * 0.5001).all()
    codes_TI, doubt = rounded(x)
    magnitudes = dense.abs().double().t()
    rough = CLOSE if dtype == torch.float32 else 2.0**-8
    exact_room = rough * (x.float().abs().double() @ magnitudes + 1e-6)
    exact = x.double() @ dense.double().t(), exact_room
    by_bytes = codes_TI.double() @ dense.double().t(), exact_room + doubt.double() @ magnitudes
    whole = Rows(torch.cat([part.codes_OI for part in held]), torch.cat([part.scales_O for part in held]))
    for kind in int8_kinds():
        if largest > largest_of(kind) or (kind is Int8Tiled and not native.fits_tiles(inputs, torch.int8)):
            continue
        product = kind(whole)
        assert torch.equal(product.weight(), dense)
        y = product(x)
        wanted, room = exact if kind is Int8Panels else by_bytes
        assert y.dtype == dtype and y.shape == wanted.shape
        assert ((y.double() - wanted).abs() <= room).all()
    wanted, room = exact if in_panels() else by_bytes
    assert ((whole.reference(x).double() - wanted).abs() <= room).all()
    joint = held[0].product(held[1:])
    assert torch.equal(joint.weight(), dense) and joint.bytes >= dense.numel()


@pytest.mark.parametrize("kind", int8_kinds())
def test_sums_of_the_largest_codes_do_not_saturate(kind: Bytes) -> None:
    """Each product of two bytes is as large as it gets; the plain products cannot overflow."""
    largest = largest_of(kind)
    rows = Rows(torch.full((16, 512), largest, dtype=torch.int8), torch.ones(16))
    for sign in (1, -1):
        x = torch.full((5, 512), 3.0 * sign)
        assert kind is Int8Panels or torch.equal(kind(rows)(x), Int8Plain(rows)(x))
        torch.testing.assert_close(kind(rows)(x), torch.full((5, 16), 3.0 * sign * 512 * largest))


def test_the_largest_code_is_that_of_the_product_which_is_chosen_here() -> None:
    rows = round_rows(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), largest_code())
    kind = type(rows.product([]))
    assert largest_code() == largest_of(kind)
    assert in_panels() == (kind is Int8Panels)


@pytest.mark.parametrize("kind", int8_kinds())
def test_a_token_does_not_depend_on_its_neighbours_whatever_they_are(kind: Bytes) -> None:
    generator = torch.Generator().manual_seed(3)
    product = kind(round_rows(torch.randn(40, 64, generator=generator), largest_of(kind)))
    x = torch.randn(6, 64, generator=generator)
    alone = product(x[2:3])
    for neighbour in (0.0, 1e30, float("inf"), float("nan")):
        x[0], x[4, 7] = neighbour, neighbour
        y = product(x)
        assert torch.equal(y[2:3], alone)
        assert y[0].isfinite().all() == (neighbour in (0.0, 1e30))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([0, 1, 2, 13, 40]),
    shape=st.sampled_from([(32, 32), (64, 32), (96, 96), (256, 64), (384, 128)]),
    outputs=st.lists(st.sampled_from([1, 8, 40, 129]), min_size=1, max_size=3),
    offset=st.booleans(),
    ordered=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_codes_of_four_bits_are_the_dense_product(
    seed: int,
    tokens: int,
    shape: tuple[int, int],
    outputs: list[int],
    offset: bool,
    ordered: bool,
    dtype: torch.dtype,
    threads: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, group = shape
    levels = torch.randn(16, generator=generator)
    order = torch.randperm(inputs, generator=generator) if ordered else None
    held, dense = [], []
    for wide in outputs:
        codes = torch.randint(0, 16, (wide, inputs), generator=generator, dtype=torch.uint8)
        scales, offsets = (torch.randn(wide, inputs // group, generator=generator) for _ in range(2))
        assert torch.equal(unpack(pack(codes)), codes)
        held.append(Coded(pack(codes), levels, scales, offsets if offset else None, order))
        columns = levels[codes.long()] * scales.repeat_interleave(group, 1)
        columns = columns + offsets.repeat_interleave(group, 1) if offset else columns
        weight = torch.empty_like(columns)
        weight[:, slice(None) if order is None else order] = columns
        dense.append(weight)
    _check_dense(held, torch.cat(dense), torch.randn(tokens, inputs, generator=generator).to(dtype), threads)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([1, 13]),
    inputs=st.sampled_from([1, 7, 16, 33, 200]),
    outputs=st.lists(st.sampled_from([1, 8, 129]), min_size=1, max_size=2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_float8_is_the_dense_product(
    seed: int, tokens: int, inputs: int, outputs: list[int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(wide, inputs, generator=generator) for wide in outputs]
    held = [round_float8(weight) for weight in weights]
    scales = [weight.abs().amax(1, keepdim=True) / 448 for weight in weights]
    dense = torch.cat([(w / s).to(torch.float8_e4m3fn).float() * s for w, s in zip(weights, scales, strict=True)])
    _check_dense(held, dense, torch.randn(tokens, inputs, generator=generator).to(dtype), 2)


def test_every_byte_of_float8_is_its_number() -> None:
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[numbers & 0x7F != 0x7F]  # those two are none
    product = Coded(numbers[:, None], None, torch.ones(len(numbers), 1)).product([])
    assert torch.equal(product(torch.ones(1, 1))[0], numbers.view(torch.float8_e4m3fn).float())


def _check_dense(held: list[Coded], dense: Tensor, x: Tensor, threads: int) -> None:
    """The product of all, its plain loop, and each token alone."""
    product = held[0].product(held[1:])
    torch.testing.assert_close(product.weight(), dense, rtol=1e-6, atol=1e-6)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = product(x)
    finally:
        torch.set_num_threads(before)
    order = held[0].order_I
    plain = torch.cat([multiply_by_tiles(x if order is None else x[:, order], one) for one in held], -1)
    wanted = x.double() @ dense.double().t()
    room = x.float().abs().double() @ dense.abs().double().t() + 1e-6
    for got in (y, plain):
        assert got.dtype == x.dtype and got.shape == wanted.shape
        rough = CLOSE if x.dtype == torch.float32 else 2.0**-6 if got is plain else 2.0**-8
        assert ((got.double() - wanted).abs() <= rough * room).all()
    if native.LIBRARY is not None and len(x) > 2:
        assert torch.equal(product(x[1:2]), y[1:2]), "a token depends on its neighbours"
        worse = x.clone()
        worse[0] = float("nan")
        assert torch.equal(product(worse)[1:], y[1:])
