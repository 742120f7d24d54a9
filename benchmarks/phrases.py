"""Phrases to teach and to ask about, told apart by their digest, as the trainer's tasks do."""

from __future__ import annotations

import random

from trainer.tasks import LONGEST, SHORTEST, Phrase, Split, split_of


def distinct_phrases(rng: random.Random, words: Phrase, split: Split, count: int) -> list[Phrase]:
    """So many of these words' phrases of a split, none twice, in the order in which they were drawn."""
    drawn: dict[Phrase, None] = {}
    while len(drawn) < count:
        phrase = tuple(rng.sample(words, rng.randint(SHORTEST, LONGEST)))
        if split_of(phrase) == split:
            drawn[phrase] = None
    return list(drawn)
