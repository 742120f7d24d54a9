"""What must hold of prefixes: those of a mixture stand in the order written, however they are cut into chunks."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.model.kv import KvCache
from server.primitives.prefix import LayerShape, Prefix

LAYERS = (LayerShape(2, 3), LayerShape(1, 4))
BLOCK = 4
SETTINGS = settings(max_examples=60, deadline=None)

seeds = st.integers(0, 2**31)
lengths = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def some_prefix(rng: torch.Generator, length: int) -> Prefix:
    made = [
        tuple(torch.randn(shape.kv_heads, length, shape.head_dim, generator=rng) for shape in LAYERS) for _ in range(2)
    ]
    return Prefix(*made)


@given(seeds, lengths, st.integers(1, 6))
@SETTINGS
def test_the_tokens_of_several_prefixes_stand_in_the_order_written(seed: int, sizes: list[int], chunk: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    prefixes = [some_prefix(rng, size) for size in sizes]
    joined = prefixes[0]
    for following in prefixes[1:]:
        joined = joined.then(following)
    total = sum(sizes)
    assert joined.length == total
    assert joined.bytes == sum(one.bytes for one in prefixes)
    cache = KvCache(LAYERS, blocks=8, block_size=BLOCK, dtype=torch.float32, device=torch.device("cpu"))
    rows = torch.randperm(8 * BLOCK, generator=rng)[:total].tolist()
    for start in range(0, total, chunk):
        stop = min(start + chunk, total)
        cache.load(joined, (start, stop), rows[start:stop])
    origin = [(one, place) for one, size in zip(prefixes, sizes, strict=True) for place in range(size)]
    for row, (one, place) in zip(rows, origin, strict=True):
        for layer in range(len(LAYERS)):
            assert torch.equal(cache.keys[layer][:, row], one.keys[layer][:, place])
            assert torch.equal(cache.values[layer][:, row], one.values[layer][:, place])
