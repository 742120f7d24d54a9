"""The engine thread with real adapters: whoever shares a batch, whatever runs out, each request gets its own text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hub.registry import LocalHub
from server.engine.pack import Packed
from server.errors import AdapterIncompatible, AdapterUnavailable, EngineFailed, InvalidValue, PromptTooLong, QueueFull
from server.records import Failed, PromptScored, Sampled, Sampling
from tests.unit.server.conftest import all_events, collect, set_tensor

PROMPT = [5, 9, 2, 7, 7, 3, 11, 4, 8]


def test_greedy_text_is_that_of_transformers(rig: Any, run: Any, base: Path) -> None:
    async def work() -> list[int]:
        async with rig() as server:
            tokens, _ = await server.ask(PROMPT, new=12)
            return tokens

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
    assert run(work()) == out[0, len(PROMPT) :].tolist()


def test_text_does_not_depend_on_the_company_or_on_the_chunks(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    for kind in ("lora", "ia3", "prefix", "prompt"):
        hub.push(adapter(kind, 1), kind)
    mixtures: list[tuple[tuple[str, float], ...]] = [
        (),
        (("lora", 1.0),),
        (("ia3", 1.0),),
        (("prefix", 1.0),),
        (("prompt", 1.0),),
        (("lora", 0.5), ("ia3", -0.7)),
        (("prefix", 1.0), ("lora", 0.4)),
    ]
    warm = Sampling(temperature=1.2, top_p=0.9, seed=11)

    async def work() -> None:
        async with rig(prefix_cache=False) as server:
            alone = [(await server.ask(PROMPT, *terms, sampling=warm))[0] for terms in mixtures]
        assert len(set(map(tuple, alone))) == len(alone), "two mixtures answer alike"
        async with rig(prefix_cache=False, max_batch_tokens=7) as server:
            streams = [await server.submit(PROMPT, *terms, sampling=warm) for terms in mixtures * 2]
            together = [tokens for tokens, _ in await asyncio.gather(*map(collect, streams))]
        assert together == alone * 2

    run(work())


def test_preempted_requests_go_on_with_the_same_text(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("prefix", 1), "prefix")
    sampling = Sampling(temperature=1.0, seed=3, repetition_penalty=1.1)
    block = 4 * 3 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, dimension, bytes

    async def work() -> None:
        async with rig() as server:
            alone = [
                (await server.ask(PROMPT[place:], *terms, new=40, sampling=sampling))[0]
                for place, terms in enumerate([(), (("prefix", 1.0),), ()])
            ]
        async with rig(kv_bytes=20 * block, max_model_len=64) as server:
            planned = _count_preemptions(server)
            streams = [
                await server.submit(PROMPT[place:], *terms, new=40, sampling=sampling)
                for place, terms in enumerate([(), (("prefix", 1.0),), ()])
            ]
            tight = [tokens for tokens, _ in await asyncio.gather(*map(collect, streams))]
            assert planned["preempted"] > 0, "nothing was preempted: the test proves nothing"
        assert tight == alone

    run(work())


def _count_preemptions(server: Any) -> dict[str, int]:
    """Count through the scheduler's own method; it still does its work."""
    seen = {"preempted": 0}
    scheduler = server.engine._scheduler
    preempt = scheduler._preempt

    def counting(*arguments: Any) -> None:
        seen["preempted"] += 1
        preempt(*arguments)

    scheduler._preempt = counting
    return seen


def test_a_reload_under_the_same_name_never_sees_the_old_versions_kv(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    long = PROMPT * 4

    async def work() -> None:
        hub.push(adapter("lora", 1), "bot")
        async with rig(watch=True) as server:
            await server.ask(long, ("bot", 1.0))
            _, again = await server.ask(long, ("bot", 1.0))
            assert again.cached_tokens == 32, "the prefix cache did not hit: the test proves nothing"
            first_token = (await all_events(await server.submit(long, ("bot", 1.0))))[0]
            assert isinstance(first_token, Sampled)
            assert first_token.cached_tokens == 32, "an answer that a stop string ends has only this to go by"
            hub.push(adapter("lora", 2), "bot")
            while (await server.store.acquire([("bot", 1.0)])).mixture.terms[0].version == 1:
                await asyncio.sleep(0.01)
            swapped, first = await server.ask(long, ("bot", 1.0))
            assert first.cached_tokens == 0
        async with rig() as cold:
            expected, _ = await cold.ask(long, ("bot@2", 1.0))
        assert swapped == expected

    run(work())


def test_mixtures_with_other_weights_do_not_share_kv(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora", 1), "a")
    hub.push(adapter("lora", 2), "b")
    long = PROMPT * 4

    async def work() -> None:
        async with rig() as server:
            await server.ask(long, ("a", 0.5), ("b", 0.5))
            _, other = await server.ask(long, ("a", 0.6), ("b", 0.4))
            _, swapped = await server.ask(long, ("b", 0.5), ("a", 0.5))
            assert (other.cached_tokens, swapped.cached_tokens) == (0, 32)

    run(work())


def test_a_cancelled_request_gives_back_its_blocks_and_its_lease(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora", 1), "bot")

    async def work() -> None:
        async with rig() as server:
            stream = await server.submit(PROMPT, ("bot", 1.0), new=100)
            async for event in stream:
                assert isinstance(event, Sampled)
                break
            assert server.engine.snapshot().kv_blocks_used > 0
            stream.cancel()
            stream.cancel()
            while server.engine.snapshot().running or server.engine.open_requests:
                await asyncio.sleep(0.005)
            assert server.engine.snapshot().kv_blocks_used == 0
            assert server.store.resident()[0].leases == 0

    run(work())


def test_an_adapter_that_overflows_fails_alone(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    def blow_up(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(1e38)

    hub.push(set_tensor(adapter("lora", 1), tmp_path / "huge", blow_up), "huge")
    hub.push(adapter("lora", 1), "calm")

    async def work() -> None:
        async with rig() as server:
            expected = [(await server.ask(PROMPT, *terms, new=20))[0] for terms in ((), (("calm", 1.0),))]
        async with rig() as server:
            streams = [await server.submit(PROMPT, *terms, new=20) for terms in ((), (("calm", 1.0),))]
            for _ in range(5):
                with pytest.raises(AdapterUnavailable, match="huge@1 overflowed"):
                    await server.ask(PROMPT, ("huge", 1.0))
            assert [(await collect(stream))[0] for stream in streams] == expected
            assert (await server.ask(PROMPT * 3))[0], "reused blocks must not hold the overflow"

    run(work())


def test_weights_that_overflow_once_scaled_are_refused_before_they_share_a_batch(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    def edge(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(3e38)  # finite, but not after alpha / r = 2

    hub.push(set_tensor(adapter("lora", 1), tmp_path / "edge", edge), "edge")

    async def work() -> None:
        async with rig() as server:
            with pytest.raises(AdapterIncompatible, match=r"edge@1: a value of .* is no finite number"):
                await server.ask(PROMPT, ("edge", 1.0))

    run(work())


def test_an_error_in_a_step_ends_its_requests_and_not_the_engine(rig: Any, run: Any) -> None:
    async def work() -> None:
        async with rig() as server:
            draw = server.engine._draw

            def fail(packed: Packed, logits: torch.Tensor) -> dict[int, int]:
                server.engine._draw = draw
                raise RuntimeError("a bug of ours")

            server.engine._draw = fail
            events = await all_events(await server.submit(PROMPT))
            assert isinstance(events[-1], Failed)
            assert isinstance(events[-1].error, EngineFailed)
            assert server.engine.snapshot().kv_blocks_used == 0
            assert len((await server.ask(PROMPT))[0]) == 8

    run(work())


def test_prompt_scores_are_those_of_the_network_in_any_chunks(rig: Any, run: Any, base: Path) -> None:
    async def work() -> Any:
        async with rig(max_batch_tokens=4) as server:
            stream = await server.submit(PROMPT, new=2, prompt_logprobs=2, logprobs=1)
            return await all_events(stream)

    scored, first, *_ = run(work())
    assert isinstance(scored, PromptScored)
    assert isinstance(first, Sampled)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.inference_mode():
        logprobs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    assert [score.token_id for score in scored.scores] == PROMPT[1:]
    for place, score in enumerate(scored.scores):
        assert score.logprob == pytest.approx(logprobs[place, PROMPT[place + 1]].item(), abs=1e-4)
        assert score.top[0][0] == int(logprobs[place].argmax())
        assert len(score.top) == 2
    assert first.score is not None
    assert first.score.logprob == pytest.approx(logprobs[-1].max().item(), abs=1e-4)
    assert len(first.score.top) == 1


def test_limits_are_refused_with_the_value_and_the_limit(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("prompt", 1), "prompt")

    async def work() -> None:
        async with rig(max_model_len=40, max_running=1, max_waiting=1) as server:
            with pytest.raises(PromptTooLong, match=r"36 prompt tokens and 7 virtual .* are 44, .* is 40"):
                await server.ask(PROMPT * 4, ("prompt", 1.0), new=1)
            assert server.store.resident()[0].leases == 0
            with pytest.raises(InvalidValue, match="no tokens"):
                await server.ask([])
            streams = [await server.submit(PROMPT, new=30) for _ in range(2)]
            with pytest.raises(QueueFull, match="2 requests are open, the limit is 2"):
                await server.submit(PROMPT)
            for stream in streams:
                assert len((await collect(stream))[0]) == 30

    run(work())


def test_stop_tokens_end_the_text_without_being_part_of_it(rig: Any, run: Any) -> None:
    async def work() -> None:
        async with rig() as server:
            hot = Sampling(temperature=2.0, seed=5)
            whole, _ = await server.ask(PROMPT, new=10, sampling=hot)
            stop = next(token for place, token in enumerate(whole) if place > 2 and token not in whole[:place])
            cut, end = await server.ask(PROMPT, new=10, sampling=hot, stop_token_ids=frozenset({stop}))
            assert cut == whole[: whole.index(stop)]
            assert (end.reason, end.stop_token_id) == ("stop", stop)
            assert end.completion_tokens == len(cut) + 1

    run(work())
