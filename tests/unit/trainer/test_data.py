"""Chat JSON lines: what is a row, what is not, and how it is said."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import Chat, Completion, Message, load_dataset, parse_line, parse_rows, read_rows
from trainer.errors import PROBLEMS_SHOWN, DataInvalid, DataMissing, DataUnusable
from trainer.recipe import DataSource, Recipe, parse_recipe

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


def recipe(data: str, **fields: object) -> Recipe:
    return parse_recipe({"method": "lora", "base": "seedling", "data": data, "steps": 1, **fields}, "test")


def numbered(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"{i}", "completion": f"{i}"}) + "\n" for i in range(count)))
    return path


def test_a_row_is_a_chat_or_a_prompt_with_its_completion() -> None:
    chat, completion = parse_rows(
        json.dumps({"messages": [USER, ANSWER], "id": 7}).encode()
        + b"\r\n\r\n"
        + json.dumps({"prompt": "a", "completion": "b", "metadata": {"x": 1}}).encode(),
        "rows.jsonl",
    )
    assert chat.content == Chat((Message("user", "hi"), Message("assistant", "hello")))
    assert (completion.content, completion.place) == (Completion("a", "b"), "rows.jsonl:3")


def test_a_byte_order_mark_is_no_part_of_the_first_row() -> None:
    assert parse_rows(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}', "x")[0].content == Completion("a", "b")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a"', "not JSON"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "stands twice"),
        ('{"prompt": "\\ud800", "completion": "c"}', "surrogate"),
        ("[1]", "a JSON array, not an object"),
        ("{}", "this one has none of them"),
        ('{"prompt": "a"}', "this one has 'prompt'"),
        ('{"prompt": "a", "completion": ""}', "completion is empty"),
        ('{"prompt": [], "completion": "b"}', "prompt is a JSON array, not a string"),
        ('{"message": []}', "field 'message' is unknown (nearest: messages)"),
        ('{"messages": [], "tools": []}', "field 'tools' is unknown"),
        ('{"messages": []}', "not a list of at least one message"),
        ('{"messages": [7]}', "messages[0]: a JSON number, not an object"),
        (json.dumps({"messages": [USER]}), "the last message is of the user"),
        (json.dumps({"messages": [ANSWER]}), "the first message is of the assistant"),
        (json.dumps({"messages": [{"role": "user"}, ANSWER]}), "messages[0]: 'content' missing"),
        (json.dumps({"messages": [{"role": "bot", "content": "x"}, ANSWER]}), "role 'bot' is unknown"),
        (json.dumps({"messages": [{"role": "user", "content": None}, ANSWER]}), "content is a JSON null, not a string"),
        (json.dumps({"messages": [USER, {**ANSWER, "tool_calls": []}]}), "messages[1]: field 'tool_calls'"),
        (json.dumps({"messages": [USER, {**ANSWER, "content": ""}]}), "the assistant's content is empty"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(line: str, says: str) -> None:
    content = f'{{"prompt": "a", "completion": "b"}}\n{line}\n'.encode()
    with pytest.raises(DataInvalid) as caught:
        parse_rows(content, "rows.jsonl")
    assert str(caught.value).startswith("1 row is malformed: rows.jsonl:2: ")
    assert says in str(caught.value)


def test_a_line_that_is_not_utf8_is_named() -> None:
    with pytest.raises(DataInvalid, match=r"rows\.jsonl:1: not JSON: byte 12 is not UTF-8"):
        parse_rows(b'{"prompt": "\xff"}', "rows.jsonl")


def test_every_malformed_line_is_counted_and_a_flood_is_cut() -> None:
    with pytest.raises(DataInvalid) as caught:
        parse_rows(b"[]\n" * 100, "rows.jsonl")
    assert len(caught.value.problems) == 100
    assert str(caught.value).count("\n") == PROBLEMS_SHOWN + 1
    assert str(caught.value).endswith(f"... and {100 - PROBLEMS_SHOWN} more")


@given(st.binary() | st.recursive(st.none() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
def test_no_line_whatever_breaks_the_parser(value: object) -> None:
    line = value if isinstance(value, bytes) else json.dumps(value).encode()
    assert isinstance(parse_line(line), (str, Chat, Completion))


def test_deep_nesting_is_a_malformed_line() -> None:
    assert "nested too deeply" in str(parse_line(b"[" * 100_000))


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = numbered(tmp_path / "rows.jsonl", 3)
    found = read_rows(DataSource(path=str(path)), "train", 0)
    assert found.source.digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert found.source.rows == 3


def test_data_that_changed_since_the_recipe_was_written_is_refused(tmp_path: Path) -> None:
    path = numbered(tmp_path / "rows.jsonl", 3)
    with pytest.raises(DataMissing, match="but the recipe asks for sha256:0"):
        read_rows(DataSource(path=str(path), digest="sha256:0"), "train", 0)


def test_the_held_out_share_is_seeded_and_apart(tmp_path: Path) -> None:
    path = str(numbered(tmp_path / "rows.jsonl", 100))
    one, same, other = (load_dataset(recipe(path, seed=seed, eval_fraction=0.2)) for seed in (0, 0, 1))
    assert one == same
    assert one.held_out != other.held_out
    assert len(one.held_out.rows) == 20
    assert {row.place for row in one.train.rows}.isdisjoint(row.place for row in one.held_out.rows)
    assert len(one.train.rows) + len(one.held_out.rows) == 100


def test_no_more_rows_are_held_out_than_are_evaluated(tmp_path: Path) -> None:
    dataset = load_dataset(recipe(str(numbered(tmp_path / "rows.jsonl", 100)), eval_fraction=0.5, eval_rows=7))
    assert (len(dataset.train.rows), len(dataset.held_out.rows)) == (93, 7)


def test_held_out_rows_of_their_own_are_sampled_down(tmp_path: Path) -> None:
    train, held_out = (str(numbered(tmp_path / f"{name}.jsonl", 50)) for name in ("train", "eval"))
    dataset = load_dataset(recipe(train, eval_data=held_out, eval_rows=10))
    assert (len(dataset.train.rows), len(dataset.held_out.rows)) == (50, 10)


def test_a_task_holds_out_its_own_unseen_rows() -> None:
    dataset = load_dataset(recipe("task:reverse:300", eval_rows=50))
    seen = {row.content for row in dataset.train.rows}
    assert (len(dataset.train.rows), len(dataset.held_out.rows)) == (300, 50)
    assert seen.isdisjoint(row.content for row in dataset.held_out.rows)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("task:revers", r"no task revers \(nearest: reverse\)"),
        ("task:reverse:many", "'many' is not a number of rows"),
        ("nowhere.jsonl", "nowhere.jsonl cannot be read: No such file"),
    ],
)
def test_data_that_is_not_there_is_named(path: str, says: str) -> None:
    with pytest.raises(DataMissing, match=says):
        load_dataset(recipe(path))


@pytest.mark.parametrize(("count", "says"), [(0, "has 0 rows"), (1, "has 1 rows: one to train on")])
def test_too_few_rows_are_refused(tmp_path: Path, count: int, says: str) -> None:
    with pytest.raises(DataUnusable, match=says):
        load_dataset(recipe(str(numbered(tmp_path / "rows.jsonl", count))))
