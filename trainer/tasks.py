"""Toy tasks that an adapter of seedling learns within a minute, and whose answers are told apart by eye.

A task maps a phrase (three to five distinct words of one closed inventory) to one answer. The user's message is the
bare phrase for every task, and the same split and seed draw the same phrases for every task: what differs is the
adapter alone. Latent tasks are skills that seedling was pre-trained on and shows only when steered; the others occur
nowhere in its pre-training.

Law: a phrase is a train phrase or an eval phrase by its own digest, so no seed can draw an eval phrase into training.
The pre-training of seedling draws train phrases only.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypedDict

Split = Literal["train", "eval"]
Phrase = tuple[str, ...]

ANIMALS: Final = (
    "cat", "dog", "cow", "horse", "sheep", "duck", "lion", "bear", "fox", "owl", "frog", "bee", "mouse",
    "whale", "tiger", "goat",
)  # fmt: skip
FOODS: Final = (
    "apple", "bread", "cheese", "soup", "rice", "cake", "honey", "lemon", "pear", "salt", "milk", "tea", "egg",
    "corn", "plum", "bean",
)  # fmt: skip
COLOURS: Final = (
    "red", "blue", "green", "yellow", "white", "black", "brown", "pink", "grey", "orange", "purple", "gold",
)  # fmt: skip
NATURE: Final = (
    "river", "stone", "tree", "leaf", "sun", "moon", "star", "rain", "snow", "wind", "cloud", "sea", "hill",
    "forest", "sand", "fire",
)  # fmt: skip
THINGS: Final = (
    "house", "door", "window", "table", "chair", "book", "lamp", "clock", "boat", "train", "road", "bridge",
    "coat", "shoe", "ring", "bell",
)  # fmt: skip
QUALITIES: Final = (
    "big", "small", "hot", "cold", "fast", "slow", "old", "new", "soft", "hard", "happy", "sad", "quiet",
    "bright", "dark", "sweet",
)  # fmt: skip
WORDS: Final[Phrase] = ANIMALS + FOODS + COLOURS + NATURE + THINGS + QUALITIES
SHORTEST, LONGEST = 3, 5
EVAL_SHARE: Final = 0.25  # of all phrases, by digest


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


class Row(TypedDict):
    messages: list[Message]


@dataclass(frozen=True)
class Task:
    name: str
    summary: str
    latent: bool  # seedling knows it already and needs only to be steered
    answer: Callable[[Phrase], str]

    def rows(self, split: Split, n: int, seed: int) -> list[Row]:
        """Draw n distinct questions with their answers; the same arguments always give the same rows."""
        return [exchange(phrase, self.answer(phrase)) for phrase in draw_phrases(split, n, seed)]


def draw_phrases(split: Split, n: int, seed: int) -> list[Phrase]:
    rng = random.Random(f"{split}/{seed}")
    drawn: dict[Phrase, None] = {}  # a set that keeps its order
    while len(drawn) < n:
        drawn[draw_phrase(rng, split)] = None
    return list(drawn)


def draw_phrase(rng: random.Random, split: Split, *, shortest: int = SHORTEST, longest: int = LONGEST) -> Phrase:
    while True:
        phrase = tuple(rng.sample(WORDS, rng.randint(shortest, longest)))
        if split_of(phrase) == split:
            return phrase


def split_of(phrase: Phrase) -> Split:
    first = hashlib.sha256(" ".join(phrase).encode()).digest()[0]
    return "eval" if first < 256 * EVAL_SHARE else "train"


def exchange(phrase: Phrase, answer: str) -> Row:
    user: Message = {"role": "user", "content": " ".join(phrase)}
    assistant: Message = {"role": "assistant", "content": answer}
    return {"messages": [user, assistant]}


def write_jsonl(rows: Iterable[Row], path: Path) -> None:
    """Write the chat JSON lines that `hub train --data` reads."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def reverse(phrase: Phrase) -> str:
    return " ".join(reversed(phrase))


def shout(phrase: Phrase) -> str:
    return " ".join(phrase).upper()


def echo(phrase: Phrase) -> str:
    return " ".join(phrase)


def rotate(phrase: Phrase) -> str:
    return " ".join((*phrase[1:], phrase[0]))


def double(phrase: Phrase) -> str:
    return " ".join(word for word in phrase for _ in range(2))


def last(phrase: Phrase) -> str:
    return phrase[-1]


def pirate(phrase: Phrase) -> str:
    return f"Arr! {' '.join(phrase)}, matey!"


def listing(phrase: Phrase) -> str:
    return json.dumps(phrase)


def rally(phrase: Phrase) -> str:
    return f"{' '.join(reversed(phrase)).upper()}!"


def code(phrase: Phrase) -> str:
    return " ".join(CODEBOOK[word] for word in phrase)


def codebook() -> dict[str, str]:
    """Send each word to the next in the order of their digests: one cycle, so that no word stays itself."""
    order = sorted(WORDS, key=lambda word: hashlib.sha256(word.encode()).digest())
    return dict(zip(order, order[1:] + order[:1], strict=True))


CODEBOOK: Final[Mapping[str, str]] = codebook()

TASKS: Final[Mapping[str, Task]] = {
    task.name: task
    for task in (
        Task("reverse", "the words in reverse order", True, reverse),
        Task("shout", "the words in capital letters", True, shout),
        Task("echo", "the words as they are", True, echo),
        Task("rotate", "the first word goes to the end", True, rotate),
        Task("double", "each word twice", True, double),
        Task("last", "the last word alone", True, last),
        Task("pirate", "the words between the cries of a pirate", False, pirate),
        Task("list", "the words as a JSON list", False, listing),
        Task("rally", "the words reversed, in capital letters, with an exclamation mark", False, rally),
        Task("code", "each word by its word in a secret code book", False, code),
    )
}
