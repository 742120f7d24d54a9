"""Scoring by one forward pass says what greedy generation says, for every kind of adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.base import open_base
from trainer.encode import IGNORED, Encoded
from trainer.evaluate import batches, evaluate, pad_right
from trainer.methods import METHODS
from trainer.recipe import parse_recipe
from trainer.train import adapted

ROUNDING = 1e-5  # fp32 sums in another order


def untrained(method: str, base: str) -> Any:
    """An adapter with random values everywhere, so that it changes what the base says."""
    options = {"tokens": list(range(5, 200, 3))} if method == "trainable-tokens" else {}
    recipe = parse_recipe({"method": method, "base": base, "data": "-", "steps": 1, "options": options}, "test")
    model = adapted(recipe, open_base(base), torch.device("cpu"))
    torch.manual_seed(1)
    for value in model.parameters():
        if value.requires_grad:
            value.data += torch.randn_like(value) / 2
    return model.eval()


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in out[0, len(prompt) :]]


def asked(prompt: list[int], answer: list[int]) -> Encoded:
    return Encoded((*prompt, *answer), (*[IGNORED] * len(prompt), *answer))


# A router asks a hub for its experts, and a llama has no biases.
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"lora-moe", "bitfit"}))
def test_a_row_counts_as_answered_exactly_when_greedy_generation_gives_it(method: str, tiny_base: Path) -> None:
    model = untrained(method, str(tiny_base))
    prompts = [[5 + (7 * i + j) % 250 for j in range(1 + 3 * i)] for i in range(6)]
    right = [asked(prompt, greedy(model, prompt, 4)) for prompt in prompts]
    wrong = [asked(list(row.prompt), [*row.ids[-4:-1], (row.ids[-1] + 1) % 200]) for row in right]

    def exact(rows: list[Encoded]) -> float:
        return evaluate(model, rows, pad=0, vocabulary=261, collate=METHODS[method].tuner().collate).exact_match

    assert exact(right) == 1.0
    assert exact(wrong) == 0.0
    assert exact([*right[:3], *wrong[3:]]) == 0.5


def test_the_loss_is_the_mean_over_learnt_tokens_whatever_the_batches(tiny_base: Path) -> None:
    model = untrained("prompt", str(tiny_base))
    rows = [asked([9] * (1 + n), [7, 8, 1][: 1 + n % 3]) for n in range(9)]
    together = evaluate(model, rows, pad=0, vocabulary=261)
    one_by_one = [evaluate(model, [row], pad=0, vocabulary=261).loss * (1 + n % 3) for n, row in enumerate(rows)]
    assert together.loss == pytest.approx(sum(one_by_one) / 18, abs=ROUNDING)


def test_batches_stay_under_their_budget_and_lose_no_row() -> None:
    rows = [asked([1] * n, [2]) for n in (3, 30, 5, 8, 90, 2)]
    found = list(batches(rows, tokens_per_batch=40))
    assert sorted(len(row.ids) for batch in found for row in batch) == sorted(len(row.ids) for row in rows)
    assert all(len(batch) == 1 or len(batch) * max(len(row.ids) for row in batch) <= 40 for batch in found)


def test_padding_stands_on_the_right_and_is_masked() -> None:
    padded = pad_right([asked([5, 6], [7]), asked([5], [7])], pad=9)
    assert padded["input_ids"].tolist() == [[5, 6, 7], [5, 7, 9]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert padded["labels"].tolist() == [[-100, -100, 7], [-100, 7, -100]]
