"""Who waits for whom in the running engine: a rare adapter, a cold one, and whose KV is whose."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub.registry import LocalHub
from server.adapters.source import Artifact, Resolution
from server.engine.loop import queue_of
from server.errors import QueueFull
from server.records import AdapterTerm, GenerationRequest, Mixture, Routing, Sampled
from tests.unit.server.adapters.test_store import golden
from tests.unit.server.conftest import collect, set_tensor

PROMPT = [5, 9, 2, 7, 7, 3, 11, 4, 8]
LONG = 60  # new tokens of a request that is still running when the test looks


def test_a_rare_adapter_answers_while_a_flood_holds_every_place_and_nobodys_text_changes(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora", 1), "hot")
    hub.push(adapter("ia3", 1), "rare")
    prompts = [[*PROMPT, place] for place in range(4)]

    async def work() -> None:
        async with rig() as server:
            alone = [(await server.ask(prompt, ("hot", 1.0), new=LONG))[0] for prompt in prompts]
            alone_rare = (await server.ask(PROMPT, ("rare", 1.0)))[0]
        async with rig(max_running=2) as server:
            await server.store.warm("rare")
            streams = [await server.submit(prompt, ("hot", 1.0), new=LONG) for prompt in prompts]
            while server.engine.snapshot().running < 2:
                await asyncio.sleep(0.001)
            assert (await server.ask(PROMPT, ("rare", 1.0)))[0] == alone_rare
            assert server.engine.open_requests > len(prompts) - 2, "the flood was over: the test proves nothing"
            ends = await asyncio.gather(*map(collect, streams))
            assert [tokens for tokens, _ in ends] == alone
            assert {end.cached_tokens for _, end in ends} <= {0, 8}, "what a preempted one finds of its own is no hit"

    run(work())


def test_a_cold_adapter_loads_and_proves_itself_while_others_run_and_wait(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    hub.push(adapter("lora", 1), "hot")
    hub.push(adapter("ia3", 1), "warm")
    cold = set_tensor(adapter("lora", 2), tmp_path / "cold", lambda tensors: None)
    hub.push(golden(cold, base, spoil=0.0), "cold")
    fetching, go_on = threading.Event(), threading.Event()

    async def work() -> None:
        async with rig(max_running=2) as server:
            for name in ("hot", "warm"):
                await server.store.warm(name)
            fetch = server.store._source.fetch

            def slowly(resolution: Resolution) -> Artifact:
                fetching.set()
                assert go_on.wait(60)
                found: Artifact = fetch(resolution)
                return found

            server.store._source.fetch = slowly
            flood = [await server.submit([*PROMPT, place], ("hot", 1.0), new=LONG) for place in range(12)]
            asked = asyncio.create_task(server.ask(PROMPT, ("cold", 1.0), new=4))
            await asyncio.to_thread(fetching.wait, 60)
            assert len((await server.ask(PROMPT))[0]) == 8, "the base is served meanwhile"
            assert len((await server.ask(PROMPT, ("warm", 1.0)))[0]) == 8, "what is here is served meanwhile"
            assert not asked.done()
            go_on.set()
            assert len((await asked)[0]) == 4
            assert server.engine.snapshot().waiting > 0, "its golden row and its answer did not wait for the flood"
            for stream in flood:
                stream.cancel()

    try:
        run(work())
    finally:
        go_on.set()


def test_a_flood_leaves_places_in_the_queue_for_others(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora", 1), "rare")

    async def work() -> None:
        async with rig(max_running=1, max_waiting=31) as server:
            await server.store.warm("rare")
            streams = [await server.submit(PROMPT, new=LONG) for _ in range(30)]
            with pytest.raises(QueueFull, match="30 requests of one adapter are open, the limit is 30 of 32"):
                await server.submit(PROMPT)
            assert len((await server.ask(PROMPT, ("rare", 1.0)))[0]) == 8
            for stream in streams:
                stream.cancel()

    run(work())


@pytest.mark.parametrize("first", ["base", "one", "two"])
def test_what_comes_before_an_invocation_is_shared_by_the_base_and_all_that_are_invoked_later(
    first: str, rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("alora", 1), "one")
    hub.push(adapter("alora", 2), "two")
    prompt = [3, 9, 4, 11, 5, 6, 2, 8, 7, 1, 13]  # 7 invokes: two blocks stand before it
    terms = {"base": (), "one": (("one", 1.0),), "two": (("two", 0.5),), "both": (("one", 1.0), ("two", 1.0))}

    async def work() -> None:
        expected = {}
        for name, mixture in terms.items():
            async with rig() as cold:
                expected[name], _ = await cold.ask(prompt, *mixture)
        assert len(set(map(tuple, expected.values()))) == len(terms), "two of them answer alike"
        async with rig() as server:
            await server.ask(prompt, *terms[first])
            for name, mixture in terms.items():
                answer, end = await server.ask(prompt, *mixture)
                assert (answer, end.cached_tokens) == (expected[name], 8)

    run(work())


def test_an_invoked_adapter_goes_on_from_the_kv_of_the_bases_own_answer(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("alora", 1), "judge")

    async def work() -> None:
        async with rig() as server:
            answer, _ = await server.ask([3, 9, 4, 11, 5], new=12)
            talk = [3, 9, 4, 11, 5, *answer]
            calm = talk[: talk.index(7)] if 7 in talk else talk
            verdict, end = await server.ask([*calm, 7, 1], ("judge", 1.0))
            assert end.cached_tokens == min(len(calm), len(talk) - 1) // 4 * 4
        async with rig() as cold:
            assert (await cold.ask([*calm, 7, 1], ("judge", 1.0)))[0] == verdict

    run(work())


def test_mixtures_that_are_equal_once_combined_share_their_kv(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora", 1), "a")
    hub.push(adapter("lora", 1), "copy")
    hub.push(adapter("lora", 2), "b")
    hub.push(adapter("prompt", 1), "soft")
    same: list[tuple[tuple[str, float], ...]] = [
        (("a", 1.0),),
        (("a", 0.5), ("a@1", 0.5)),
        (("copy", 0.25), ("a", 0.75)),
        (("b", 0.0), ("a", 1.0)),
        (("a", 1.0), ("soft", 0.0)),
    ]
    bare: list[tuple[tuple[str, float], ...]] = [(), (("b", 0.0),), (("a", 0.5), ("a@1", -0.5))]

    async def work() -> None:
        for group in (same, bare):
            async with rig() as server:
                found = [await server.ask(PROMPT, *terms) for terms in group]
                assert [tokens for tokens, _ in found] == [found[0][0]] * len(group)
                assert [end.cached_tokens for _, end in found] == [0, *[8] * (len(group) - 1)]
        async with rig() as server:
            await server.ask(PROMPT)
            _, behind = await server.ask(PROMPT, ("soft", 1.0))
            assert behind.cached_tokens == 0, "what stands behind a soft prompt has seen it"

    run(work())


def test_a_queue_is_what_an_adapter_is_called_whatever_its_version_and_weight() -> None:
    def queue(*terms: AdapterTerm, routing: Routing | None = None, probe: bool = False) -> str:
        mixture = Mixture(terms, routing)
        return queue_of(GenerationRequest("r", (1,), mixture, 1, keep_logits=probe))

    def term(name: str, version: int = 1, weight: float = 1.0) -> AdapterTerm:
        return AdapterTerm(name, name, version, f"sha256:{version}", "lora", weight)

    assert queue() == ""
    assert queue(term("a", 1)) == queue(term("a", 2, 0.5)) == "a"
    assert queue(term("b"), term("a", 1, 0.1)) == queue(term("a"), term("b")) == "a+b"
    assert queue(routing=Routing("arrow", (term("y"), term("x")), 1, 1.0)) == "x+y"
    assert queue(term("router"), routing=Routing("gate", (term("x"),), 1, 1.0)) == "router"
    assert queue(probe=True) not in ("", "a")


def test_shares_follow_the_first_pattern_that_fits(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora", 1), "team/bot")
    hub.push(adapter("lora", 2), "tone")

    async def work() -> None:
        async with rig(shares=(("team/*", 4.0), ("*o*", 2.0))) as server:
            streams = {name: await server.submit(PROMPT, (name, 1.0), new=LONG) for name in ("team/bot", "tone")}
            streams["base"] = await server.submit(PROMPT, new=LONG)
            for stream in streams.values():
                async for event in stream:
                    assert isinstance(event, Sampled)
                    break
            weights = {one.request.mixture.terms: one.sequence.weight for one in server.engine._live.values()}
            assert {terms[0].name if terms else "": weight for terms, weight in weights.items()} == {
                "team/bot": 4.0,
                "tone": 2.0,
                "": 1.0,
            }
            for stream in streams.values():
                stream.cancel()

    run(work())
