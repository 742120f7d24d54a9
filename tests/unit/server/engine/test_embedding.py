"""A prompt embedded in the running batch equals transformers' own hidden states, whatever the chunks and neighbours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hub.centroids import embedding_layer
from hub.registry import LocalHub
from server.records import Finished
from tests.unit.server.conftest import collect

PROMPT = [5, 9, 2, 7, 7, 3, 11, 4, 8, 1, 6, 2, 9, 9, 3, 5, 4, 7, 12, 30, 31]
ROUNDING = 1e-5  # fp32, summed in another order


async def embedding(server: Any, prompt: list[int]) -> tuple[float, ...]:
    _, finished = await server.ask(prompt, new=0, embed=True)
    assert isinstance(finished, Finished) and finished.embedding is not None
    return finished.embedding


def expected(base: Path, prompt: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.inference_mode():
        states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    return states[embedding_layer(model.config.num_hidden_layers)][0].mean(0)


def test_an_embedding_is_the_mean_of_the_middle_hidden_states(
    rig: Any, run: Any, base: Path, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora", 1), "lora")

    async def work() -> list[tuple[float, ...]]:
        async with rig(max_batch_tokens=8) as server:
            beside = [await server.submit(PROMPT, ("lora", 1.0), new=9) for _ in range(3)]
            found = await asyncio.gather(embedding(server, PROMPT), embedding(server, PROMPT[:5]))
            await asyncio.gather(*map(collect, beside))
            return list(found)

    for found, prompt in zip(run(work()), (PROMPT, PROMPT[:5]), strict=True):
        assert (torch.tensor(found) - expected(base, prompt)).abs().max() < ROUNDING


def test_neighbours_of_an_embedding_answer_as_they_do_alone(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora", 1), "lora")

    async def work() -> None:
        async with rig(prefix_cache=False) as server:
            alone = await server.ask(PROMPT, ("lora", 1.0), keep_logits=True, new=0)
            stream = await server.submit(PROMPT, ("lora", 1.0), keep_logits=True, new=0)
            beside, _ = await asyncio.gather(collect(stream), embedding(server, PROMPT))
        near, own = (torch.frombuffer(bytearray(one[1].logits or b""), dtype=torch.float32) for one in (beside, alone))
        assert (near - own).abs().max() < ROUNDING * own.abs().max()

    run(work())


def test_the_base_finds_the_prompt_computed_and_an_embedding_never_reads_the_cache(rig: Any, run: Any) -> None:
    async def work() -> None:
        async with rig() as server:
            first = await embedding(server, PROMPT)
            _, finished = await server.ask(PROMPT, new=2)
            assert finished.cached_tokens == len(PROMPT) // 4 * 4
            assert await embedding(server, PROMPT) == first
        async with rig(prefix_cache=False) as server:
            assert await embedding(server, PROMPT) == first
            assert (await server.ask(PROMPT, new=2))[1].cached_tokens == 0

    run(work())


def test_an_adapter_does_not_find_the_bases_blocks(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path]
) -> None:
    hub.push(adapter("lora", 1), "lora")

    async def work() -> None:
        async with rig() as server:
            await embedding(server, PROMPT)
            assert (await server.ask(PROMPT, ("lora", 1.0), new=2))[1].cached_tokens == 0

    run(work())


def test_an_embedding_that_gave_its_blocks_up_begins_again(rig: Any, run: Any, base: Path) -> None:
    async def work() -> list[tuple[float, ...]]:
        # 128 tokens of context in 4-token blocks; room for one long request and not for the growth of all
        async with rig(kv_bytes=32 * 4 * 3 * 2 * 16 * 4 + 1, max_batch_tokens=6) as server:
            others = [await server.submit(PROMPT[:9], new=60, ignore_eos=True) for _ in range(3)]
            found = [embedding(server, PROMPT * 3) for _ in range(3)]
            done = await asyncio.gather(*found)
            await asyncio.gather(*map(collect, others))
            return done

    for found in run(work()):
        assert (torch.tensor(found) - expected(base, PROMPT * 3)).abs().max() < ROUNDING
