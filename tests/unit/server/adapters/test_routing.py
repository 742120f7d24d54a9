"""Routed requests through the store and the engine: who is leased, what is refused, what the cache tells apart."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hub.errors import Refused
from hub.registry import LocalHub
from server.errors import AdapterUnavailable, InvalidValue, MixtureRefused, ModelNotFound, ServerError
from server.records import Finished, GenerationRequest, RoutingOrder, Sampled, Sampling
from tests.unit.server.conftest import all_events

PROMPT = [5, 9, 2, 7, 7, 3, 11, 4, 5]
LAYERS, HIDDEN = 3, 32


def write_router(folder: Path, base: Path, pins: Sequence[str], *, top_k: int = 2, seed: int = 0) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, LAYERS, len(pins), HIDDEN, generator=generator)
    tensors = {"router.weight": rows[0].clone(), "router.prompt_weight": rows[1].clone()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA_MOE", "base_model_name_or_path": str(base), "experts": list(pins), "top_k": top_k}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def skills(hub: LocalHub, adapter: Callable[..., Path]) -> list[str]:
    """Three experts in the hub; their pins."""
    pushed = [hub.push(adapter("lora", seed, 0.3), f"skill-{seed}") for seed in range(3)]
    return [f"{one.name}@{one.digest}" for one in pushed]


@pytest.fixture
def router(hub: LocalHub, base: Path, skills: list[str], tmp_path: Path) -> str:
    hub.push(write_router(tmp_path / "router", base, skills), "router")
    return "router"


async def ask(
    server: Any,
    terms: Sequence[tuple[str, float]],
    order: RoutingOrder | None,
    prompt: Sequence[int] = PROMPT,
    **more: Any,
) -> list[Any]:
    lease = await server.store.acquire(terms, order)
    server.asked += 1
    request = GenerationRequest(
        f"r{server.asked}", tuple(prompt), lease.mixture, max_tokens=6, sampling=Sampling(temperature=0.0), **more
    )
    return await all_events(server.engine.submit(request, lease))


def tokens(events: Sequence[Any]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Sampled)]


async def refused(server: Any, terms: Sequence[tuple[str, float]], order: RoutingOrder | None) -> ServerError:
    with pytest.raises(ServerError) as caught:
        await server.store.acquire(terms, order)
    held = [one for one in server.store.resident() if one.leases and not one.name.startswith("skill")]
    assert not held, "a refused request keeps a lease"
    return caught.value


def arrow(*candidates: str, **fields: Any) -> RoutingOrder:
    return RoutingOrder("arrow", candidates, **fields)


def test_a_router_by_its_name_serves_its_experts_and_holds_them_while_it_is_here(
    rig: Any, run: Any, router: str, skills: list[str]
) -> None:
    async def work() -> None:
        async with rig() as server:
            lease = await server.store.acquire([(router, 1.0)])
            routing = lease.mixture.routing
            assert [(one.ref, one.digest) for one in routing.experts] == [
                (f"skill-{n}@1", pin.partition("@")[2]) for n, pin in enumerate(skills)
            ]
            assert (routing.mode, routing.top_k, routing.temperature) == ("gate", 2, 1.0)
            lease.release()
            leases = {one.name: one.leases for one in server.store.resident()}
            assert leases == {"router": 0, "skill-0": 1, "skill-1": 1, "skill-2": 1}
            with pytest.raises(InvalidValue, match="resident routers"):
                await server.store.evict("skill-0")
            await server.store.evict(router)
            assert all(one.leases == 0 for one in server.store.resident())
            again, base = await ask(server, [(router, 1.0)], None), await ask(server, [], None)
            assert tokens(again) != tokens(base)

    run(work())


def test_two_routers_that_load_at_once_do_not_wait_for_each_other(
    rig: Any, run: Any, hub: LocalHub, base: Path, router: str, skills: list[str], tmp_path: Path
) -> None:
    import asyncio

    hub.push(write_router(tmp_path / "other", base, skills[::-1], seed=1), "other")

    async def work() -> None:
        async with rig(max_concurrent_loads=1) as server:
            one, other = await asyncio.gather(*(server.store.acquire([(name, 1.0)]) for name in (router, "other")))
            assert {status.leases for status in server.store.resident() if status.name == "skill-0"} == {2}
            one.release()
            other.release()

    run(work())


def test_what_cannot_be_routed_is_refused_by_name(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path], router: str, skills: list[str]
) -> None:
    hub.push(adapter("ia3"), "ia3")
    hub.push(adapter("dora"), "dora")
    hub.push(adapter("prefix"), "prefix")
    gate = RoutingOrder("gate")
    cases: list[tuple[list[tuple[str, float]], RoutingOrder | None, type[ServerError], str]] = [
        ([], arrow("skill-0", "ia3"), MixtureRefused, "ia3@1 has scale_out"),
        ([], arrow("skill-0", "dora"), MixtureRefused, "dora@1 has scale_out"),
        ([], arrow("skill-0", "prefix"), MixtureRefused, "prefix@1 has a prefix"),
        ([], arrow("skill-0", router), MixtureRefused, "router@1 has a router"),
        ([], arrow("skill-0", "skill-0@1"), InvalidValue, "are the same version"),
        ([], arrow("skill-0", "skill-1", top_k=3), InvalidValue, "top_k 3 is above the 2 candidates"),
        ([], arrow("skill-0", "nobody"), ModelNotFound, "nobody"),
        ([("skill-0", 1.0)], gate, InvalidValue, "skill-0@1 is none"),
        ([], gate, InvalidValue, "the base is none"),
        ([(router, 0.5)], None, MixtureRefused, "served alone and at weight 1"),
        ([(router, 1.0), ("skill-0", 1.0)], None, MixtureRefused, "served alone and at weight 1"),
        ([(router, 1.0)], RoutingOrder("gate", ("skill-0", "ia3")), InvalidValue, "ia3@1 is no expert of router@1"),
        ([(router, 1.0)], RoutingOrder("gate", ("skill-0",), top_k=2), InvalidValue, "above the 1 candidates"),
    ]

    async def work() -> None:
        async with rig() as server:
            for terms, order, kind, words in cases:
                error = await refused(server, terms, order)
                assert isinstance(error, kind) and words in error.message, (terms, order, error.message)

    run(work())


def test_a_router_whose_expert_is_gone_names_it(rig: Any, run: Any, hub: LocalHub, router: str) -> None:
    """A hub keeps what its routers pin; one of before did not."""
    with sqlite3.connect(hub.home / "catalogue.sqlite") as database:
        database.execute("DELETE FROM aliases WHERE name = 'skill-1'")
        database.execute("UPDATE versions SET removed_at = '2026-01-01' WHERE name = 'skill-1'")

    async def work() -> None:
        async with rig() as server:
            error = await refused(server, [(router, 1.0)], None)
            assert isinstance(error, AdapterUnavailable)
            assert "router@1 has no expert skill-1@sha256" in error.message
            assert all(one.leases == 0 for one in server.store.resident())

    run(work())


def test_a_router_over_an_expert_outside_of_the_decoder_layers_is_refused(
    rig: Any, run: Any, hub: LocalHub, adapter: Callable[..., Path], base: Path, skills: list[str], tmp_path: Path
) -> None:
    """What the records tell is refused by the hub at the push; where the decoder layers end, only the server sees."""
    pushed = hub.push(adapter("lora-head"), "head")
    hub.push(write_router(tmp_path / "r", base, [skills[0], f"head@{pushed.digest}"]), "mixed")

    async def work() -> None:
        async with rig() as server:
            message = (await refused(server, [("mixed", 1.0)], None)).message
            assert "head@1 changes lm_head, which is in no decoder layer" in message

    run(work())


def test_the_prefix_cache_tells_routed_requests_apart(rig: Any, run: Any, router: str) -> None:
    orders: list[tuple[list[tuple[str, float]], RoutingOrder | None]] = [
        ([], None),
        ([("skill-0", 1.0)], None),
        ([], arrow("skill-0", "skill-1", "skill-2")),
        ([], arrow("skill-0", "skill-1")),
        ([], arrow("skill-0", "skill-1", "skill-2", top_k=1)),
        ([], arrow("skill-0", "skill-1", "skill-2", temperature=0.5)),
        ([(router, 1.0)], None),
        ([(router, 1.0)], RoutingOrder("gate", top_k=1)),
        ([(router, 1.0)], RoutingOrder("gate", ("skill-0", "skill-1"))),
    ]

    async def work() -> None:
        async with rig() as server:
            first = [await ask(server, *order) for order in orders]
            again = [await ask(server, *order) for order in orders]
            swapped = await ask(server, [], arrow("skill-2", "skill-0@1", "skill-1"))
            assert [events[-1].cached_tokens for events in first] == [0] * len(orders)
            assert all(events[-1].cached_tokens == 8 for events in again), "the same again is in the cache"
            assert swapped[-1].cached_tokens == 8, "the order of the candidates changes nothing"
            assert [tokens(events) for events in first] == [tokens(events) for events in again]
            for order, cached in (orders[2], 8), (orders[6], 0):  # a router reads the prompt whole, arrow does not
                assert (await ask(server, *order, [*PROMPT[:8], 6, 3]))[-1].cached_tokens == cached

    run(work())


@pytest.mark.parametrize("mode", ["arrow", "gate"])
def test_who_served_which_token_is_told_for_all_but_the_last(rig: Any, run: Any, router: str, mode: str) -> None:
    terms = [(router, 1.0)] if mode == "gate" else []
    order = None if mode == "gate" else arrow("skill-0", "skill-1", "skill-2")

    async def work() -> None:
        async with rig(max_batch_tokens=4) as server:
            for _ in range(2):  # the second time the prompt is in the cache, and is computed nonetheless
                events = await ask(server, terms, order, return_routing=True)
                rows = [row for event in events if isinstance(event, Sampled | Finished) for row in event.routes]
                assert len(rows) == len(PROMPT) + len(tokens(events)) - 1
                for row in rows:
                    assert len(row) == LAYERS
                    for layer in row:
                        assert [number for number, _ in layer] == list(dict.fromkeys(n for n, _ in layer))
                        assert 0.5 < sum(share for _, share in layer) <= 1.001
            with pytest.raises(InvalidValue, match="return_routing"):
                await ask(server, [("skill-0", 1.0)], None, return_routing=True)

    run(work())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts": ["skill-0@1", "skill-1@1"]}, "pins no expert"),
        ({"experts": []}, "must be a list of 2 to 256 references"),
        ({"experts": ["a@sha256:" + "0" * 64] * 2}, "twice"),
        ({"top_k": 4}, "top_k: 4 is above the 3 experts"),
        ({"top_k": 0}, "top_k: must be a whole number above 0"),
        ({"gating": "noisy"}, "gating: is no field of LORA_MOE"),
    ],
)
def test_a_router_that_is_not_sound_is_refused_at_push(
    hub: LocalHub, base: Path, skills: list[str], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = write_router(tmp_path / "r", base, skills)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(Refused) as refusal:
        hub.push(folder, "router")
    assert words in "\n".join(str(problem) for problem in refusal.value.problems)


def test_a_routers_experts_are_its_parents(hub: LocalHub, router: str, skills: list[str]) -> None:
    from hub.ref import parse_reference

    manifest = hub.manifest(hub.resolve(parse_reference(router)).digest)
    assert (manifest.kind, list(manifest.parents)) == ("lora-moe", [pin.partition("@")[2] for pin in skills])
