"""Centroids as they are made: the same bytes each time, the base's own hidden states, padding that changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.base import OpenBase, open_base
from trainer.centroids import (
    FEWEST_PROMPTS,
    MOST_CENTROIDS,
    Prompt,
    batches,
    centroids_of,
    embed,
    probe_prompts,
    spread,
    threshold_of,
    write_centroids,
)
from trainer.tasks import draw_phrases

ROUNDING = 1e-4  # fp32, padded and not


@pytest.fixture(scope="module")
def base() -> OpenBase:
    return open_base("seedling")


@pytest.fixture(scope="module")
def model(base: OpenBase) -> Any:
    return base.load_weights(torch.device("cpu"))


def prompts(base: OpenBase, count: int) -> list[Prompt]:
    return [tuple(base.tokenizer.encode(" ".join(phrase))) for phrase in draw_phrases("train", count, 3)]


def test_the_same_prompts_give_the_same_bytes(base: OpenBase, model: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        assert write_centroids(model, tmp_path / name, base, prompts(base, 60), "chat")
    for file in ("centroids.json", "centroids.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    said = json.loads((tmp_path / "one" / "centroids.json").read_text())
    tensors = load_file(tmp_path / "one" / "centroids.safetensors")
    assert said["prompts"] == 60 and said["centroids"] == len(tensors["centroids"]) == 15
    assert (tensors["centroids"].norm(dim=-1) - 1).abs().max() < ROUNDING and (tensors["scale"] > 0).all()


def test_too_few_prompts_leave_nothing(base: OpenBase, model: Any, tmp_path: Path) -> None:
    few = prompts(base, FEWEST_PROMPTS - 1)
    assert not write_centroids(model, tmp_path, base, few * 5, "chat") and not list(tmp_path.iterdir())


def test_padding_and_company_change_no_embedding(base: OpenBase, model: Any) -> None:
    some = [one[: 2 + place % 5] for place, one in enumerate(prompts(base, 12))]
    together = embed(model, some, 2, pad=base.pad)
    alone = torch.cat([embed(model, [one], 2, pad=base.pad) for one in some])
    assert (together - alone).abs().max() < ROUNDING * alone.abs().max()
    assert sorted(place for batch in batches(some) for place in batch) == list(range(12))


def test_probes_are_written_out_as_the_prompts_are(base: OpenBase) -> None:
    chat, text = probe_prompts(base, "chat"), probe_prompts(base, "text")
    assert len(chat) == len(text) == len(set(chat))
    assert all(len(one) > len(other) for one, other in zip(chat, text, strict=True))


def test_prompts_are_taken_from_everywhere() -> None:
    items = [(number,) for number in range(100)]
    assert spread(items, 4) == [(0,), (25,), (50,), (75,)] and spread(items[:3], 4) == items[:3]


def test_groups_that_lie_apart_get_centroids_of_their_own() -> None:
    torch.manual_seed(0)
    groups = torch.eye(6, 16, dtype=torch.float64).repeat_interleave(40, 0)
    directions = torch.nn.functional.normalize(groups + 0.05 * torch.randn(240, 16, dtype=torch.float64), dim=-1)
    centroids = centroids_of(directions)
    assert len(centroids) == MOST_CENTROIDS
    assert ((centroids @ torch.eye(6, 16, dtype=torch.float64).T) > 0.9).any(0).all()
    assert threshold_of(directions) > 0.9


def test_a_threshold_is_reached_by_nearly_all_of_the_adapters_own_prompts() -> None:
    torch.manual_seed(1)
    mean = torch.randn(32, dtype=torch.float64)
    directions = torch.nn.functional.normalize(mean + 0.8 * torch.randn(600, 32, dtype=torch.float64), dim=-1)
    threshold = threshold_of(directions[:400])
    reached = ((directions[400:] @ centroids_of(directions[:400]).T).max(1).values >= threshold).double().mean()
    strangers = torch.nn.functional.normalize(torch.randn(200, 32, dtype=torch.float64), dim=-1)
    passed = ((strangers @ centroids_of(directions[:400]).T).max(1).values >= threshold).double().mean()
    assert reached > 0.95 and passed < 0.2
