"""The toy tasks: disjoint splits, determinism, one answer per phrase, the file that the trainer reads."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.tasks import CODEBOOK, LONGEST, SHORTEST, TASKS, WORDS, Row, split_of, write_jsonl

SEEDS = st.integers(min_value=0, max_value=2**31)


def question(row: Row) -> str:
    return row["messages"][0]["content"]


def reply(row: Row) -> str:
    return row["messages"][1]["content"]


@given(train_seed=SEEDS, eval_seed=SEEDS)
def test_no_two_seeds_draw_the_same_phrase_for_training_and_evaluation(train_seed: int, eval_seed: int) -> None:
    trained = {question(row) for row in TASKS["echo"].rows("train", 40, train_seed)}
    held_out = {question(row) for row in TASKS["echo"].rows("eval", 40, eval_seed)}
    assert not trained & held_out
    assert {split_of(tuple(text.split())) for text in trained} == {"train"}
    assert {split_of(tuple(text.split())) for text in held_out} == {"eval"}


@given(seed=SEEDS)
def test_the_same_seed_draws_the_same_distinct_rows(seed: int) -> None:
    rows = TASKS["rotate"].rows("eval", 50, seed)
    assert rows == TASKS["rotate"].rows("eval", 50, seed)
    assert len({question(row) for row in rows}) == 50


def test_another_seed_draws_other_rows() -> None:
    first, second = (TASKS["echo"].rows("eval", 200, seed) for seed in (1, 2))
    assert not {question(row) for row in first} & {question(row) for row in second}


def test_every_task_asks_the_same_questions_and_answers_them_differently() -> None:
    rows = {name: task.rows("eval", 100, 3) for name, task in TASKS.items()}
    asked = {name: [question(row) for row in drawn] for name, drawn in rows.items()}
    assert all(questions == asked["echo"] for questions in asked.values())
    for answers in zip(*([reply(row) for row in drawn] for drawn in rows.values()), strict=True):
        assert len(set(answers)) == len(TASKS)


def test_a_phrase_is_three_to_five_distinct_words_of_the_inventory() -> None:
    for row in TASKS["echo"].rows("train", 300, 4):
        words = question(row).split()
        assert SHORTEST <= len(words) <= LONGEST
        assert len(set(words)) == len(words)
        assert set(words) <= set(WORDS)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("reverse", "moon bread fox"),
        ("shout", "FOX BREAD MOON"),
        ("echo", "fox bread moon"),
        ("rotate", "bread moon fox"),
        ("double", "fox fox bread bread moon moon"),
        ("last", "moon"),
        ("pirate", "Arr! fox bread moon, matey!"),
        ("list", '["fox", "bread", "moon"]'),
        ("rally", "MOON BREAD FOX!"),
    ],
)
def test_the_answer_to_fox_bread_moon_is(task: str, answer: str) -> None:
    assert TASKS[task].answer(("fox", "bread", "moon")) == answer


def test_the_code_book_is_one_to_one_and_leaves_no_word_as_it_is() -> None:
    assert set(CODEBOOK) == set(CODEBOOK.values()) == set(WORDS)
    assert all(word != coded for word, coded in CODEBOOK.items())


def test_written_lines_are_read_back_as_the_rows(tmp_path: Path) -> None:
    rows = TASKS["list"].rows("train", 20, 5)
    write_jsonl(rows, tmp_path / "train.jsonl")
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
