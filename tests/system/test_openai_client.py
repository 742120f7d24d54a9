"""The official `openai` client, unmodified and strict, against a real server with real adapters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.system.conftest import BASE, hub, serving

KEY = "user-key-of-the-tests"
HI: Any = [{"role": "user", "content": "Hello!"}]
# The same numbers by another way through the batch: prefill and decode round differently in float32.
LOGPROB_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory, random_adapter: Callable[[str, int], Path]) -> Iterator[str]:
    home = tmp_path_factory.mktemp("openai") / "home"
    for name, kind in (("team/bot", "lora"), ("soft", "prompt")):
        hub(home, "push", random_adapter(kind, 1), name, "--alias", "prod")
    with serving(home, env={"MULTIGRAFT_API_KEY": KEY}) as server:
        yield server.url


@pytest.fixture
def lax_client(server_url: str) -> Iterator[OpenAI]:
    """For completions: their types in the client know no null, though OpenAI sends it while a choice is unfinished and
    for the log-probability of a text's first token.
    """
    with OpenAI(base_url=f"{server_url}/v1", api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def client(server_url: str) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{server_url}/v1", api_key=KEY, max_retries=0, timeout=60, _strict_response_validation=True
    ) as made:
        yield made


def metric(url: str, name: str) -> float:
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.split()[-1])
    raise AssertionError(f"no metric {name}")


def wait_until_free(url: str, *, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while metric(url, "vllm:num_requests_running") or metric(url, "vllm:kv_cache_usage_perc"):
        assert time.monotonic() < deadline, "blocks are still held"
        time.sleep(0.02)


def test_a_chat_is_answered(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=BASE, messages=HI, temperature=0, max_tokens=40)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.model == BASE
    assert answer._request_id
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize(
    "model", [BASE, "team/bot", "team/bot@prod", "soft@1", f"{BASE}:team/bot", "team/bot*0.5+soft"]
)
def test_a_streamed_chat_says_what_the_whole_one_says(client: OpenAI, model: str) -> None:
    common: Any = {"model": model, "messages": HI, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**common)
    with client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == whole.choices[0].message.content
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    told: Any = chunks[0].model_extra
    assert told["adapters"] == (whole.model_extra or {})["adapters"]


def test_adapters_answer_differently_and_are_named(client: OpenAI) -> None:
    texts = {}
    for model in (BASE, "team/bot", "soft"):
        raw = client.chat.completions.with_raw_response.create(
            model=model, messages=HI, temperature=0, max_tokens=24, extra_body={"ignore_eos": True}
        )
        texts[raw.headers["x-multigraft-adapters"]] = raw.parse().choices[0].message.content
    assert set(texts) == {BASE, "team/bot@1", "soft@1"}
    assert len(set(texts.values())) == 3


def test_the_clients_stream_helper_accumulates(client: OpenAI) -> None:
    with client.chat.completions.stream(model=BASE, messages=HI, temperature=0, max_tokens=24) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    whole = client.chat.completions.create(model=BASE, messages=HI, temperature=0, max_tokens=24)
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_the_async_client_streams(server_url: str) -> None:
    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key=KEY, max_retries=0) as client:
            stream = await client.chat.completions.create(model=BASE, messages=HI, stream=True, max_tokens=8)
            return "".join([c.delta.content or "" async for chunk in stream for c in chunk.choices])

    assert asyncio.run(run())


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_seed_gives_the_same_whatever_else_is_in_the_batch(client: OpenAI, temperature: float) -> None:
    def ask(model: str, seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model=model, messages=HI, seed=seed, n=2, temperature=temperature, max_tokens=16
        )
        return [choice.message.content for choice in answer.choices]

    alone = ask("team/bot", 7)
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(ask, model, seed) for seed in range(3) for model in (BASE, "soft")]
        crowded = pool.submit(ask, "team/bot", 7).result()
        for other in others:
            other.result()
    assert crowded == alone
    if temperature:
        assert alone[0] != alone[1], "choices have seeds of their own"


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    free = client.chat.completions.create(model=BASE, messages=HI, temperature=0, max_tokens=24)
    text = free.choices[0].message.content or ""
    stop = text[2:5]
    assert len(stop) == 3, "a short answer proves nothing"
    stopped = client.chat.completions.create(model=BASE, messages=HI, temperature=0, max_tokens=24, stop=[stop, "zzz"])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    with client.chat.completions.create(
        model=BASE, messages=HI, temperature=0, max_tokens=24, stop=stop, stream=True
    ) as stream:
        streamed = "".join(c.delta.content or "" for chunk in stream for c in chunk.choices)
    assert streamed == stopped.choices[0].message.content


def test_logprobs_are_of_the_tokens_that_make_the_text(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=BASE, messages=HI, temperature=0, max_tokens=8, logprobs=True, top_logprobs=5
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None and choice.logprobs.content
    joined = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert joined.decode() == choice.message.content
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 5
        ranked = [rival.logprob for rival in entry.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the best"
        assert entry.logprob == pytest.approx(ranked[0])


def test_scoring_a_text_gives_the_logprobs_of_writing_it(lax_client: OpenAI) -> None:
    prompt = "The garden is"
    written = lax_client.completions.create(
        model="team/bot", prompt=prompt, temperature=0, max_tokens=12, logprobs=1, extra_body={"return_token_ids": True}
    ).choices[0]
    extra: Any = written.model_extra
    ids = [*extra["prompt_token_ids"], *extra["token_ids"]]
    scored = lax_client.completions.create(model="team/bot", prompt=ids, echo=True, max_tokens=0, logprobs=1).choices[0]
    assert scored.text == prompt + written.text
    assert scored.logprobs is not None and written.logprobs is not None
    assert scored.logprobs.token_logprobs is not None and written.logprobs.token_logprobs is not None
    assert scored.logprobs.token_logprobs[0] is None
    tail = scored.logprobs.token_logprobs[len(extra["prompt_token_ids"]) :]
    assert tail == pytest.approx(written.logprobs.token_logprobs, abs=LOGPROB_TOLERANCE)


def test_completions_take_several_prompts_and_choices_streamed_or_not(lax_client: OpenAI) -> None:
    common: Any = {"model": BASE, "prompt": ["The garden", "One tree"], "n": 2, "seed": 3, "max_tokens": 8}
    whole = lax_client.completions.create(**common)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    with lax_client.completions.create(**common, stream=True) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_a_prompt_that_comes_again_is_cached(client: OpenAI) -> None:
    ids = list(range(100, 164))
    for _ in range(2):
        answer = client.completions.create(model="team/bot", prompt=ids, max_tokens=2)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= 32


def test_models_are_listed_and_found(client: OpenAI) -> None:
    listed = [model.id for model in client.models.list()]
    assert listed[0] == BASE
    assert {"team/bot", "soft"} <= set(listed)
    assert client.models.retrieve("team/bot@prod").id == "team/bot@prod"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_errors_arrive_as_the_clients_own_classes(client: OpenAI, server_url: str) -> None:
    create: Callable[..., Any] = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="nobody", messages=HI)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        create(model=BASE, messages=HI, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "tools")
    with pytest.raises(openai.BadRequestError) as unknown:
        create(model=BASE, messages=HI, extra_body={"temprature": 1})
    assert unknown.value.code == "unknown_parameter"
    with pytest.raises(openai.BadRequestError) as long:
        create(model=BASE, messages=[{"role": "user", "content": "garden " * 20_000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as ranged:
        create(model=BASE, messages=HI, temperature=5, stream=True)
    assert (ranged.value.code, ranged.value.param) == ("invalid_value", "temperature")
    with (
        OpenAI(base_url=f"{server_url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_clients_that_leave_free_their_blocks(client: OpenAI, server_url: str) -> None:
    def begin(model: str) -> Any:
        stream = client.chat.completions.create(
            model=model, messages=HI, stream=True, max_tokens=900, extra_body={"ignore_eos": True}
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                return stream
        raise AssertionError("the stream ended")

    streams = [begin("team/bot"), begin("soft")]
    deadline = time.monotonic() + 5
    while metric(server_url, "vllm:num_requests_running") < 2:
        assert time.monotonic() < deadline
    assert metric(server_url, "vllm:kv_cache_usage_perc") > 0
    for stream in streams:
        stream.close()
    wait_until_free(server_url)
    assert client.chat.completions.create(model="team/bot", messages=HI, max_tokens=4).choices
