"""The KV cache: blocks are blanked in every layer, whatever its shape, and no other."""

from __future__ import annotations

import torch

from server.model.kv import KvCache
from server.primitives.prefix import LayerShape


def test_given_blocks_are_blank_in_every_layer_and_others_as_they_were() -> None:
    layers = [LayerShape(2, 16), LayerShape(1, 8), LayerShape(2, 16)]
    cache = KvCache(layers, blocks=5, block_size=4, dtype=torch.float32, device=torch.device("cpu"))
    for number, store in enumerate((*cache.keys, *cache.values)):
        assert store.is_contiguous() and not store.any()
        store.fill_(torch.nan if number % 2 else number + 1)
    cache.clear([4, 1, 4])
    for number, (shape, store) in enumerate(zip(2 * layers, (*cache.keys, *cache.values), strict=True)):
        assert store.shape == (shape.kv_heads, 20, shape.head_dim)
        blocks = store.view(shape.kv_heads, 5, -1)
        assert (blocks[:, [1, 4]] == 0).all()
        rest = blocks[:, [0, 2, 3]]
        assert rest.isnan().all() if number % 2 else (rest == number + 1).all()
