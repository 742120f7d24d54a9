"""Every kind of adapter in one packed batch with chunked prefill, against PEFT running each of them alone.

Kinds that PEFT lacks are compared with stock networks that hooks or other weights have changed: see `Adapter`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hub.validate import validate
from server.primitives.graft import Graft
from tests.oracle.conftest import ARCHITECTURES, Adapters, Bench, TinyBase
from tests.oracle.edited import Edited
from tests.oracle.kinds import INVOCATION, Row, exact_kinds, rows

TOLERANCE = 1e-4  # fp32; the packed products sum in another order
NEW_TOKENS = 6
ROWS_OF_EACH_KIND = 3
WIDE, NARROW = 448, 24  # tokens in a step: so many that all requests meet in one, so few that most prompts are cut
EVERY = 8  # so many adapters, and then a request for the base

Request = tuple[list[int], list[tuple[Graft, float]]]

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what these adapters are on purpose


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (length,), generator=generator).tolist()


def prompt_of(row: Row, seed: int, length: int) -> list[int]:
    """A prompt at which the adapter works: an activated one is called twice, and the last call counts."""
    ids = prompt(seed, length)
    return [*ids[:2], *INVOCATION, *ids[2:4], *INVOCATION, *ids[4:]] if row.invoked else ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_are_enough_rows_of_each_exact_kind(architecture: str) -> None:
    counts = Counter(row.kind for row in rows(architecture).values())
    short = {kind: counts[kind] for kind in exact_kinds(architecture) if counts[kind] < ROWS_OF_EACH_KIND}
    assert not short, f"rows on {architecture}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_in_one_packed_batch_equals_peft_alone(
    architecture: str,
    tiny_base: Callable[[str], TinyBase],
    bench: Callable[[str], Bench],
    adapters: Callable[[str], Adapters],
) -> None:
    """Twice: all in one step, where the head gives every position of half the requests and of the others those that a
    token is drawn of, as a server does; and in small steps, the other way round, without the native kernels. Requests
    for the base are the same to the bit where the adapters are taken away.
    """
    base, made = tiny_base(architecture), adapters(architecture)
    plain = base.fresh()
    names, requests, references = _requests(plain, bench(architecture), made, base)
    even, odd = (frozenset(range(start, len(requests), 2)) for start in (0, 1))

    wide, narrow, alone = bench(architecture), bench(architecture), bench(architecture)
    for rig in (wide, alone):
        rig.max_batch_tokens, rig.max_running, rig.blocks = WIDE, len(requests), 16 * len(requests)
    served = wide.run(requests, new=NEW_TOKENS, scored=even)
    assert wide.widest_step == len(requests), "all requests were meant to meet in one step"
    narrow.max_batch_tokens, narrow.gathered = NARROW, False
    prompts = narrow.run(requests, scored=odd)
    assert wide.cuts and narrow.cuts > len(requests) / 3, "hardly a prompt was cut into chunks"
    bare = alone.run([(ids, []) for ids, _ in requests], new=NEW_TOKENS, scored=even)

    unchanged = _unchanged(plain, [ids for ids, _ in requests])
    for index, (name, (ids, mixture), reference) in enumerate(zip(names, requests, references, strict=True)):
        tokens = wide.sequences[index].tokens
        expected = _logits(reference, tokens[:-1], prompt_length=len(ids))
        drawn = range(len(ids) - 1, len(expected))
        assert tokens[len(ids) :] == expected[drawn].argmax(-1).tolist(), f"greedy text of {name} on {architecture}"
        rest = expected if index in even else expected[drawn]
        of_prompt = expected[: len(ids)] if index in odd else expected[len(ids) - 1 : len(ids)]
        for got, wanted in ((served[index], rest), (prompts[index], of_prompt)):
            assert got.shape == wanted.shape
            error = (got - wanted).abs().max().item()
            assert error < TOLERANCE, f"{name} on {architecture} differs by {error:.1e}"
        if mixture:
            effect = (expected[: len(ids)] - unchanged[index]).abs().max().item()
            assert effect > 100 * TOLERANCE, f"{name} has no visible effect ({effect:.1e})"
        else:
            assert torch.equal(served[index], bare[index]), f"{name} is not the same beside adapters"


def _requests(
    plain: nn.Module, rig: Bench, made: Adapters, base: TinyBase
) -> tuple[list[str], list[Request], list[Any]]:
    """One for every adapter, and some for the base among them: names, requests, and what each is compared with."""
    names: list[str] = []
    requests: list[Request] = []
    references: list[Any] = []

    def add(name: str, ids: list[int], mixture: list[tuple[Graft, float]], reference: Any) -> None:
        names.append(name)
        requests.append((ids, mixture))
        references.append(reference)

    for seed, (name, adapter) in enumerate(made.items()):
        if seed % EVERY == 0:
            add(f"base-{seed}", prompt(99 - seed, 4 + seed % 13), [], plain)
        assert validate(adapter.folder, base=base.folder).kind == adapter.row.kind
        ids = prompt_of(adapter.row, seed, 5 + 2 * (seed % 11))
        add(name, ids, [(rig.graft(adapter.folder, adapter.row.kind), 1.0)], adapter.peft)
    return names, requests, references


def _unchanged(plain: Any, prompts: Sequence[list[int]]) -> list[Tensor]:
    """The base's logits of all prompts in one go: what follows a prompt does not reach back into it."""
    width = max(map(len, prompts))
    with torch.inference_mode():
        logits = plain(input_ids=torch.tensor([ids + [0] * (width - len(ids)) for ids in prompts])).logits.float()
    return [logits[index, : len(ids)] for index, ids in enumerate(prompts)]


def _logits(model: Any, ids: list[int], *, prompt_length: int | None = None) -> Tensor:
    """A batch of one without padding: PEFT miscounts positions of padded soft prompts."""
    batch = torch.tensor([ids])
    told = {"prompt_length": prompt_length} if isinstance(model, Edited) else {}
    with torch.inference_mode():
        logits: Tensor = model(input_ids=batch, attention_mask=torch.ones_like(batch), **told).logits[0].float()
    return logits[-len(ids) :]


def _greedy(model: Any, ids: list[int]) -> list[int]:
    batch = torch.tensor([ids])
    with torch.inference_mode():
        out = model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    tokens: list[int] = out[0, -NEW_TOKENS:].tolist()
    return tokens
