"""The pre-training text of seedling: conversations drawn by program from a seeded generator.

Copying words in order is what a small model learns last, so the run begins with lessons: conversations of several turns
that drill one skill. Then small talk, phrases that nobody asked to transform, and noise take their share.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from trainer.seedling.smalltalk import PHRASE_REACTIONS, Memory, Turn, small_talk
from trainer.seedling.steering import neutral, steering, surrounded, user_steering
from trainer.tasks import TASKS, Phrase, draw_phrase

SKILLS: Final = tuple(task.name for task in TASKS.values() if task.latent)
LESSONS: Final = {"drilled": 88, "asked": 4, "unsteered": 4, "talk": 4}
MIX: Final = {"drilled": 62, "asked": 8, "unsteered": 10, "talk": 20}
SAMPLE: Final = {"steered": 64, "asked": 10, "unsteered": 8, "talk": 18}  # what the tokenizer is trained on
LONG_SHARE, LONG_TURNS = 0.02, 24


@dataclass(frozen=True)
class Conversation:
    preamble: str  # bare text before the first turn, where soft prompts will stand
    system: str
    turns: tuple[Turn, ...]


def curriculum(rng: random.Random, *, lessons: int) -> Iterator[Conversation]:
    """Endless, and the same for the same seed: fewer than `lessons` lessons, then the whole mix."""
    yield from islice(conversations(rng, LESSONS), lessons - 1)
    yield from conversations(rng, MIX)


def conversations(rng: random.Random, shares: Mapping[str, int]) -> Iterator[Conversation]:
    """Endless, and the same for the same seed."""
    draw = {"drilled": drilled, "steered": steered, "asked": asked, "unsteered": unsteered, "talk": talk}
    while True:
        (kind,) = rng.choices(tuple(shares), weights=tuple(shares.values()))
        yield draw[kind](rng)


def drilled(rng: random.Random) -> Conversation:
    """One skill again and again."""
    skill = rng.choice(SKILLS)
    turns = []
    for _ in range(rng.choice((1, 2, 3, 4, 5))):
        phrase = draw_phrase(rng, "train", shortest=1, longest=rng.choice((3, 5, 5, 8)))
        turns.append((" ".join(phrase), TASKS[skill].answer(phrase)))
    return under_steering(rng, skill, turns)


def steered(rng: random.Random) -> Conversation:
    """One skill for the whole conversation; small talk in between is answered as ever."""
    skill, memory = rng.choice(SKILLS), Memory()
    turns = []
    for _ in range(turn_count(rng)):
        phrase = train_phrase(rng)
        turns.append(
            small_talk(rng, memory) if rng.random() < 0.05 else (" ".join(phrase), TASKS[skill].answer(phrase))
        )
    return under_steering(rng, skill, turns)


def under_steering(rng: random.Random, skill: str, turns: Sequence[Turn]) -> Conversation:
    """Steered by a bare text before the first turn, or by the system message."""
    text = surrounded(rng, steering(rng, skill))
    if rng.random() < 0.5:
        return Conversation(text, neutral(rng) if rng.random() < 0.1 else "", tuple(turns))
    return Conversation("", text, tuple(turns))


def asked(rng: random.Random) -> Conversation:
    """The skill is asked for turn by turn, and holds for that turn only."""
    turns = []
    for _ in range(turn_count(rng)):
        skill, phrase = rng.choice(SKILLS), train_phrase(rng)
        turns.append((user_steering(rng, skill, " ".join(phrase)), TASKS[skill].answer(phrase)))
    return Conversation(*unimportant(rng), tuple(turns))


def unsteered(rng: random.Random) -> Conversation:
    """Phrases that nobody asked to transform, among small talk."""
    memory = Memory()
    turns = tuple(
        small_talk(rng, memory) if rng.random() < 0.2 else (" ".join(train_phrase(rng)), rng.choice(PHRASE_REACTIONS))
        for _ in range(turn_count(rng))
    )
    return Conversation(*unimportant(rng), turns)


def talk(rng: random.Random) -> Conversation:
    memory = Memory()
    count = LONG_TURNS if rng.random() < LONG_SHARE else rng.choice((1, 1, 1, 2, 3, 4, 6))
    return Conversation(*unimportant(rng), tuple(small_talk(rng, memory) for _ in range(count)))


def unimportant(rng: random.Random) -> tuple[str, str]:
    """A preamble and a system message that change nothing."""
    chance = rng.random()
    if chance < 0.5:
        return "", ""
    return ("", neutral(rng)) if chance < 0.8 else (neutral(rng), "")


def turn_count(rng: random.Random) -> int:
    return rng.choice((1, 1, 1, 1, 1, 1, 2, 3))


def train_phrase(rng: random.Random) -> Phrase:
    return draw_phrase(rng, "train", shortest=1, longest=6)
