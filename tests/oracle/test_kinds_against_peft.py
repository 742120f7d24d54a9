"""Every kind of adapter in one packed batch with chunked prefill, against PEFT running each of them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hub.methods import METHODS
from server.primitives.graft import Graft
from tests.oracle.conftest import ARCHITECTURES, Adapter, Bench, TinyBase
from tests.oracle.kinds import INVOCATION, Row, rows

TOLERANCE = 1e-4  # fp32; the packed products sum in another order
NEW_TOKENS = 6
# PEFT has none of them; each is compared with its training module or with the weights summed, in a file of its own.
NOT_OF_PEFT = {"sparse", "bitfit", "lora-moe"}

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what these adapters are on purpose


def test_every_kind_has_a_row() -> None:
    assert {row.kind for row in rows("llama").values()} | NOT_OF_PEFT == {method.kind for method in METHODS.values()}


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (length,), generator=generator).tolist()


def prompt_of(row: Row, seed: int, length: int) -> list[int]:
    """A prompt at which the adapter works: an activated one is called twice, and the last call counts."""
    ids = prompt(seed, length)
    return [*ids[:2], *INVOCATION, *ids[2:4], *INVOCATION, *ids[4:]] if row.invoked else ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_in_one_packed_batch_equals_peft_alone(
    architecture: str,
    tiny_base: Callable[[str], TinyBase],
    bench: Callable[[str], Bench],
    adapters: Callable[[str], dict[str, Adapter]],
) -> None:
    plain, rig, made = tiny_base(architecture).fresh(), bench(architecture), adapters(architecture)
    requests: list[tuple[list[int], Any]] = [(prompt(99, 13), []), (prompt(98, 4), [])]
    expected, texts = [], []
    for ids, _ in requests:
        expected.append(_logits(plain, ids))
        texts.append(_greedy(plain, ids))
    base_logits = list(expected)
    for seed, adapter in enumerate(made.values()):
        ids = prompt_of(adapter.row, seed, 5 + 2 * (seed % 11))
        requests.append((ids, [(rig.graft(adapter.folder, adapter.row.kind), 1.0)]))
        expected.append(_logits(adapter.peft, ids))
        texts.append(_greedy(adapter.peft, ids))
        base_logits.append(_logits(plain, ids))
    got = rig.run(requests, new=NEW_TOKENS)
    assert rig.mixed_steps > 5, "the requests did not share steps"
    assert rig.steps > NEW_TOKENS + 3, "no prompt was cut into chunks"
    names = ["base", "base-short", *made]
    for index, name in enumerate(names):
        ids = requests[index][0]
        error = (got[index][: len(ids)] - expected[index]).abs().max().item()
        assert error < TOLERANCE, f"{name} on {architecture} differs by {error:.1e}"
        if index > 1:
            effect = (expected[index] - base_logits[index]).abs().max().item()
            assert effect > 100 * TOLERANCE, f"{name} has no visible effect ({effect:.1e})"
        assert rig.sequences[index].tokens[len(ids) :] == texts[index], f"greedy text of {name} on {architecture}"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "mixtral"])
def test_a_base_request_is_bit_identical_to_one_in_a_batch_without_adapters(
    architecture: str, bench: Callable[[str], Bench], adapters: Callable[[str], dict[str, Adapter]]
) -> None:
    """Virtual tokens are left out: they change which tokens share a step."""
    rig = bench(architecture)
    requests: list[tuple[list[int], list[tuple[Graft, float]]]] = []
    for seed, adapter in enumerate(adapters(architecture).values()):
        if not adapter.row.virtual:
            requests.append((prompt_of(adapter.row, seed, 7), [(rig.graft(adapter.folder, adapter.row.kind), 1.0)]))
            requests.append((prompt(seed, 5), []))
    beside_adapters = rig.run(requests)
    alone = rig.run([(ids, []) for ids, _ in requests])
    for index, (_, mixture) in enumerate(requests):
        assert torch.equal(beside_adapters[index], alone[index]) == (not mixture)


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    """A batch of one without padding: PEFT miscounts positions of padded soft prompts."""
    batch = torch.tensor([ids])
    with torch.inference_mode():
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[0]
    return logits[-len(ids) :].float()


def _greedy(model: Any, ids: list[int]) -> list[int]:
    batch = torch.tensor([ids])
    with torch.inference_mode():
        out = model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    return out[0, -NEW_TOKENS:].tolist()
