"""The paged KV cache, laid out by KV head: grouped-query attention is what it is counted in.

One pair of tensors per layer, (KH, N * S, D): KH KV heads, N blocks of S tokens, D head dimension. A KV head's blocks
are contiguous, so that the rows of a sequence are gathered for all its query heads at once, and a head is what a later
split over devices would cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from server.primitives.prefix import LayerShape, Prefix


class KvCache:
    def __init__(
        self, layers: Sequence[LayerShape], *, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size
        shapes = [(layer.kv_heads, blocks * block_size, layer.head_dim) for layer in layers]
        # Layers of one shape lie in one tensor, so that blocks are blanked in all of them at once.
        self._stores = {
            shape: torch.zeros(2 * count, *shape, dtype=dtype, device=device)
            for shape, count in Counter(shapes).items()
        }
        parts = {shape: iter(store.unbind()) for shape, store in self._stores.items()}
        self.keys = [next(parts[shape]) for shape in shapes]
        self.values = [next(parts[shape]) for shape in shapes]

    def write(self, layer: int, rows_T: Tensor, keys_KTD: Tensor, values_KTD: Tensor) -> None:
        self.keys[layer].index_copy_(1, rows_T, keys_KTD)
        self.values[layer].index_copy_(1, rows_T, values_KTD)

    def gather(self, layer: int, blocks_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of B sequences of N blocks each: (KH, B, N * S, D)."""
        return self._gather(self.keys[layer], blocks_BN), self._gather(self.values[layer], blocks_BN)

    def clear(self, blocks: Sequence[int]) -> None:
        """Blank reused blocks: a non-finite value left by their last owner would survive masking (0 * inf)."""
        if not blocks:
            return
        index = torch.tensor(sorted(set(blocks)), device=self.keys[0].device)
        for store in self._stores.values():
            store.view(len(store) * store.shape[1], self.blocks, -1).index_fill_(1, index, 0)

    def load(self, prefix: Prefix, positions: tuple[int, int], rows: Sequence[int]) -> None:
        """Copy the virtual positions start..stop-1 of a prefix to the given rows."""
        start, stop = positions
        index = torch.tensor(rows, device=self.keys[0].device)
        for layer in range(len(self.keys)):
            self.write(layer, index, prefix.keys[layer][:, start:stop], prefix.values[layer][:, start:stop])

    def read(self, rows: Sequence[int]) -> Prefix:
        """What stands in the given rows, as a prefix of its own."""
        index = torch.tensor(rows, device=self.keys[0].device)
        return Prefix(
            tuple(keys.index_select(1, index) for keys in self.keys),
            tuple(values.index_select(1, index) for values in self.values),
        )

    def _gather(self, store: Tensor, blocks_BN: Tensor) -> Tensor:
        sequences, count = blocks_BN.shape
        heads, _, head_dim = store.shape
        paged = store.view(heads, self.blocks, self.block_size * head_dim)
        picked = paged.index_select(1, blocks_BN.reshape(-1))
        return picked.view(heads, sequences, count * self.block_size, head_dim)


def block_bytes(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return sum(2 * s.kv_heads * s.head_dim for s in layers) * block_size * dtype.itemsize
