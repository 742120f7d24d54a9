"""How well a model answers held-out rows: the loss on the answers' tokens, and the share of rows answered exactly.

A greedy answer is the wanted one if and only if, given the wanted tokens before it, every wanted token is the most
likely: so one forward pass over question and answer decides what generation would say, and batches are padded on the
right only, where every kind of adapter is exact (padding on the left shifts positions under virtual tokens).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.functional import cross_entropy

from trainer.encode import IGNORED, Encoded

LOGITS_PER_BATCH: Final = 2**26  # floats: a quarter of a GB


Collate = Callable[[Sequence[Encoded], int], dict[str, torch.Tensor]]  # rows and the padding token into a batch


@dataclass(frozen=True)
class Score:
    loss: float  # mean over the tokens that are learnt
    exact_match: float
    rows: int


def evaluate(
    model: Any, rows: Sequence[Encoded], *, pad: int, vocabulary: int, collate: Collate | None = None
) -> Score:
    """Score the model on rows, in evaluation mode. Shapes: B rows, T tokens, V vocabulary."""
    collate = collate or pad_right
    total, tokens, exact = 0.0, 0, 0
    with torch.inference_mode():
        for batch in batches(rows, tokens_per_batch=LOGITS_PER_BATCH // vocabulary):
            inputs = {name: tensor.to(model.device) for name, tensor in collate(batch, pad).items()}
            labels_BT = inputs.pop("labels")[:, 1:]
            length = inputs["input_ids"].shape[1]
            logits_BTV = model(**inputs).logits[:, -length:-1].float()  # virtual tokens may stand before
            learnt_BT = labels_BT != IGNORED
            total += cross_entropy(logits_BTV[learnt_BT], labels_BT[learnt_BT], reduction="sum").item()
            tokens += int(learnt_BT.sum())
            exact += int(((logits_BTV.argmax(-1) == labels_BT) | ~learnt_BT).all(dim=1).sum())
    return Score(total / tokens, exact / len(rows), len(rows))


def batches(rows: Sequence[Encoded], *, tokens_per_batch: int) -> Iterator[list[Encoded]]:
    """Batch rows of like length so that a padded batch stays under the budget; one row may be above it."""
    batch: list[Encoded] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if batch and (len(batch) + 1) * len(row.ids) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def pad_right(rows: Sequence[Encoded], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(row.ids) for row in rows)
    gaps = [width - len(row.ids) for row in rows]
    return {
        "input_ids": torch.tensor([[*row.ids, *[pad] * gap] for row, gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * gap for row, gap in zip(rows, gaps, strict=True)]),
        "labels": torch.tensor([[*row.labels, *[IGNORED] * gap] for row, gap in zip(rows, gaps, strict=True)]),
    }
