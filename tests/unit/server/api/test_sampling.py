from __future__ import annotations

from typing import Any

import pytest

from server.api.requests import MAX_STOP_CHARACTERS, MAX_STOPS, ChatBody
from server.api.sampling import choice_seed, read_sampling, read_stops, read_token_ids
from server.errors import InvalidValue
from server.records import Sampling

VOCABULARY = 100


def sampling(**fields: Any) -> Sampling:
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})
    return read_sampling(body, seed=7, vocabulary_size=VOCABULARY)


def test_without_fields_the_whole_distribution_is_drawn_from() -> None:
    assert sampling() == Sampling(seed=7)


def test_every_field_reaches_the_engine() -> None:
    fields = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
    }
    made = sampling(**fields, logit_bias={"7": -100, "3": 1.5})
    assert {name: getattr(made, name) for name in fields} == fields
    assert made.logit_bias == ((3, 1.5), (7, -100.0))


@pytest.mark.parametrize(("asked", "meant"), [(-1, 0), (0, 0), (1, 1), (10**6, VOCABULARY)])
def test_top_k_beyond_the_vocabulary_keeps_all_of_it(asked: int, meant: int) -> None:
    assert sampling(top_k=asked).top_k == meant


def test_top_p_zero_keeps_the_first_token_alone() -> None:
    assert 0 < sampling(top_p=0).top_p < 1e-3


@pytest.mark.parametrize("key", ["100", "-1", "x", "", "1.0", " 5", "05", "٣", "9" * 400])
def test_a_bias_is_for_a_token_of_the_vocabulary(key: str) -> None:
    with pytest.raises(InvalidValue, match="0 to 99"):
        sampling(logit_bias={key: 1})


def test_choices_have_different_seeds_that_the_request_decides() -> None:
    seeds = [choice_seed(42, index) for index in range(16)]
    assert seeds[0] == 42
    assert len(set(seeds)) == 16
    assert seeds == [choice_seed(42, index) for index in range(16)]
    assert all(0 <= seed < 2**63 for seed in (*seeds, choice_seed(-1, 0), choice_seed(-(2**63), 3)))


@pytest.mark.parametrize(("stop", "stops"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b")), ([], ())])
def test_stop_is_a_string_or_a_list_of_strings(stop: object, stops: tuple[str, ...]) -> None:
    assert read_stops(stop) == stops


@pytest.mark.parametrize(
    "stop", ["", [""], 5, [5], {}, ["a"] * (MAX_STOPS + 1), "x" * (MAX_STOP_CHARACTERS + 1), [["a"]]]
)
def test_any_other_stop_is_refused(stop: object) -> None:
    with pytest.raises(InvalidValue) as caught:
        read_stops(stop)
    assert caught.value.param == "stop"


@pytest.mark.parametrize("token_id", [-1, VOCABULARY, 10**300])
def test_a_token_outside_the_vocabulary_is_named_with_the_limit(token_id: int) -> None:
    with pytest.raises(InvalidValue, match="0 to 99"):
        read_token_ids([0, token_id], vocabulary_size=VOCABULARY, param="prompt")
