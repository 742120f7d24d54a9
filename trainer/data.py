"""Training data: chat JSON lines in, rows out; a malformed line is named by file and number, and all of them at once.

A row is `{"messages": [...]}` that ends with the assistant's answer, or `{"prompt": text, "completion": text}`.
`id` and `metadata` may stand beside them and are not read; any other field is refused: it might mean what we do not do.
A source is a file, or `task:NAME[:ROWS]`, which draws rows of a toy task and goes through the same parser.
"""

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hub.strict_json import BadJson, parse
from trainer.errors import DataInvalid, DataMissing, DataUnusable
from trainer.recipe import DataSource, Recipe, nearest
from trainer.tasks import TASKS, Split

ROLES: Final = ("system", "user", "assistant")
UNREAD: Final = ("id", "metadata")
TASK_ROWS: Final[Mapping[Split, int]] = {"train": 4000, "eval": 200}


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Completion:
    prompt: str
    completion: str


Content = Chat | Completion


@dataclass(frozen=True)
class Row:
    place: str  # file:line
    content: Content


@dataclass(frozen=True)
class Rows:
    """What a source held. The digest is the sha256 of its bytes, as `sha256sum` prints it."""

    source: DataSource
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Dataset:
    train: Rows
    held_out: Rows


def load_dataset(recipe: Recipe) -> Dataset:
    """Read the rows to train on and those to hold out.

    Held out are the rows of eval_data; without it, the eval split of a task, or a seeded share of the file.
    """
    train = read_rows(recipe.data, "train", recipe.seed)
    if recipe.eval_data is not None:
        held_out = read_rows(recipe.eval_data, "eval", recipe.seed)
    elif recipe.data.path.startswith("task:"):
        task = ":".join(recipe.data.path.split(":")[:2])
        held_out = read_rows(DataSource(path=task), "eval", recipe.seed)
    else:
        train, held_out = split(train, recipe)
    if not train.rows or not held_out.rows:
        empty = train if not train.rows else held_out
        raise DataUnusable(f"{empty.source.path} has no rows")
    return Dataset(train, sample(held_out, recipe.eval_rows, recipe.seed))


def read_rows(source: DataSource, part: Split, seed: int) -> Rows:
    """Read a source whole. Raises DataMissing, DataInvalid."""
    content = draw_task(source.path, part, seed) if source.path.startswith("task:") else read_file(source.path)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if source.digest not in (None, digest):
        raise DataMissing(f"{source.path} holds {digest}, but the recipe asks for {source.digest}")
    rows = parse_rows(content, source.path)
    return Rows(DataSource(path=source.path, digest=digest, rows=len(rows)), rows)


def read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataMissing(f"data {path} cannot be read: {error.strerror}") from None


def draw_task(text: str, part: Split, seed: int) -> bytes:
    """Write out the rows that `task:NAME[:ROWS]` stands for."""
    name, _, count = text.removeprefix("task:").partition(":")
    if name not in TASKS:
        raise DataMissing(f"there is no task {name}{nearest(name, TASKS)}; known: {', '.join(TASKS)}")
    if count and not (count.isdecimal() and int(count)):
        raise DataMissing(f"{text}: {count!r} is not a number of rows")
    rows = TASKS[name].rows(part, int(count) if count else TASK_ROWS[part], seed)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def split(source: Rows, recipe: Recipe) -> tuple[Rows, Rows]:
    """Hold out a seeded share of the rows, at least one and at most eval_rows."""
    count = min(recipe.eval_rows, max(1, round(len(source.rows) * recipe.eval_fraction)))
    if len(source.rows) < 2:
        raise DataUnusable(
            f"{source.source.path} has {len(source.rows)} rows: one to train on and one to hold out are the least; "
            "more rows or --eval-data are needed"
        )
    chosen = set(random.Random(f"held-out/{recipe.seed}").sample(range(len(source.rows)), count))
    held_out = tuple(row for i, row in enumerate(source.rows) if i in chosen)
    kept = tuple(row for i, row in enumerate(source.rows) if i not in chosen)
    return Rows(source.source, kept), Rows(source.source, held_out)


def sample(rows: Rows, limit: int, seed: int) -> Rows:
    if len(rows.rows) <= limit:
        return rows
    chosen = sorted(random.Random(f"eval/{seed}").sample(range(len(rows.rows)), limit))
    return Rows(rows.source, tuple(rows.rows[i] for i in chosen))


def parse_rows(content: bytes, name: str) -> tuple[Row, ...]:
    """Parse JSON lines; blank lines are skipped. Raises DataInvalid with every malformed line."""
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        found = parse_line(line)
        if isinstance(found, str):
            problems.append(f"{place}: {found}")
        else:
            rows.append(Row(place, found))
    if problems:
        raise DataInvalid(problems)
    return tuple(rows)


def parse_line(line: bytes) -> Content | str:
    """Return the content of one line, or what is wrong with it."""
    try:
        value = parse(line)
    except BadJson as error:
        return f"not JSON: {str(error).removeprefix('line 1 ')}"
    if not isinstance(value, dict):
        return f"a JSON {json_type(value)}, not an object"
    fields = {key: field for key, field in value.items() if key not in UNREAD}
    if set(fields) == {"messages"}:
        return parse_messages(fields["messages"])
    if set(fields) == {"prompt", "completion"}:
        return parse_completion(fields)
    return misnamed(fields)


def misnamed(fields: Mapping[str, Any]) -> str:
    known = ("messages", "prompt", "completion", *UNREAD)
    strangers = [key for key in fields if key not in known]
    if strangers:
        return "; ".join(f"field {key!r} is unknown{nearest(key, known)}" for key in strangers)
    has = " and ".join(map(repr, fields)) if fields else "none of them"
    return f"a row has either 'messages' or both 'prompt' and 'completion'; this one has {has}"


def parse_completion(fields: Mapping[str, Any]) -> Completion | str:
    for key in ("prompt", "completion"):
        if not isinstance(fields[key], str):
            return f"{key} is a JSON {json_type(fields[key])}, not a string (chats go in 'messages')"
        if key == "completion" and not fields[key]:
            return f"{key} is empty"
    return Completion(fields["prompt"], fields["completion"])


def parse_messages(value: Any) -> Chat | str:
    if not isinstance(value, list) or not value:
        return "messages is not a list of at least one message"
    messages = []
    for i, item in enumerate(value):
        found = parse_message(item)
        if isinstance(found, str):
            return f"messages[{i}]: {found}"
        messages.append(found)
    if messages[0].role == "assistant":
        return "the first message is of the assistant: nothing was asked"
    if messages[-1].role != "assistant":
        return f"the last message is of the {messages[-1].role}, not of the assistant: there is nothing to learn"
    return Chat(tuple(messages))


def parse_message(item: Any) -> Message | str:
    if not isinstance(item, dict):
        return f"a JSON {json_type(item)}, not an object"
    strangers = [key for key in item if key not in ("role", "content")]
    if strangers:
        return f"field {strangers[0]!r} is not supported; a message has 'role' and 'content'"
    missing = [key for key in ("role", "content") if key not in item]
    if missing:
        return f"{' and '.join(map(repr, missing))} missing"
    if item["role"] not in ROLES:
        return f"role {item['role']!r} is unknown; known: {', '.join(ROLES)}"
    if not isinstance(item["content"], str):
        return f"content is a JSON {json_type(item['content'])}, not a string"
    if item["role"] == "assistant" and not item["content"]:
        return "the assistant's content is empty"
    return Message(item["role"], item["content"])


def json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]
