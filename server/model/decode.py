"""All layers of a step as one native call: of decodes, and of prompts that are short.

So a step costs its products and its attention, and no interpreter between them. It is for decoders that are native
altogether (`server.model.fused`), whose products are in tiles or in panels, and for adapters that native functions
know: low-rank terms, and what `server.kernels.changes` has. Everything else goes through the layers one by one, which
are its plain loop. Every token of a prompt is attended as if it were decoded; where there are many, or they see much,
torch's attention is faster.

T tokens, E features, H query heads, K KV heads, D head dimension, F inner features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels import native
from server.kernels.adapted import ADAPTERS, WEIGHT, Native, activations_of, adapters_entry, weight_entry
from server.kernels.quantized import SMALLEST
from server.model.attention import AttentionPlan
from server.model.grafted import GraftedNorm, Joint, check_count
from server.model.kv import KvCache
from server.model.norms import NativeNorm
from server.primitives.site import Active

# As layer_t and decode_t in native_adapted.h.
PRODUCTS = ("qkv", "o", "gate_up", "down")
LAYER = np.dtype(
    [
        *((name, WEIGHT) for name in PRODUCTS),
        *((name, "u8") for name in ("before", "behind", "bias")),
        ("head_norms", native.HEAD_NORM, 2),
        *((name, "u8") for name in ("keys", "values")),
        *((name, "i8") for name in ("window", "before_number", "behind_number")),
        *((name, "f4") for name in ("before_eps", "behind_eps", "before_offset", "behind_offset")),
    ]
)
STEP = np.dtype(
    [
        *((name, ADAPTERS) for name in ("adapters", "last")),
        ("wanted", "u8"),
        *((name, "i8") for name in ("features", "heads", "kv_heads", "dim", "inner")),
        *((name, "u8") for name in ("cos", "sin")),
        ("rotated", "i8"),
        *((name, "u8") for name in ("places", "blocks", "lengths")),
        *((name, "i8") for name in ("rows", "width", "block_size")),
        *((name, "f4") for name in ("scale", "least")),
    ]
)

TOGETHER = 3  # Linears that read the same input, whose inputs adapters may change for all tokens of a step
MOST_SEEN = 1 << 15  # positions that all tokens of a step's prompts see


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Of each head of the queries, and of the keys: as HEAD_NORM, and the names of those that there are."""

    table_2: npt.NDArray[np.void]
    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class Parts:
    """A layer of a decoder. `number`: its layer of the KV cache."""

    before: GraftedNorm
    behind: GraftedNorm
    qkv: Joint
    o: Joint
    gate_up: Joint
    down: Joint
    head_norms: HeadNorms
    number: int
    window: int | None
    dim: int
    scale: float


class Decode:
    def __init__(self, layers: Sequence[Parts], active: Active) -> None:
        """Only for layers that it `fits`."""
        first = layers[0]
        self._layers = layers
        self._active = active
        self._table = np.zeros(len(layers), LAYER)
        for row, layer in zip(self._table, layers, strict=True):
            for name, joint in zip(PRODUCTS, _joints(layer), strict=True):
                product = joint.product
                assert isinstance(product, Native)
                self._dtype = activations_of(product)
                row[name] = weight_entry(product, joint.group, joint.members[0].number)
            for name, norm in (("before", layer.before), ("behind", layer.behind)):
                assert norm.fast is not None and norm.number is not None
                row[name], row[f"{name}_number"] = norm.fast.weight_F.data_ptr(), norm.number
                row[f"{name}_eps"], row[f"{name}_offset"] = norm.fast.eps, norm.fast.offset
            row["bias"] = 0 if layer.qkv.bias is None else layer.qkv.bias.data_ptr()
            row["head_norms"] = layer.head_norms.table_2
            row["window"] = layer.window or 0
        self._step = np.zeros(1, STEP)
        self._features = first.o.members[0].end
        self._heads = first.qkv.members[0].end // first.dim
        self._inner = first.gate_up.members[0].end
        self._cache: KvCache | None = None
        self._names = {member.name for layer in layers for joint in _joints(layer) for member in joint.members}
        self._names |= {norm.name for layer in layers for norm in (layer.before, layer.behind)}
        self._names |= {name for layer in layers for name in layer.head_norms.names}

    def serves(self, plan: AttentionPlan) -> bool:
        """Whether the step's prompts see little, and the native functions know what its adapters do in the layers."""
        seen = sum(span.count * span.length for span in plan.spans)
        return seen <= MOST_SEEN and self._active.routes is None and self._names.isdisjoint(self._active.operands)

    def compute(
        self, stream_TE: Tensor, rotation: tuple[Tensor, Tensor], plan: AttentionPlan, wanted_R: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the last MLP adds to the stream, and the stream, which has all else by then: of the wanted tokens alone.

        The stream given, of the type that the products take, is worked in. Raises: MemoryError.
        """
        assert native.LIBRARY is not None
        assert stream_TE.is_contiguous() and stream_TE.dtype == self._dtype
        tokens, features = stream_TE.shape
        cos_TR, sin_TR = rotation[0][0], rotation[1][0]
        lengths_T, blocks_TN = _as_decodes(plan)
        self._note_cache(plan.cache)
        kv_heads, rows, dim = plan.cache.keys[self._layers[0].number].shape
        gathered, gates, most = self._active.gathered, self._active.gates, tokens
        if gathered is not None and gates is not None:
            check_count(self._layers[0].qkv.members[0].name, tokens, gates)
            most = tokens if gathered.changes is None else tokens * (1 + TOGETHER)
        count = tokens if wanted_R is None else len(wanted_R)
        last = gates if wanted_R is None else self._active.wanted_gates
        self._step[0] = (
            adapters_entry(tokens, gathered, None if gates is None else gates.runs, self._dtype),
            adapters_entry(count, gathered, None if last is None else last.runs, self._dtype),
            0 if wanted_R is None else wanted_R.data_ptr(),
            *(features, self._heads, kv_heads, dim, self._inner),
            *(cos_TR.data_ptr(), sin_TR.data_ptr(), cos_TR.shape[1]),
            *(plan.rows_T.data_ptr(), blocks_TN.data_ptr(), lengths_T.data_ptr()),
            *(rows, blocks_TN.shape[1], plan.cache.block_size, self._layers[0].scale, SMALLEST),
        )
        query = self._heads * dim
        by_row = features + query + 2 * kv_heads * dim + 2 * self._inner
        numbers = most * by_row + tokens * (query + self._inner + max(query, self._inner))
        spare = most * (4 + max(features, query, self._inner))
        work = torch.empty(numbers * self._dtype.itemsize + spare, dtype=torch.uint8)
        pending_TE = torch.empty_like(stream_TE)
        failed = native.LIBRARY.mg_decode(
            self._step.ctypes.data,
            self._table.ctypes.data,
            len(self._layers),
            stream_TE.data_ptr(),
            pending_TE.data_ptr(),
            work.data_ptr(),
            most,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for a step of {tokens} tokens")
        plan.seen += len(self._layers)
        return pending_TE[:count], stream_TE[:count]

    def _note_cache(self, cache: KvCache) -> None:
        if cache is not self._cache:
            self._table["keys"] = [cache.keys[layer.number].data_ptr() for layer in self._layers]
            self._table["values"] = [cache.values[layer.number].data_ptr() for layer in self._layers]
            self._cache = cache


def _as_decodes(plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """Of every token how many positions it sees, and (T, N) the blocks that have them; behind those any."""
    lengths, blocks = list[Tensor](), list[Tensor]()
    if plan.decode_lengths_B is not None and plan.decode_blocks_BN is not None:
        lengths.append(plan.decode_lengths_B)
        blocks.append(plan.decode_blocks_BN)
    for span in plan.spans:
        lengths.append(torch.arange(span.length - span.count, span.length) + 1)
        blocks.append(span.blocks_1N.expand(span.count, -1))
    if len(blocks) == 1:
        return lengths[0], blocks[0].contiguous()
    table_TN = torch.zeros(sum(map(len, blocks)), max(block.shape[1] for block in blocks), dtype=torch.long)
    first = 0
    for block in blocks:
        table_TN[first : first + len(block), : block.shape[1]] = block
        first += len(block)
    return torch.cat(lengths), table_TN


def fits(layers: Sequence[Parts]) -> bool:
    """Whether these layers are of one shape and type, their products ours, and without biases but for the first."""
    shapes = {
        (*(joint.members[-1].end for joint in _joints(layer)), layer.qkv.members[0].end, layer.dim, layer.scale)
        for layer in layers
    }
    products = [joint.product for layer in layers for joint in _joints(layer)]
    types = {activations_of(product) if isinstance(product, Native) else None for product in products}
    return len(shapes) == len(types) == 1 and all(
        layer.o.bias is None
        and layer.gate_up.bias is None
        and layer.down.bias is None
        and all(
            isinstance(norm.fast, NativeNorm) and norm.fast.weight_F.dtype in types and norm.number is not None
            for norm in (layer.before, layer.behind)
        )
        for layer in layers
    )


def _joints(layer: Parts) -> tuple[Joint, Joint, Joint, Joint]:
    return layer.qkv, layer.o, layer.gate_up, layer.down
