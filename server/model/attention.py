"""The attention function that the stock network calls: grouped-query attention over the paged KV cache.

T packed tokens, H query heads, KH KV heads, G = H / KH query heads of one KV head, D head dimension, B decoding
sequences, n tokens of one prompt chunk, L cached positions.
Tokens are packed decodes first, then prompt chunks. Decodes read the cache in place where the native kernel runs, and
are one padded product per KV head elsewhere (query heads of a group ride along as rows, so keys are never repeated);
each prompt chunk is attended on its own.
A layer may have sinks: a learned score per query head that takes its share of the softmax and brings no value.
Law: a token sees its own sequence's positions up to its own, and within the layer's window, and nothing else.
Source: Ainslie et al. 2023 (arXiv:2305.13245); Kwon et al. 2023 (arXiv:2309.06180); sinks: transformers 5.23,
models/gpt_oss/modeling_gpt_oss.py `eager_attention_forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.kernels import native
from server.model.kv import KvCache
from server.primitives.prefix import LayerShape

NAME = "multigraft"
NEUTRAL = frozenset({"dropout", "position_ids", "use_cache", "output_router_logits", "is_causal", "cache_position"})


@dataclass(frozen=True, slots=True)
class Span:
    """A prompt chunk: `count` tokens of one sequence, the last of them at position `length - 1`."""

    count: int
    length: int
    blocks_1N: Tensor


@dataclass(slots=True)
class AttentionPlan:
    """Where every packed token's keys go and what it may see. `seen` counts the layers that asked."""

    cache: KvCache
    rows_T: Tensor
    decode_lengths_B: Tensor | None
    decode_blocks_BN: Tensor | None
    spans: Sequence[Span]
    seen: int = 0
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def decode_mask(self, window: int | None) -> Tensor:
        """(B, 1, L), true where the sequence's newest token may look."""
        assert self.decode_lengths_B is not None and self.decode_blocks_BN is not None
        mask = self._masks.get((-1, window))
        if mask is None:
            limit = self.decode_blocks_BN.shape[1] * self.cache.block_size
            position_L = torch.arange(limit, device=self.rows_T.device)
            length_B1 = self.decode_lengths_B[:, None]
            seen_BL = position_L < length_B1
            if window is not None:
                seen_BL &= position_L >= length_B1 - window
            mask = self._masks[-1, window] = seen_BL[:, None]
        return mask

    def span_mask(self, index: int, window: int | None) -> Tensor:
        """(n, L) for prompt chunk `index`."""
        mask = self._masks.get((index, window))
        if mask is None:
            span = self.spans[index]
            limit = span.blocks_1N.shape[1] * self.cache.block_size
            position_L = torch.arange(limit, device=self.rows_T.device)
            own_n1 = torch.arange(span.length - span.count, span.length, device=self.rows_T.device)[:, None]
            mask = position_L <= own_n1
            if window is not None:
                mask &= position_L > own_n1 - window
            self._masks[index, window] = mask
        return mask


@dataclass(slots=True)
class ShapeRecorder:
    """Stands in for a plan on the first probe: notes each layer's shapes and module, and attends nowhere."""

    layers: dict[int, LayerShape] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)


class UnsupportedAttention(ValueError):
    """The architecture hands its attention something that we do not act on."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    graft_plan: AttentionPlan | ShapeRecorder | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers' AttentionInterface calls, once per layer: (1, H, T, D) in, (1, T, H, D) out.

    `s_aux` are the layer's sinks (H). Raises: UnsupportedAttention for an argument whose effect is unknown.
    """
    strange = sorted(name for name, given in others.items() if name not in NEUTRAL and given is not None)
    if strange or attention_mask is not None:
        raise UnsupportedAttention(f"attention arguments {strange or ['attention_mask']} are not served")
    if graft_plan is None:
        raise UnsupportedAttention("its layers do not hand the forward pass's arguments on to their attention")
    if key.shape != value.shape:
        raise UnsupportedAttention(f"key shape {tuple(key.shape)} differs from value shape {tuple(value.shape)}")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(graft_plan, ShapeRecorder):
        graft_plan.layers[layer] = LayerShape(key.shape[1], key.shape[3])
        graft_plan.modules[layer] = module
        return query.transpose(1, 2).contiguous(), None
    graft_plan.cache.write(layer, graft_plan.rows_T, key[0], value[0])
    return read_cache(query[0], graft_plan, layer, sliding_window, scale, softcap, s_aux), None


def read_cache(
    query_HTD: Tensor,
    plan: AttentionPlan,
    layer: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """(1, T, H, D): what the step's tokens see of the cache, in which their own keys and values stand already."""
    plan.seen += 1
    parts = []
    if plan.decode_blocks_BN is not None:
        decodes = plan.decode_blocks_BN.shape[0]
        decode = _decode_for(query_HTD, plan.cache)
        parts.append(decode(query_HTD[:, :decodes], plan, layer, window, scale, softcap, sinks_H))
    parts += [out for _, out in read_spans(query_HTD, plan, layer, window, scale, softcap, sinks_H)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


def read_spans(
    query_HTD: Tensor,
    plan: AttentionPlan,
    layer: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Iterator[tuple[int, Tensor]]:
    """Of each prompt chunk its first token and (n, H, D), what its tokens see of the cache."""
    start = 0 if plan.decode_blocks_BN is None else plan.decode_blocks_BN.shape[0]
    for index, span in enumerate(plan.spans):
        keys, values = plan.cache.gather(layer, span.blocks_1N)
        mask = plan.span_mask(index, window)
        chunk = query_HTD[:, start : start + span.count]
        yield start, _prefill(chunk, keys[:, 0], values[:, 0], mask, scale, softcap, sinks_H)
        start += span.count


def in_place(x: Tensor, cache: KvCache, dim: int) -> bool:
    """Whether the native kernels can work on the cache where it is, with activations like x and heads of `dim`."""
    return native.serves(x.device, x.dtype) and cache.keys[0].dtype == x.dtype and dim % native.LANES == 0


def _decode_for(query_HTD: Tensor, cache: KvCache) -> Callable[..., Tensor]:
    heads, _, dim = query_HTD.shape
    if query_HTD.is_cuda:
        # Only where there is a GPU: torch for CPUs comes without Triton.
        from server.kernels.gpu import attention as on_gpu

        paged = on_gpu.proved(query_HTD.device, query_HTD.dtype, heads, cache.keys[0].shape[0], dim)
        return partial(decode_by, on_gpu.decode_paged) if paged else decode_gathered
    return decode_in_place if in_place(query_HTD, cache, dim) else decode_gathered


def decode_by(
    kernel: Callable[..., Tensor],
    query_HBD: Tensor,
    plan: AttentionPlan,
    layer: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """What `decode_gathered` gives, by a kernel that reads keys and values where they are."""
    assert plan.decode_lengths_B is not None and plan.decode_blocks_BN is not None
    return kernel(
        query_HBD,
        plan.cache.keys[layer],
        plan.cache.values[layer],
        plan.decode_blocks_BN,
        plan.decode_lengths_B,
        block_size=plan.cache.block_size,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks_H=sinks_H,
    )


decode_in_place = partial(decode_by, native.attend)


def decode_gathered(
    query_HBD: Tensor,
    plan: AttentionPlan,
    layer: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """The newest token of each sequence over its cached positions: (B, H, D)."""
    assert plan.decode_blocks_BN is not None
    keys_KBLD, values_KBLD = plan.cache.gather(layer, plan.decode_blocks_BN)
    mask_B1L = plan.decode_mask(window)
    heads, sequences, dim = query_HBD.shape
    kv_heads = keys_KBLD.shape[0]
    query_KBGD = query_HBD.view(kv_heads, heads // kv_heads, sequences, dim).transpose(1, 2)
    sinks = None if sinks_H is None else sinks_H.view(kv_heads, 1, heads // kv_heads, 1)
    out_KBGD = _weigh(query_KBGD @ keys_KBLD.transpose(2, 3), mask_B1L, scale, softcap, sinks) @ values_KBLD
    return out_KBGD.permute(1, 0, 2, 3).reshape(sequences, heads, dim)


def _prefill(
    query_HnD: Tensor,
    keys_KLD: Tensor,
    values_KLD: Tensor,
    mask_nL: Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    heads, count, dim = query_HnD.shape
    kv_heads, length, _ = keys_KLD.shape
    group = heads // kv_heads
    if softcap is None and sinks_H is None:
        grouped = query_HnD.device.type == "cpu"  # what has masks and knows of groups is slow on GPUs
        keys, values = (
            one[None] if grouped else one[:, None].expand(-1, group, -1, -1).reshape(1, heads, length, dim)
            for one in (keys_KLD, values_KLD)
        )
        out = F.scaled_dot_product_attention(
            query_HnD[None], keys, values, attn_mask=mask_nL, scale=scale, enable_gqa=grouped
        )
        return out[0].transpose(0, 1)
    query = query_HnD.reshape(kv_heads, group * count, dim)
    scores = (query @ keys_KLD.transpose(1, 2)).view(kv_heads, group, count, length)
    sinks = None if sinks_H is None else sinks_H.view(kv_heads, group, 1, 1)
    weights = _weigh(scores, mask_nL, scale, softcap, sinks).view(kv_heads, group * count, length)
    return (weights @ values_KLD).view(heads, count, dim).transpose(0, 1)


def _weigh(scores: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Softmax in fp32 over what the mask lets through and the sinks, whose shares are then dropped."""
    scores = scores * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    with_sinks = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    return with_sinks.softmax(-1, dtype=torch.float32)[..., :-1].to(scores.dtype)
