"""Arrow in one packed batch with chunked prefill, against PEFT's own arrow model of the same adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import ArrowConfig, create_arrow_model

from server.primitives.experts import Expert, Route, make_prototypes, why_no_expert
from server.primitives.graft import Graft
from tests.oracle.conftest import Bench, TinyBase
from tests.oracle.experts import logits, make_expert, prompt

TOLERANCE = 1e-4  # fp32; PEFT sums all experts, and finds their directions by fifteen power iterations
EXPERTS = 4

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def experts(
    tiny_base: Callable[[str], TinyBase], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[Path]]:
    made: dict[str, list[Path]] = {}

    def make(architecture: str) -> list[Path]:
        if architecture not in made:
            root = tmp_path_factory.mktemp(f"{architecture}-experts")
            base = tiny_base(architecture)
            made[architecture] = [make_expert(base, root / f"{seed}", seed=seed) for seed in range(EXPERTS)]
        return made[architecture]

    return make


def route(grafts: Sequence[Graft], *, top_k: int, temperature: float) -> Route:
    assert [why_no_expert(graft, ()) for graft in grafts] == [None] * len(grafts)
    return Route(tuple(Expert(graft, make_prototypes(graft)) for graft in grafts), top_k, temperature)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_arrow_beside_other_requests_equals_pefts_arrow_alone(
    architecture: str,
    tiny_base: Callable[[str], TinyBase],
    bench: Callable[[str], Bench],
    experts: Callable[[str], list[Path]],
) -> None:
    rig, folders = bench(architecture), experts(architecture)
    grafts = [rig.graft(folder, "lora") for folder in folders]
    # Different sets, orders, top_k and temperatures in one batch; beside them a mixture of two experts, and the base.
    orders = [([0, 1, 2, 3], 2, 1.0), ([3, 0], 1, 1.0), ([2, 1, 3], 3, 0.3)]
    requests: list[tuple[list[int], list[tuple[Graft, float]]]] = [(prompt(7 + n, 9 + 5 * n), []) for n in range(3)]
    routes = {
        n: route([grafts[k] for k in chosen], top_k=top_k, temperature=temperature)
        for n, (chosen, top_k, temperature) in enumerate(orders)
    }
    others = [(prompt(30, 11), [(grafts[0], 0.5), (grafts[2], -1.0)]), (prompt(31, 8), [])]
    got = rig.run([*requests, *others], routes=routes)
    plain = rig.run([*requests, *others])
    assert rig.mixed_steps > 2
    for n, (chosen, top_k, temperature) in enumerate(orders):
        model = arrow_model(tiny_base(architecture), [folders[k] for k in chosen], top_k, temperature)
        expected = logits(model, requests[n][0])
        error = (got[n] - expected).abs().max().item()
        assert error < TOLERANCE, f"arrow over {chosen} on {architecture} differs by {error:.1e}"
        assert (expected - plain[n]).abs().max().item() > 100 * TOLERANCE, "arrow has no visible effect"
        check_shares(rig.shares[n], len(requests[n][0]), len(chosen), top_k)
    for n in (3, 4):
        assert torch.equal(got[n], plain[n]), "a request that is not routed changed beside routed ones"


def check_shares(rows: Sequence[Any], tokens: int, experts: int, top_k: int) -> None:
    assert len(rows) == tokens
    for token in rows:
        assert len(token) == 4, "a row for every layer"
        for layer in token:
            assert 1 <= len(layer) <= top_k
            assert all(0 <= number < experts for number, _ in layer)
            assert sum(share for _, share in layer) <= 1 + 1e-3


def test_a_linear_where_only_some_candidates_have_a_term_is_routed_among_those(
    tiny_base: Callable[[str], TinyBase], bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    """PEFT has no such case: it is two arrows, one over each half of the network, with the layers in between."""
    base, rig = tiny_base("llama"), bench("llama")
    folders = [
        make_expert(base, tmp_path / f"{k}", seed=k, layers_to_transform=[0, 1] if k < 2 else [2, 3]) for k in range(4)
    ]
    both = [make_expert(base, tmp_path / f"whole{k}", seed=9 + k) for k in range(2)]
    for k, folder in enumerate(both):  # an expert that is 0 in the lower half and 2 in the upper, and so on
        halves = [safetensors.torch.load_file(folders[part] / "adapter_model.safetensors") for part in (k, k + 2)]
        safetensors.torch.save_file({**halves[0], **halves[1]}, folder / "adapter_model.safetensors")
    ids = prompt(3, 14)
    parts, whole = ([rig.graft(folder, "lora") for folder in some] for some in (folders, both))
    got = rig.run(
        [(ids, []), (ids, [])],
        routes={0: route(parts, top_k=2, temperature=1.0), 1: route(whole, top_k=2, temperature=1.0)},
    )
    torch.testing.assert_close(got[0], got[1], atol=TOLERANCE, rtol=0)


def arrow_model(base: TinyBase, folders: Sequence[Path], top_k: int, temperature: float) -> Any:
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=5)
    return create_arrow_model(base.fresh(), [str(folder) for folder in folders], config).eval()
