"""Attention of decoding sequences over the paged KV cache, on a GPU, without gathering it.

B sequences with one new token each, H query heads, K KV heads, G = H / K query heads of one KV head, D head dimension,
R rows of the cache, N blocks of a table, L cached positions.
A program takes one sequence, one KV head and one segment of SEGMENT positions: the G query heads are the rows of its
products, and keys and values are read once for all of them. A second kernel puts the segments together in their order,
with the sink if the layer has one. Segments are cut by position alone and sums have one order.
Laws: a sequence has the same bits in any batch, at any width of the table; what is not looked at is not read, so
that leftovers of others in a block cannot matter.
Source: running softmax: Dao 2023 (arXiv:2307.08691); split over positions: Dao et al. 2023, "Flash-Decoding"; paged
cache: Kwon et al. 2023 (arXiv:2309.06180); sinks: transformers 5.23, models/gpt_oss/modeling_gpt_oss.py.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.gpu.operand import operand_of

log = logging.getLogger(__name__)

PAGE = 16
# Of values of order one: a few roundings.
PROOF = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
SEGMENT = 512
BLOCK = 64  # positions of one product
EVERYTHING = 1 << 30  # a window that no context reaches


def decode_paged(
    query_HBD: Tensor,
    keys_KRD: Tensor,
    values_KRD: Tensor,
    blocks_BN: Tensor,
    lengths_B: Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """(B, H, D). A sequence looks at its last `window` of `lengths_B` positions."""
    heads, sequences, dim = query_HBD.shape
    kv_heads = keys_KRD.shape[0]
    group = heads // kv_heads
    rows, wide = max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(dim))
    segments = triton.cdiv(blocks_BN.shape[1] * block_size, SEGMENT)
    assert query_HBD.stride(2) == keys_KRD.stride(2) == 1 and keys_KRD.stride() == values_KRD.stride()
    assert blocks_BN.is_contiguous() and lengths_B.is_contiguous()
    sums = torch.empty(sequences, kv_heads, segments, rows, wide, dtype=torch.float32, device=query_HBD.device)
    # Of each row of a segment: the largest score, and the sum of exp(score - largest).
    scores = torch.empty(sequences, kv_heads, segments, 2, rows, dtype=torch.float32, device=query_HBD.device)
    out_BHD = torch.empty(sequences, heads, dim, dtype=query_HBD.dtype, device=query_HBD.device)
    _attend[(sequences, kv_heads, segments)](
        query_HBD,
        keys_KRD,
        values_KRD,
        blocks_BN,
        lengths_B,
        sums,
        scores,
        query_HBD.stride(0),
        query_HBD.stride(1),
        keys_KRD.stride(0),
        blocks_BN.shape[1],
        block_size,
        dim,
        group,
        segments,
        EVERYTHING if window is None else window,
        scale,
        softcap,
        ROWS=rows,
        WIDE=wide,
        BLOCK=BLOCK,
        SEGMENT=SEGMENT,
        OPERAND=operand_of(query_HBD.dtype),
        num_stages=2,
    )
    _combine[(sequences, kv_heads)](
        out_BHD,
        sums,
        scores,
        lengths_B,
        sinks_H,
        dim,
        group,
        segments,
        EVERYTHING if window is None else window,
        ROWS=rows,
        WIDE=wide,
        SEGMENT=SEGMENT,
    )
    return out_BHD


@lru_cache
def proved(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> bool:
    """Whether `decode_paged` has shown on this device that it equals `decode_loop`. Asked once for a shape of layer.

    A kernel that a device's compiler refuses, or gets wrong, must not serve.
    """
    rng = torch.Generator().manual_seed(0)
    query, keys, values, sinks = (
        torch.randn(*shape, generator=rng).to(device, dtype)
        for shape in ((heads, 2, dim), (kv_heads, 5 * PAGE, dim), (kv_heads, 5 * PAGE, dim), (heads,))
    )
    blocks, lengths = (torch.tensor(rows, device=device) for rows in ([[4, 1, 3], [2, 2, 2]], [2 * PAGE + 3, 5]))
    try:
        for window, softcap, sinks_H in ((None, None, None), (PAGE + 1, 2.0, sinks)):
            made, plain = (
                decode(
                    query,
                    keys,
                    values,
                    blocks,
                    lengths,
                    block_size=PAGE,
                    scale=dim**-0.5,
                    window=window,
                    softcap=softcap,
                    sinks_H=sinks_H,
                )
                for decode in (decode_paged, decode_loop)
            )
            error = (made.cpu().float() - plain.cpu().float()).abs().max().item()
            if not error <= PROOF[dtype]:
                log.warning("paged attention is off by %.1e on %s and does not serve", error, device)
                return False
    except Exception as error:  # noqa: BLE001  whatever a compiler may raise: the plain way serves
        log.warning("paged attention does not serve on %s: %s", device, error)
        return False
    return True


def decode_loop(
    query_HBD: Tensor,
    keys_KRD: Tensor,
    values_KRD: Tensor,
    blocks_BN: Tensor,
    lengths_B: Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """The same, sequence by sequence and head by head, in fp32: what tests compare `decode_paged` with."""
    heads, sequences, dim = query_HBD.shape
    out_BHD = torch.empty(sequences, heads, dim)
    for sequence, length in enumerate(lengths_B.tolist()):
        first = 0 if window is None else max(0, length - window)
        rows = [
            int(blocks_BN[sequence, place // block_size]) * block_size + place % block_size
            for place in range(first, length)
        ]
        for head in range(heads):
            kv_head = head // (heads // keys_KRD.shape[0])
            score_L = keys_KRD[kv_head, rows].float() @ query_HBD[head, sequence].float() * scale
            if softcap is not None:
                score_L = (score_L / softcap).tanh() * softcap
            if sinks_H is not None:
                score_L = torch.cat([score_L, sinks_H[head, None].float()])
            weight_L = score_L.softmax(0)[: len(rows)]
            out_BHD[sequence, head] = weight_L @ values_KRD[kv_head, rows].float()
    return out_BHD.to(query_HBD.dtype)


@triton.jit
def _attend(
    query_ptr,
    keys_ptr,
    values_ptr,
    blocks_ptr,
    lengths_ptr,
    sums_ptr,
    scores_ptr,
    query_head_stride,
    query_stride,
    head_stride,
    width,
    block_size,
    dim,
    group,
    segments,
    window,
    scale,
    softcap,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One sequence, one KV head, one segment."""
    sequence, kv_head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    first = tl.maximum(length - window, 0)
    if (segment * SEGMENT >= length) | ((segment + 1) * SEGMENT <= first):
        return
    row = tl.arange(0, ROWS)
    feature = tl.arange(0, WIDE)
    inside = feature < dim
    query = tl.load(
        query_ptr + (kv_head * group + row)[:, None] * query_head_stride + sequence * query_stride + feature[None, :],
        mask=(row < group)[:, None] & inside[None, :],
        other=0.0,
    ).to(OPERAND)
    largest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, WIDE], dtype=tl.float32)
    for start in range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, length), BLOCK):
        place = start + tl.arange(0, BLOCK)
        seen = (place < length) & (place >= first)
        block = tl.load(blocks_ptr + sequence * width + place // block_size, mask=seen, other=0).to(tl.int64)
        at = kv_head * head_stride + (block * block_size + place % block_size) * dim
        where = at[:, None] + feature[None, :]
        there = seen[:, None] & inside[None, :]
        keys = tl.load(keys_ptr + where, mask=there, other=0.0).to(OPERAND)
        score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if softcap is not None:
            score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))
        score = tl.where(seen[None, :], score, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 1))
        safe = tl.where(larger == float("-inf"), 0.0, larger)
        weight = tl.exp(score - safe[:, None])
        kept = tl.exp(largest - safe)
        values = tl.load(values_ptr + where, mask=there, other=0.0)
        total = total * kept + tl.sum(weight, 1)
        sums = sums * kept[:, None] + tl.dot(
            weight.to(values.dtype).to(OPERAND), values.to(OPERAND), input_precision="ieee"
        )
        largest = larger
    place = (sequence * tl.num_programs(1) + kv_head) * segments + segment
    tl.store(scores_ptr + (place * 2) * ROWS + row, largest)
    tl.store(scores_ptr + (place * 2 + 1) * ROWS + row, total)
    tl.store(sums_ptr + (place * ROWS + row[:, None]) * WIDE + feature[None, :], sums)


@triton.jit
def _combine(
    out_ptr,
    sums_ptr,
    scores_ptr,
    lengths_ptr,
    sinks_ptr,
    dim,
    group,
    segments,
    window,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """One sequence, one KV head. A sink takes its share of the softmax and brings no value."""
    sequence, kv_head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    first = tl.maximum(length - window, 0)
    row = tl.arange(0, ROWS)
    feature = tl.arange(0, WIDE)
    head = kv_head * group + row
    largest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if sinks_ptr is not None:
        largest = tl.load(sinks_ptr + head, mask=row < group, other=0.0).to(tl.float32)
        total = tl.full([ROWS], 1.0, dtype=tl.float32)
    sums = tl.zeros([ROWS, WIDE], dtype=tl.float32)
    for segment in range(first // SEGMENT, (length + SEGMENT - 1) // SEGMENT):
        place = (sequence * tl.num_programs(1) + kv_head) * segments + segment
        own = tl.load(scores_ptr + (place * 2) * ROWS + row)
        larger = tl.maximum(largest, own)
        kept, joins = tl.exp(largest - larger), tl.exp(own - larger)
        total = total * kept + tl.load(scores_ptr + (place * 2 + 1) * ROWS + row) * joins
        part = tl.load(sums_ptr + (place * ROWS + row[:, None]) * WIDE + feature[None, :])
        sums = sums * kept[:, None] + part * joins[:, None]
        largest = larger
    out = sums / total[:, None]
    tl.store(
        out_ptr + (sequence * tl.num_programs(1) * group + head)[:, None] * dim + feature[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(row < group)[:, None] & (feature < dim)[None, :],
    )
