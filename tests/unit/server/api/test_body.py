from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.body import check, parse_json
from server.api.fields import INERT, UNSUPPORTED, is_neutral
from server.api.requests import ChatBody, CompletionBody
from server.errors import InvalidValue, MalformedBody, ServerError, UnknownParameter, UnsupportedParameter

MESSAGES = [{"role": "user", "content": "Hi"}]


def read(fields: dict[str, Any], *, lenient: bool = False) -> ChatBody:
    return check(ChatBody, {"messages": MESSAGES, **fields}, lenient=lenient).body


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid UTF-8"),
        (b"[1]", "must be a JSON object"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\\ud800"}', "UTF-8"),
    ],
)
def test_what_is_no_json_object_is_a_malformed_body(body: bytes, words: str) -> None:
    with pytest.raises(MalformedBody, match=words):
        parse_json(body)


def test_a_pair_of_surrogate_escapes_is_a_character() -> None:
    assert parse_json(rb'{"a": "\ud83c\udf31"}') == {"a": "🌱"}


@given(
    value=st.dictionaries(
        st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=9), max_size=4
    )
)
def test_every_json_object_is_read_as_it_was_written(value: dict[str, Any]) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("temperature", 2.1, "2"),
        ("temperature", -0.1, "0"),
        ("top_p", 1.5, "1"),
        ("min_p", -1, "0"),
        ("top_k", -2, "-1"),
        ("presence_penalty", 3, "2"),
        ("frequency_penalty", -3, "-2"),
        ("repetition_penalty", 0, "0"),
        ("top_logprobs", 21, "20"),
        ("n", 0, "1"),
        ("max_tokens", 0, "1"),
        ("seed", 2**63, str(2**63 - 1)),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limit(field: str, value: object, limit: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        read({field: value})
    assert caught.value.param == field
    assert limit in caught.value.message
    assert str(value) in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.7"),
        ("temperature", True),
        ("temperature", 1e999),
        ("n", 1.5),
        ("n", True),
        ("stream", "yes"),
        ("model", 7),
        ("messages", "Hi"),
        ("messages", []),
        ("logit_bias", {"5": 101}),
        ("logit_bias", [5]),
        ("stream_options", []),
        ("adapters", [{"weight": 1.0}]),
        ("adapters", [{"ref": "a", "weight": 1e999}]),
        ("adapters", "a"),
        ("lora", [{"id": 3, "scale": 1.0}]),
        ("chat_template_kwargs", "x"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_not_converted(field: str, value: object) -> None:
    with pytest.raises((InvalidValue, MalformedBody)) as caught:
        read({field: value})
    assert (caught.value.param or "").startswith(field)


@pytest.mark.parametrize("name", sorted(INERT))
def test_a_field_that_changes_nothing_passes_with_any_value(name: str) -> None:
    read({name: {"anything": ["at", "all"]}})


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_a_field_that_we_do_not_act_on_passes_when_neutral_and_is_refused_by_name_otherwise(name: str) -> None:
    read({name: None})
    for neutral in UNSUPPORTED[name]:
        read({name: neutral})
    with pytest.raises(UnsupportedParameter, match=name) as caught:
        read({name: {"type": "something else"}})
    assert caught.value.param == name


def test_no_field_is_both_acted_on_and_listed_as_not() -> None:
    acted_on = {*ChatBody.model_fields, *CompletionBody.model_fields}
    assert not acted_on & {*INERT, *UNSUPPORTED}
    assert not INERT & set(UNSUPPORTED)


def test_true_is_not_one() -> None:
    assert is_neutral("best_of", 1)
    assert not is_neutral("best_of", True)
    assert not is_neutral("min_tokens", False)


def test_every_field_of_the_official_client_is_known() -> None:
    from openai.types import completion_create_params as completion
    from openai.types.chat import completion_create_params as chat

    known = {*ChatBody.model_fields, *INERT, *UNSUPPORTED}
    assert set(chat.CompletionCreateParamsBase.__annotations__) - known == set()
    known = {*CompletionBody.model_fields, *INERT, *UNSUPPORTED}
    assert set(completion.CompletionCreateParamsBase.__annotations__) - known == set()


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("toolz", "tools"), ("adapter", "adapters")],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(typo: str, meant: str) -> None:
    with pytest.raises(UnknownParameter, match=f"did you mean '{meant}'") as caught:
        read({typo: 1})
    assert caught.value.param == typo


def test_an_unknown_field_deep_inside_is_refused_with_its_path() -> None:
    with pytest.raises(UnknownParameter) as caught:
        read({"messages": [{"role": "user", "content": "Hi", "colour": "red"}]})
    assert caught.value.param == "messages[0].colour"


def test_a_lenient_server_passes_unknown_fields_over_and_lists_them() -> None:
    data = {"messages": [{"role": "user", "content": "Hi", "colour": "red"}], "zip": 1, "stream_options": {"x": 1}}
    checked = check(ChatBody, data, lenient=True)
    assert checked.body.messages[0].content == "Hi"
    assert set(checked.ignored) == {"messages[0].colour", "zip", "stream_options.x"}
    assert data["zip"] == 1, "the caller's data is not written to"
    assert data["messages"][0]["colour"] == "red"  # type: ignore[index]


def test_a_lenient_server_still_refuses_what_would_change_the_answer() -> None:
    with pytest.raises(UnsupportedParameter):
        read({"tools": [{"type": "function"}]}, lenient=True)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(MalformedBody, match="'messages' is missing"):
        check(ChatBody, {}, lenient=False)


@given(
    value=st.recursive(
        st.none() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_whatever_is_sent_the_complaint_is_ours_and_short(value: object) -> None:
    for field in ("messages", "adapters", "logit_bias", "stream_options", "n", "model", "nonsense"):
        try:
            read({field: value})
        except ServerError as error:
            assert error.status == 400
            assert len(error.message) < 1000
