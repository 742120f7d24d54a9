"""Edits of the residual stream from the push to the answer: prefix cache, prompts too short, mixtures, golden rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hub.registry import LocalHub
from server.errors import InvalidValue

HIDDEN, LAYERS, RANK = 32, 3, 3
PROMPT = [3, 9, 4, 11, 5, 6, 2, 8, 12, 13, 7, 21]
LOREFT = {"peft_type": "LOREFT", "r": RANK, "positions": "f4+l4", "tied_weights": False}
HOULSBY: dict[str, Any] = {
    "peft_type": "BOTTLENECK",
    "places": ["attention", "mlp"],
    "reads": "output",
    "bottleneck_size": RANK,
}
HOULSBY |= {"non_linearity": "gelu"}

Make = Callable[[Mapping[str, Any]], Path]


@pytest.fixture
def edits(tmp_path: Path, base: Path) -> Make:
    def make(config: Mapping[str, Any]) -> Path:
        torch.manual_seed(4)
        folder = tmp_path / config["peft_type"]
        folder.mkdir()
        tensors = loreft() if config["peft_type"] == "LOREFT" else houlsby()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
        return folder

    return make


def loreft() -> dict[str, Tensor]:
    tensors = {}
    for own in [f"layers.{layer}.{end}" for layer in range(LAYERS) for end in ("first", "last")]:
        tensors[f"{own}.rotate_layer.weight"] = torch.linalg.qr(torch.randn(HIDDEN, RANK))[0].t().contiguous()
        tensors[f"{own}.learned_source.weight"] = torch.randn(RANK, HIDDEN)
        tensors[f"{own}.learned_source.bias"] = 3 * torch.randn(RANK)
    return tensors


def houlsby() -> dict[str, Tensor]:
    tensors = {}
    for own in [f"layers.{layer}.{place}" for layer in range(LAYERS) for place in HOULSBY["places"]]:
        for half, inputs, outputs in (("down", HIDDEN, RANK), ("up", RANK, HIDDEN)):
            tensors[f"{own}.{half}.weight"] = torch.randn(outputs, inputs)
            tensors[f"{own}.{half}.bias"] = torch.randn(outputs)
    return tensors


def test_what_is_cached_is_what_the_ends_of_this_prompt_leave_the_same(
    rig: Any, run: Any, hub: LocalHub, edits: Make
) -> None:
    """A longer prompt shares what stands before the shorter one's edited end; warm answers equal cold ones."""
    hub.push(edits(LOREFT), "bot")
    longer = [*PROMPT, 30, 31, 32, 33]

    async def work() -> None:
        cold = {}
        for prompt in (PROMPT, longer):
            async with rig(prefix_cache=False) as server:
                cold[len(prompt)], _ = await server.ask(prompt, ("bot", 1.0))
        async with rig() as server:
            bare, _ = await server.ask(PROMPT)
            first, end = await server.ask(PROMPT, ("bot", 1.0))
            assert end.cached_tokens == 0, "the base's first block has no edits"
            assert first == cold[len(PROMPT)]
            assert first != bare
            again, end = await server.ask(PROMPT, ("bot", 1.0))
            assert (again, end.cached_tokens) == (first, 8)
            second, end = await server.ask(longer, ("bot", 1.0))
            assert (second, end.cached_tokens) == (cold[len(longer)], 8)
            other, end = await server.ask(longer, ("bot", 0.5))
            assert end.cached_tokens == 0
            assert other != second

    run(work())


def test_a_prompt_without_ends_is_refused(rig: Any, run: Any, hub: LocalHub, edits: Make) -> None:
    hub.push(edits(LOREFT), "bot")

    async def work() -> None:
        async with rig() as server:
            with pytest.raises(InvalidValue, match="bot@1 works at the ends of the prompt"):
                await server.ask([3], ("bot", 1.0))
            tokens, _ = await server.ask([3, 9], ("bot", 1.0))
            assert tokens
            assert server.store.resident()[0].leases == 0

    run(work())


def test_edits_and_changes_of_linears_share_a_mixture_and_a_batch(
    rig: Any, run: Any, hub: LocalHub, edits: Make, adapter: Callable[..., Path]
) -> None:
    hub.push(edits(LOREFT), "ends")
    hub.push(edits(HOULSBY), "wide")
    hub.push(adapter("lora", 1), "low")
    asked: list[tuple[tuple[str, float], ...]] = [
        (),
        (("ends", 1.0),),
        (("wide", 1.0),),
        (("ends", 0.5), ("wide", -0.3), ("low", 1.0)),
        (("low", 1.0), ("wide", -0.3), ("ends", 0.5)),
    ]

    async def work() -> None:
        async with rig(prefix_cache=False) as server:
            alone = [(await server.ask(PROMPT, *terms))[0] for terms in asked]
            streams = [await server.submit(PROMPT, *terms) for terms in asked]
            together = [[event async for event in stream] for stream in streams]
        assert [[event.token_id for event in events[:-1]] for events in together] == alone
        assert len({tuple(tokens) for tokens in alone}) == len(asked) - 1
        assert alone[-1] == alone[-2]
        assert {status.name: status.kind for status in server.store.resident()} == {
            "ends": "loreft", "wide": "bottleneck", "low": "lora",
        }  # fmt: skip

    run(work())
