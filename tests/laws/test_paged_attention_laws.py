"""What must hold of a GPU's paged decode attention, in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.model.attention import AttentionPlan, decode_gathered
from server.model.kv import KvCache
from server.primitives.prefix import LayerShape

pytest.importorskip("triton", reason="triton has wheels for Linux on x86_64 only")

from server.kernels.gpu.attention import SEGMENT, decode_loop, decode_paged, proved

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of values of order one: a few roundings
SETTINGS = settings(max_examples=8, deadline=None)  # the interpreter takes milliseconds for a program
LONG = 2 * SEGMENT + 40

seeds = st.integers(0, 2**31)
length_lists = st.lists(st.integers(1, 90), min_size=1, max_size=3)
groupings = st.sampled_from([(1, 1, 8), (2, 7, 8), (2, 3, 12)])  # KV heads, query heads of each, dimension


def a_cache(rng: torch.Generator, lengths: list[int], shape: LayerShape, dtype: torch.dtype) -> tuple[KvCache, Tensor]:
    """Scattered blocks, and what nobody owns is not finite; a table is padded with the sequence's last block."""
    counts = [-(-length // 16) for length in lengths]
    cache = KvCache([shape], blocks=sum(counts) + 2, block_size=16, dtype=dtype, device=DEVICE)
    free = torch.randperm(cache.blocks, generator=rng).tolist()
    for store in (cache.keys[0], cache.values[0]):
        store.fill_(float("nan"))
    tables = []
    for length, count in zip(lengths, counts, strict=True):
        blocks, free = free[:count], free[count:]
        rows = torch.tensor([blocks[place // 16] * 16 + place % 16 for place in range(length)], device=DEVICE)
        new = [torch.randn(shape.kv_heads, length, shape.head_dim, generator=rng).to(DEVICE, dtype) for _ in range(2)]
        cache.write(0, rows, *new)
        tables.append(blocks + blocks[-1:] * (max(counts) - count))
    return cache, torch.tensor(tables, device=DEVICE)


@given(
    seeds,
    length_lists,
    groupings,
    st.sampled_from([None, 5, 40]),
    st.sampled_from([None, 3.0]),
    st.booleans(),
    st.sampled_from(list(TOLERANCE)),
)
@example(0, [LONG, 3], (2, 2, 8), None, None, True, torch.float32)
@example(1, [LONG], (1, 2, 8), SEGMENT + 50, 3.0, False, torch.bfloat16)
@SETTINGS
def test_it_equals_its_plain_loop_and_what_serves_on_a_cpu(
    seed: int,
    lengths: list[int],
    grouping: tuple[int, int, int],
    window: int | None,
    softcap: float | None,
    sinks: bool,
    dtype: torch.dtype,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    kv_heads, group, dim = grouping
    heads = kv_heads * group
    cache, blocks = a_cache(rng, lengths, LayerShape(kv_heads, dim), dtype)
    # As the network hands it over: a view of packed tokens, heads behind them.
    query = torch.randn(len(lengths), heads, dim, generator=rng).to(DEVICE, dtype).transpose(0, 1)
    sink = torch.randn(heads, generator=rng).to(DEVICE, dtype) if sinks else None
    length = torch.tensor(lengths, device=DEVICE)
    how: dict[str, Any] = {"scale": dim**-0.5, "window": window, "softcap": softcap, "sinks_H": sink, "block_size": 16}
    fast = decode_paged(query, cache.keys[0], cache.values[0], blocks, length, **how)
    plain = decode_loop(query, cache.keys[0], cache.values[0], blocks, length, **how)
    torch.testing.assert_close(fast, plain.to(DEVICE), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for store in (cache.keys[0], cache.values[0]):
        store.nan_to_num_(0)  # the other one masks what it has read
    plan = AttentionPlan(cache, length, length, blocks, [])
    other = decode_gathered(query, plan, 0, window, dim**-0.5, softcap, sink)
    torch.testing.assert_close(fast, other, atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])


@given(seeds, length_lists)
@settings(SETTINGS, max_examples=4)
@example(0, [3, SEGMENT + 1])
def test_a_sequence_has_the_same_bits_alone(seed: int, lengths: list[int]) -> None:
    rng = torch.Generator().manual_seed(seed)
    cache, blocks = a_cache(rng, lengths, LayerShape(1, 8), torch.float32)
    query = torch.randn(2, len(lengths), 8, generator=rng).to(DEVICE)
    length = torch.tensor(lengths, device=DEVICE)
    how: dict[str, Any] = {"scale": 1.0, "window": None, "softcap": None, "sinks_H": None, "block_size": 16}
    together = decode_paged(query, cache.keys[0], cache.values[0], blocks, length, **how)
    own = blocks[:1, : -(-lengths[0] // 16)].contiguous()
    alone = decode_paged(query[:, :1], cache.keys[0], cache.values[0], own, length[:1], **how)
    assert torch.equal(together[:1], alone)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_it_proves_itself_where_it_is_right_and_not_where_it_fails(dtype: torch.dtype) -> None:
    assert proved(DEVICE, dtype, 6, 2, 8)
    assert not proved(torch.device("meta"), dtype, 6, 2, 8)
