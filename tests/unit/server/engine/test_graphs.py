"""The engine with its decode steps from slots and static buffers; on a CPU, where there are no graphs, in Triton's
interpreter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from hub.registry import LocalHub
from server.config import EngineConfig, ModelConfig, ServerConfig
from server.engine.loop import EngineLoop
from server.errors import StartupRefused
from server.main import build
from server.model.load import load_network
from server.model.network import Network
from tests.unit.server.conftest import collect

pytest.importorskip("triton", reason="triton has wheels for Linux on x86_64 only")

from server.engine.graphs import GraphRunner

PROMPT = [5, 9, 2, 7, 7, 3, 11, 4, 8]
Terms = tuple[tuple[str, float], ...]
MIXTURES: tuple[Terms, ...] = (
    (),
    (("lora", 1.0),),
    (("dora", 1.0),),
    (("lora", 0.5), ("ia3", -0.7)),
    (("prefix", 1.0),),
    (("oft", 1.0),),
)


@pytest.fixture
def network(base: Path) -> Network:
    """Its own: the slots stay in the Linears."""
    return load_network(ModelConfig(base="tiny", device="cpu"), base, name="tiny")


@pytest.fixture
def pushed(hub: LocalHub, adapter: Callable[..., Path]) -> LocalHub:
    for name in ("lora", "dora", "ia3", "prefix", "oft"):
        hub.push(adapter(name, 1), name)
    return hub


def runner_of(engine: EngineLoop) -> GraphRunner:
    assert engine._graphs is not None
    return engine._graphs


async def together(server: Any) -> list[list[int]]:
    streams = [await server.submit(PROMPT[place:], *terms, new=6) for place, terms in enumerate(MIXTURES)]
    return [tokens for tokens, _ in await asyncio.gather(*map(collect, streams))]


def _turned(replay: Callable[[], Tensor]) -> Tensor:
    return replay().roll(1, -1)


def test_every_request_has_the_text_of_the_plain_engine(rig: Any, run: Any, pushed: LocalHub) -> None:
    async def work(graphs: bool) -> list[list[int]]:
        async with rig(graphs=graphs, max_running=8, watch=True) as server:
            texts = await together(server)
            texts.append((await server.ask(PROMPT, ("lora", 1.0)))[0])
            if graphs:
                assert runner_of(server.engine).replays >= 7, "the last request decodes alone, all steps but its first"
            return texts

    plain = run(work(graphs=False))
    assert len(set(map(tuple, plain))) == len(plain), "two mixtures answer alike"
    assert run(work(graphs=True)) == plain


def test_a_new_version_takes_its_own_slot(rig: Any, run: Any, pushed: LocalHub, adapter: Callable[..., Path]) -> None:
    async def work(graphs: bool) -> list[list[int]]:
        async with rig(graphs=graphs, max_running=2) as server:
            first = (await server.ask(PROMPT, ("lora@1", 1.0)))[0]
            return [first, (await server.ask(PROMPT, ("lora@2", 1.0)))[0]]

    pushed.push(adapter("lora", 2), "lora")
    plain = run(work(graphs=False))
    assert plain[0] != plain[1]
    assert run(work(graphs=True)) == plain


def test_a_graph_that_differs_does_not_serve(
    rig: Any, run: Any, pushed: LocalHub, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil_graphs(runner: GraphRunner) -> None:
        for size, (step, replay) in runner._captured.items():
            runner._captured[size] = step, partial(_turned, replay)

    async def work(spoil: bool) -> list[int]:
        async with rig(graphs=True, max_running=2) as server:
            if spoil:
                spoil_graphs(runner_of(server.engine))
            tokens, _ = await server.ask(PROMPT, ("lora", 1.0))
            assert (runner_of(server.engine).replays == 0) is spoil
            return tokens

    right = run(work(spoil=False))
    with caplog.at_level(logging.ERROR):
        assert run(work(spoil=True)) == right
    assert "differs from the plain step" in caplog.text


def test_graphs_are_refused_without_a_gpu(hub: LocalHub) -> None:
    config = ServerConfig(ModelConfig(base="seedling", device="cpu"), EngineConfig(graphs=True))
    with pytest.raises(StartupRefused, match="--graphs needs a CUDA device, this server computes on cpu"):
        build(config, hub)
