"""Decode steps from static buffers and slots against the plain forward pass, with CUDA graphs where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from server.adapters.bank import Bank
from server.engine.loop import ProbeLease, course_of
from server.engine.pack import pack_step
from server.model.kv import KvCache
from server.model.network import Network
from server.policy.blocks import BlockPool
from server.policy.schedule import Scheduler
from server.policy.schedule import Sequence as Scheduled
from server.primitives.graft import Graft, combined
from tests.oracle.conftest import Adapters, Bench

pytest.importorskip("triton", reason="triton has wheels for Linux on x86_64 only")

from server.engine.graphs import GraphConfig, GraphRunner

TOLERANCE = 1e-4  # fp32: sums in another order
BLOCK = 4
Mixture = list[tuple[Graft, float]]


@pytest.fixture(scope="module")
def lab(bench: Callable[[str], Bench], adapters: Callable[[str], Adapters]) -> tuple[Bench, Callable[[str], Graft]]:
    one, made = bench("llama"), adapters("llama")
    grafts: dict[str, Graft] = {}

    def graft(name: str) -> Graft:
        if name not in grafts:
            grafts[name] = one.graft(made[name].folder, made[name].row.kind, name)
        return grafts[name]

    return one, graft


def decoded(network: Network, runner: GraphRunner, cache: KvCache, mixtures: Sequence[Mixture], new: int) -> int:
    """Run them all in one batch and compare each step's logits; returns how many steps were of decodes alone."""
    scheduler = Scheduler(BlockPool(cache.blocks), block_size=BLOCK, max_batch_tokens=64, max_running=8)
    bank, rng = Bank(), torch.Generator().manual_seed(1)
    leases = [ProbeLease(combined(mixture)) for mixture in mixtures]
    for index, lease in enumerate(leases):
        ids = torch.randint(10, 120, (3 + 2 * index,), generator=rng).tolist()
        scheduler.add(Scheduled(index, ids, len(ids), new, course_of(lease, ids), 0, reuse=False))
    decodes = 0
    while scheduler.running or scheduler.waiting:
        step = scheduler.plan()
        packed = pack_step(step, cache, bank, {i: lease.grafts for i, lease in enumerate(leases)}, frozenset())
        at_work = [graft for chunk in step.chunks for graft, weight in leases[chunk.sequence.id].grafts if weight]
        expected = network.forward(packed.batch)
        got = runner.run(packed.batch, at_work, bank.activate(at_work))
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)
        decodes += all(chunk.count == 1 for chunk in step.chunks)
        drawn = {
            chunk.sequence.id: int(expected[first + count - 1].argmax())
            for chunk, first, count in packed.rows
            if chunk.completes
        }
        for outcome in scheduler.commit(step, drawn):
            if outcome.finish is not None:
                scheduler.finish(outcome.sequence)
    return decodes


def test_a_step_of_slots_has_the_logits_of_the_plain_one(lab: tuple[Bench, Callable[[str], Graft]]) -> None:
    """Mixed ranks, scales, biases, the head, a fusion and the base in one batch; then others, that take their slots."""
    network, graft = lab[0].network, lab[1]
    cache = network.new_cache(64, BLOCK)
    runner = GraphRunner(network, cache, GraphConfig(blocks=8, slots=5, sizes=(2, 6), tiles=2))
    runner.capture_all()
    fused: Mixture = [(graft("lora"), 0.7), (graft("vera"), -0.4)]
    one = [graft("lora"), graft("dora"), graft("ia3-attention"), graft("lora-bias")]
    first: list[Mixture] = [[], *[[(each, 1.0)] for each in one], fused]
    assert decoded(network, runner, cache, first, 3) == runner.replays == 2, "all prompts were meant to go in one step"
    so_far = runner.replays
    other = [graft("rslora-patterns"), graft("lora-head"), graft("hra")]
    assert decoded(network, runner, cache, [[(each, 1.5)] for each in other], 2) == runner.replays - so_far == 1


def test_what_has_no_place_in_a_slot_is_computed_without_a_graph(lab: tuple[Bench, Callable[[str], Graft]]) -> None:
    network, graft = lab[0].network, lab[1]
    cache = network.new_cache(64, BLOCK)
    runner = GraphRunner(network, cache, GraphConfig(blocks=8, slots=1, sizes=(1, 2), tiles=2))
    runner.capture_all()
    assert decoded(network, runner, cache, [[(graft("oft"), 1.0)]], 2) > runner.replays == 0
    assert decoded(network, runner, cache, [[(graft("lora"), 1.0)], [(graft("dora"), 1.0)]], 2) > runner.replays == 0
    assert decoded(network, runner, cache, [[], [], []], 2) > runner.replays == 0, "more sequences than a graph has"
    assert decoded(network, runner, cache, [[(graft("lora"), 1.0)]], 2) == runner.replays
