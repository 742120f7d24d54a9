"""All bodies together under a budget, whatever becomes of each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from starlette.types import Message

from hub.errors import BadRequest, HubUnavailable, TooLarge
from hub.http.bodies import HELD_OF_A_PIECE, Bodies

SOON_S = 0.05


class Arriving:
    """A client that sends these pieces, and then only says that it is there."""

    def __init__(self, *pieces: bytes, ends: bool = True) -> None:
        self._pieces: Sequence[bytes] = pieces
        self._ends = ends

    async def receive(self) -> Message:
        if not self._pieces:
            await asyncio.Event().wait()
        piece, *self._pieces = self._pieces
        return {"type": "http.request", "body": piece, "more_body": bool(self._pieces) or not self._ends}


def read(bodies: Bodies, client: Arriving, *, limit: int | None, meanwhile: bool = False) -> int:
    """Read a body to its end; `meanwhile` another one of 3 bytes is read before the first is let go."""

    async def reading() -> int:
        count = 0
        with bodies.arriving(client.receive, limit=limit) as receive:
            more = True
            while more:
                message = await receive()
                count += len(message["body"])
                more = message["more_body"]
            if meanwhile:
                with bodies.arriving(Arriving(b"123").receive, limit=3) as other:
                    await other()
        return count

    return asyncio.run(reading())


@pytest.fixture
def counted() -> list[int]:
    return []


@pytest.fixture
def bodies(counted: list[int]) -> Bodies:
    return Bodies(timeout_s=SOON_S, count=counted.append, budget=10)


def test_a_body_within_its_limit_arrives_and_is_counted(bodies: Bodies, counted: list[int]) -> None:
    assert read(bodies, Arriving(b"123", b"", b"45"), limit=5) == 5
    assert sum(counted) == 5


def test_a_body_above_its_limit_is_refused_as_soon_as_it_is(bodies: Bodies) -> None:
    with pytest.raises(TooLarge, match="above the limit of 4 bytes"):
        read(bodies, Arriving(b"123", b"45", b"never read"), limit=4)


def test_what_all_hold_is_let_go_with_each_answer_and_each_refusal(bodies: Bodies) -> None:
    for _ in range(5):
        assert read(bodies, Arriving(b"12345678"), limit=10) == 8
        with pytest.raises(TooLarge):
            read(bodies, Arriving(b"12345678"), limit=7)
        with pytest.raises(BadRequest, match=r"nothing more of the body arrived within 0\.05 s"):
            read(bodies, Arriving(b"12345678", ends=False), limit=10)
        with pytest.raises(HubUnavailable):
            read(bodies, Arriving(b"12345678", b"901"), limit=20)


def test_a_body_that_would_be_too_much_beside_the_others_is_put_off(bodies: Bodies) -> None:
    assert read(bodies, Arriving(b"1234567"), limit=10, meanwhile=True) == 7
    with pytest.raises(HubUnavailable, match="more than 10 bytes now; try again"):
        read(bodies, Arriving(b"12345678"), limit=10, meanwhile=True)
    assert read(bodies, Arriving(b"1234567890"), limit=10) == 10


def test_a_piece_of_an_upload_holds_no_more_than_its_buffer(counted: list[int]) -> None:
    bodies = Bodies(timeout_s=SOON_S, count=counted.append, budget=HELD_OF_A_PIECE + 3)
    pieces = [b"x" * HELD_OF_A_PIECE] * 5
    assert read(bodies, Arriving(*pieces), limit=None, meanwhile=True) == 5 * HELD_OF_A_PIECE
    with pytest.raises(HubUnavailable):
        read(Bodies(timeout_s=SOON_S, count=counted.append, budget=HELD_OF_A_PIECE), Arriving(*pieces), limit=None,
             meanwhile=True)  # fmt: skip
