"""Which rows each step trains on: a pure function, so that a resumed run goes on with the rows it would have seen.

The samplers of transformers are not used: their grouping by length draws from torch's global generator, which a resume
in the middle of an epoch does not restore before the draw.
"""

import random
from collections.abc import Sequence
from typing import Final

POOL_BATCHES: Final = 16  # rows are sorted by length within so many batches: little padding, still a good shuffle


def order(lengths: Sequence[int], *, rows_per_step: int, steps: int, seed: int) -> list[int]:
    """Return `steps` batches of `rows_per_step` row numbers, one after another.

    Law: every row comes as often as any other, give or take one.
    """
    wanted = rows_per_step * steps
    stream = shuffled_epochs(len(lengths), wanted, seed)
    rng = random.Random(f"pools/{seed}")
    arranged: list[int] = []
    for start in range(0, wanted, rows_per_step * POOL_BATCHES):
        pool = sorted(stream[start : start + rows_per_step * POOL_BATCHES], key=lambda row: lengths[row])
        batches = [pool[i : i + rows_per_step] for i in range(0, len(pool), rows_per_step)]
        rng.shuffle(batches)
        arranged += [row for batch in batches for row in batch]
    return arranged


def shuffled_epochs(rows: int, wanted: int, seed: int) -> list[int]:
    stream: list[int] = []
    for epoch in range(-(-wanted // rows)):
        numbers = list(range(rows))
        random.Random(f"order/{seed}/{epoch}").shuffle(numbers)
        stream += numbers
    return stream[:wanted]
