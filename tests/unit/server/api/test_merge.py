from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from server.api.merge import merge


async def count(to: int, *, ended: list[int], fail_at: int | None = None) -> AsyncIterator[int]:
    try:
        for number in range(to):
            await asyncio.sleep(0)
            if number == fail_at:
                raise ValueError(number)
            yield number
    finally:
        ended.append(to)


@pytest.mark.parametrize("sizes", [[3], [2, 5, 0, 1]])
def test_every_item_of_every_source_comes_once_and_in_its_order(sizes: list[int]) -> None:
    async def run() -> list[tuple[int, int]]:
        ended: list[int] = []
        found = [item async for item in merge([count(size, ended=ended) for size in sizes])]
        assert sorted(ended) == sorted(sizes)
        return found

    found = asyncio.run(run())
    for index, size in enumerate(sizes):
        assert [number for source, number in found if source == index] == list(range(size))


def test_the_first_error_ends_all_sources() -> None:
    async def run() -> list[int]:
        ended: list[int] = []
        with pytest.raises(ValueError, match="1"):
            async for _ in merge([count(1000, ended=ended), count(5, ended=ended, fail_at=1)]):
                pass
        return list(ended)  # as it is now: the end of the loop would end the rest

    assert sorted(asyncio.run(run())) == [5, 1000]


def test_who_stops_listening_ends_all_sources() -> None:
    async def run() -> list[int]:
        ended: list[int] = []
        merged = merge([count(1000, ended=ended), count(2000, ended=ended)])
        await anext(merged)
        await merged.aclose()
        return list(ended)

    assert sorted(asyncio.run(run())) == [1000, 2000]
