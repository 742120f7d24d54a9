"""The demo as a client: questions over HTTP, streamed or not, many at once."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx

from trainer.errors import DemoFailed
from trainer.tasks import Row

AT_ONCE: Final = 16
TIMEOUT_S: Final = 120
MAX_TOKENS: Final = 64


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    adapters: tuple[Mapping[str, Any], ...]

    @property
    def digest(self) -> str:
        return str(self.adapters[0]["digest"]) if self.adapters else ""


class Client:
    """One server, asked greedily, so that every answer can be checked."""

    def __init__(self, url: str) -> None:
        self.url = url
        limits = httpx.Limits(max_connections=2 * AT_ONCE)
        self._http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits)
        self._places = asyncio.Semaphore(AT_ONCE)

    async def close(self) -> None:
        await self._http.aclose()

    async def ask(self, model: str, content: str) -> Answer:
        body = {**question(model, content), "return_token_ids": True}
        async with self._places:
            response = await self._http.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise DemoFailed(f"{model} answered {response.status_code}: {response.text[:300]}")
        said = response.json()
        choice = said["choices"][0]
        return Answer(
            choice["message"]["content"],
            tuple(said["prompt_token_ids"]),
            tuple(choice["token_ids"]),
            tuple(said["adapters"]),
        )

    async def stream(self, model: str, content: str, on_text: Callable[[str], None]) -> Answer:
        """Tell the text as it grows; the whole answer at the end. Raises DemoFailed when the stream breaks off."""
        text, adapters, ended = "", (), False
        body = {**question(model, content), "stream": True}
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise DemoFailed(f"{model} answered {response.status_code}")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    chunk = json.loads(line.removeprefix("data: "))
                    adapters = tuple(chunk.get("adapters", adapters))
                    text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                    on_text(text)
        if not ended:
            raise DemoFailed(f"a stream of {model} broke off")
        return Answer(text, (), (), adapters)

    async def answers(self, model: str, rows: Sequence[Row]) -> list[Answer]:
        return list(await asyncio.gather(*(self.ask(model, asked(row)) for row in rows)))

    async def metric(self, name: str) -> float:
        """The sum over the labels of one metric."""
        lines = (await self._http.get("/metrics")).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def question(model: str, content: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}


def asked(row: Row) -> str:
    return row["messages"][0]["content"]


def wanted(row: Row) -> str:
    return row["messages"][-1]["content"]


def exact_match(answers: Sequence[Answer], rows: Sequence[Row]) -> float:
    return sum(answer.text == wanted(row) for answer, row in zip(answers, rows, strict=True)) / len(rows)
