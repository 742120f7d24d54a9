"""On a GPU, with CUDA graphs on: every kind against PEFT alone, and the base beside adapters.

Skipped where there is no GPU; `python -m benchmarks.gpu` runs it where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from server.adapters.bank import Bank
from server.engine.pack import Packed
from server.primitives.graft import Graft, combined
from tests.oracle.conftest import Adapters, Bench, TinyBase
from tests.oracle.kinds import exact_kinds
from tests.oracle.test_kinds_against_peft import NEW_TOKENS, TOLERANCE, _logits, prompt, prompt_of

pytest.importorskip("triton", reason="triton has wheels for Linux on x86_64 only")

from server.adapters.slots import has_place
from server.engine.graphs import GraphConfig, GraphRunner

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

BASES = ("llama", "gemma2", "gpt_oss")  # gemma2: windows and softcap; gpt_oss: sinks


@dataclass
class GraphBench(Bench):
    """The engine's parts with a graph for every step of decodes alone."""

    runner: GraphRunner | None = None

    def forward(self, packed: Packed, bank: Bank, terms: Sequence[tuple[Graft, float]]) -> Tensor:
        if self.runner is None:
            config = GraphConfig(blocks=32, slots=8, sizes=(1, 4, 8), tiles=4)
            self.runner = GraphRunner(self.network, packed.batch.plan.cache, config)
            self.runner.capture_all()
        at_work = [graft for graft, weight in terms if weight]
        return self.runner.run(packed.batch, at_work, bank.activate(at_work)).clone()


@pytest.mark.parametrize("architecture", BASES)
def test_every_kind_with_graphs_on_equals_peft_alone(
    architecture: str,
    tiny_base: Callable[[str], TinyBase],
    bench: Callable[[str], Bench],
    adapters: Callable[[str], Adapters],
) -> None:
    """Three or more of a kind and the base in one batch; the base's answer is the same to the bit without them."""
    network, made, plain = bench(architecture).network, adapters(architecture), tiny_base(architecture).fresh()
    assert network.facts.device.type == "cuda"
    for kind in sorted(exact_kinds(architecture)):
        of_kind = [adapter for adapter in made.values() if adapter.row.kind == kind]
        grafts = {one.folder: GraphBench(network).graft(one.folder, kind) for one in of_kind}
        placed = [
            one
            for one in of_kind
            if all(has_place(part, network.facts.sites) for part, _ in combined([(grafts[one.folder], 1.0)]))
        ]
        for together in filter(None, (placed, [one for one in of_kind if one not in placed])):
            requests = [
                (prompt_of(one.row, seed, 5 + seed), [(grafts[one.folder], 1.0)]) for seed, one in enumerate(together)
            ]
            requests.append((prompt(99, 6), []))
            rig, alone = GraphBench(network), GraphBench(network)
            served = rig.run(requests, new=NEW_TOKENS)
            for index, reference in enumerate([*(one.peft for one in together), plain]):
                ids = rig.sequences[index].tokens[:-1]
                expected = _logits(reference, ids, prompt_length=len(requests[index][0]))
                error = (served[index].cpu() - expected).abs().max().item()
                assert error < TOLERANCE, f"{kind} {index} on {architecture} differs by {error:.1e}"
            assert together is not placed or (rig.runner is not None and rig.runner.replays), f"{kind}: no graph"
            bare = alone.run([(ids, []) for ids, _ in requests], new=NEW_TOKENS)
            assert torch.equal(served[-1], bare[-1]), f"the base is not the same beside {kind}"
