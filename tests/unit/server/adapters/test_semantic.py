"""Which adapter a prompt chooses: centroids made by hand, a real hub and store, an embedding that a test sets."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hub.base import describe_base
from hub.registry import LocalHub
from server.errors import AdapterIncompatible, InvalidValue, ModelNotFound
from server.records import PromptChoice
from tests.unit.server.conftest import Rig

WIDTH = 32
THRESHOLD = 0.5
Push = Callable[..., str]


def axis(place: int, *, tilt: float = 0.0) -> list[float]:
    """A unit vector along one axis, or leaning from it to the last one."""
    vector = torch.zeros(WIDTH)
    vector[place], vector[-1] = 1.0, tilt
    return (vector / vector.norm()).tolist()


@pytest.fixture
def push(hub: LocalHub, base: Path, adapter: Callable[..., Path], tmp_path: Path) -> Push:
    """Push a LoRA under a name with the given centroids; the digest."""
    made = iter(range(1000))

    def one(name: str, *centroids: list[float], kind: str = "lora", threshold: float = THRESHOLD, seed: int = 1) -> str:
        folder = tmp_path / f"adapter-{next(made)}"
        shutil.copytree(adapter(kind, seed), folder)
        if centroids:
            about = describe_base(base)
            tensors = {"mean": torch.zeros(WIDTH), "scale": torch.ones(WIDTH), "centroids": torch.tensor(centroids)}
            safetensors.torch.save_file(tensors, folder / "centroids.safetensors")
            said = {
                "schema_version": 1,
                "base": about.fingerprint,
                "layer": about.layers // 2,
                "pooling": "mean",
                "prompts": 8,
                "centroids": len(centroids),
                "threshold": threshold,
            }
            (folder / "centroids.json").write_text(json.dumps(said))
        return hub.push(folder, name).digest

    return one


async def choose(server: Rig, embedding: Sequence[float], *candidates: str) -> PromptChoice:
    async def embed() -> Sequence[float]:
        return embedding

    return await server.store.nearest(candidates, embed)


def test_the_nearest_is_chosen_and_only_its_weights_are_loaded(rig: Any, run: Any, push: Push) -> None:
    push("north", axis(0), axis(1))
    push("south", axis(2))
    push("silent")

    async def work() -> None:
        async with rig() as server:
            choice = await choose(server, axis(1, tilt=0.1))
            assert choice.chosen == "north" and choice.threshold == THRESHOLD
            assert choice.score == pytest.approx(1 / (1 + 0.1**2) ** 0.5)
            assert [ref for ref, _ in choice.nearest] == ["north", "south"]
            assert [one.name for one in server.store.resident()] == ["north"]
            assert (await choose(server, axis(2))).chosen == "south"

    run(work())


def test_below_its_threshold_the_base_answers(rig: Any, run: Any, push: Push) -> None:
    push("north", axis(0))

    async def work() -> None:
        async with rig() as server:
            choice = await choose(server, axis(0, tilt=3.0))
            assert choice.chosen is None and choice.score == pytest.approx(0.1**0.5)
            assert "below its threshold" in choice.reason
        async with rig(auto_threshold=-0.3) as server:
            assert (await choose(server, axis(0, tilt=3.0))).chosen == "north"
        async with rig(auto_threshold=0.45) as server:
            assert (await choose(server, axis(0, tilt=1.0))).chosen is None

    run(work())


def test_each_adapter_has_its_own_threshold(rig: Any, run: Any, push: Push) -> None:
    push("strict", axis(0), threshold=0.99)
    push("mild", axis(1), threshold=0.1)
    between = (torch.tensor(axis(0)) * 0.9 + torch.tensor(axis(1)) * 0.4).tolist()

    async def work() -> None:
        async with rig() as server:
            choice = await choose(server, between)
            assert choice.chosen == "mild" and choice.nearest[0][0] == "strict"

    run(work())


def test_nobody_to_choose_from_costs_no_pass_through_the_base(rig: Any, run: Any, push: Push) -> None:
    push("silent")

    async def never() -> Sequence[float]:
        raise AssertionError("nothing is to be compared")

    async def work() -> None:
        async with rig() as server:
            assert not await server.store.routable()
            choice = await server.store.nearest((), never)
            assert choice.chosen is None and choice.score is None and "no adapter here" in choice.reason

    run(work())


def test_candidates_that_cannot_be_compared_are_refused_before_the_pass(rig: Any, run: Any, push: Push) -> None:
    push("north", axis(0))
    push("silent")

    async def never() -> Sequence[float]:
        raise AssertionError("the request is refused first")

    async def work() -> None:
        async with rig() as server:
            with pytest.raises(InvalidValue, match=r"silent \(silent@1\) has no centroids") as caught:
                await server.store.nearest(("north", "silent"), never)
            assert caught.value.param == "routing.candidates"
            with pytest.raises(ModelNotFound):
                await server.store.nearest(("north", "nobody"), never)

    run(work())


def test_candidates_may_be_versions_and_given_names(rig: Any, run: Any, push: Push) -> None:
    push("north", axis(0))
    push("north", axis(5), seed=2)

    async def work() -> None:
        async with rig() as server:
            assert (await choose(server, axis(0), "north@1")).chosen == "north@1"
            assert (await choose(server, axis(0), "north")).chosen is None
            await server.store.load("given", "north@1")
            assert (await choose(server, axis(0), "given")).chosen == "given"

    run(work())


def test_two_that_are_equally_near_are_told(rig: Any, run: Any, push: Push) -> None:
    push("a", axis(0))
    push("b", axis(0), seed=2)

    async def work() -> None:
        async with rig() as server:
            choice = await choose(server, axis(0))
            assert choice.chosen == "a" and "b is as near" in choice.reason

    run(work())


def test_what_this_server_cannot_load_is_passed_over_unless_it_was_asked_for(rig: Any, run: Any, push: Push) -> None:
    push("wide", axis(0), kind="lora-16")
    push("slim", axis(0, tilt=0.3))

    async def work() -> None:
        async with rig(max_rank=4) as server:
            with pytest.raises(AdapterIncompatible, match="is above max_rank 4"):
                await choose(server, axis(0), "wide", "slim")
        async with rig(max_rank=4) as server:
            choice = await choose(server, axis(0))
            assert choice.chosen == "slim" and "that can be served" in choice.reason
            assert [ref for ref, _ in (await choose(server, axis(0))).nearest] == ["slim"]

    run(work())


def test_a_moved_alias_and_a_new_name_are_followed(rig: Any, run: Any, push: Push) -> None:
    push("north", axis(0))

    async def work() -> None:
        async with rig(watch=True) as server:
            assert (await choose(server, axis(0))).chosen == "north"
            push("north", axis(3), seed=2)
            while (await choose(server, axis(3))).chosen != "north":
                await asyncio.sleep(0.01)
            assert (await choose(server, axis(0))).chosen is None
            push("south", axis(0))
            while (await choose(server, axis(0))).chosen != "south":
                await asyncio.sleep(0.01)

    run(work())
