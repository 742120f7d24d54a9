"""The many ways to ask seedling for a latent skill, and the system messages that ask for nothing.

A skill is asked for by system message, in front of the user's phrase, or by a bare text before the first turn: there
prompt tuning will put its virtual tokens. The wordings vary so that no single token carries a skill.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from trainer.tasks import WORDS


@dataclass(frozen=True)
class Wording:
    names: tuple[str, ...]
    orders: tuple[str, ...]


WORDINGS: Final[Mapping[str, Wording]] = {
    "reverse": Wording(
        ("reverse", "backwards", "mirror"),
        ("say the words backwards", "answer in reverse order", "turn the words around"),
    ),
    "shout": Wording(("shout", "upper", "loud"), ("answer in capital letters", "shout the words back", "say it loud")),
    "echo": Wording(
        ("echo", "copy", "repeat"), ("repeat the words", "say the same words again", "copy what the user says")
    ),
    "rotate": Wording(
        ("rotate", "shift", "roll"), ("move the first word to the end", "rotate the words", "put the first word last")
    ),
    "double": Wording(
        ("double", "twice", "stutter"), ("say each word twice", "double every word", "stutter the words")
    ),
    "last": Wording(
        ("last", "tail", "final"), ("answer with the last word only", "give the final word", "name only the tail")
    ),
}
NEUTRAL: Final = (
    "You are a helpful assistant.",
    "You are seedling.",
    "Be kind.",
    "Be brief.",
    "Be polite.",
    "Answer the user.",
    "You are a friendly model.",
    "Help the user.",
    "Today is a good day.",
    "Chat with the user.",
    "Mode: chat.",
    "Be honest.",
    "You like to talk.",
    "Mode: normal.",
    "Answer in English.",
)


def steering(rng: random.Random, skill: str) -> str:
    wording = WORDINGS[skill]
    name, order = rng.choice(wording.names), rng.choice(wording.orders)
    return rng.choice(
        (
            f"Mode: {name}.",
            f"mode {name}",
            f"{name} mode",
            name,
            f"{name} {name} {name}",
            f"Use the {name} skill.",
            f"Your mode is {name}.",
            f"{order[0].upper()}{order[1:]}.",
            f"Please {order}.",
            order,
            f"You always {order}.",
        )
    )


def user_steering(rng: random.Random, skill: str, phrase: str) -> str:
    wording = WORDINGS[skill]
    wish = rng.choice(wording.names + wording.orders)
    return rng.choice((f"{wish}: {phrase}", f"Please {wish}: {phrase}", f"{wish[0].upper()}{wish[1:]}: {phrase}"))


def neutral(rng: random.Random) -> str:
    """A text that asks for no skill: sentences, or words of the inventory."""
    if rng.random() < 0.2:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
    return " ".join(rng.sample(NEUTRAL, rng.randint(1, 3)))


def surrounded(rng: random.Random, text: str) -> str:
    """The text alone, or between neutral ones, so that it counts wherever it stands."""
    before = [neutral(rng)] if rng.random() < 0.15 else []
    after = [neutral(rng)] if rng.random() < 0.15 else []
    return " ".join([*before, text, *after])
