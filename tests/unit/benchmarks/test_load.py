"""The client and the popularity of adapters, against a server of a few lines."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from benchmarks.bases import BYTES, VOCABULARY
from benchmarks.engines.openai_dialect import OpenAI
from benchmarks.load import POPULARITY, Client, Load, LoadFailed, percentile, prompts

LOAD = Load(requests=5, prompt=7, new=3, at_once=2)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pieces: int) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
    for number in range(pieces):
        writer.write(b'data: {"choices":[{"index":0,"text":"t%d"}]}\n\n' % number)
        await writer.drain()
    writer.write(b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\ndata: [DONE]\n\n' % pieces)
    await writer.drain()
    writer.close()


async def _run(pieces: int) -> list[int]:
    server = await asyncio.start_server(lambda reader, writer: _answer(reader, writer, pieces), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        client = Client(f"http://127.0.0.1:{port}", OpenAI("base", ["a0"]))
        answers = await client.run(LOAD, [None, 0, None, 0, None], seed=1)
    return [len(answer.arrivals) for answer in answers]


def test_every_piece_of_a_stream_is_timed() -> None:
    assert asyncio.run(_run(LOAD.new)) == [LOAD.new] * LOAD.requests


def test_an_answer_that_is_too_short_has_failed() -> None:
    with pytest.raises(LoadFailed, match="asked for 3 tokens, got 2"):
        asyncio.run(_run(LOAD.new - 1))


def test_prompts_are_new_each_round_and_hold_whole_texts_only() -> None:
    assert prompts(LOAD, 1) == prompts(LOAD, 1) != prompts(LOAD, 2)
    assert all(BYTES <= token < VOCABULARY - 1 for prompt in prompts(LOAD, 1) for token in prompt)


@pytest.mark.parametrize("how", POPULARITY)
def test_each_popularity_asks_for_adapters_that_there_are(how: str) -> None:
    asked = POPULARITY[how](200, 8, 1)
    assert len(asked) == 200
    assert set(asked) <= set(range(8))


def test_zipf_asks_for_the_first_most_and_distinct_for_all_alike() -> None:
    assert Counter(POPULARITY["zipf"](2000, 100, 1)).most_common(1)[0][0] == 0
    assert set(Counter(POPULARITY["distinct"](200, 8, 1)).values()) == {25}
    assert set(POPULARITY["identical"](10, 8, 1)) == {0}


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(number) for number in range(100)]
    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile([3.0], 99) == 3
