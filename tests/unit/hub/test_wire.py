"""What travels: every error is heard as it was told, and no body becomes more than its limits say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hub.base import Linear, Modules
from hub.errors import BadTensors, HubError, HubUnavailable, Problem, Refused, UploadBusy
from hub.wire import (
    MAX_MODULE_NAME,
    MAX_MODULES,
    MAX_SIZE,
    BaseBody,
    Body,
    CommitBody,
    KeyBody,
    ModulesBody,
    MoveBody,
    code_of,
    commit_body,
    hear,
    tell,
)

BASE: dict[str, Any] = {
    "name": "tiny", "revision": None, "model_type": "llama", "hidden_size": 8, "layers": 2, "heads": 2, "kv_heads": 1,
    "head_dim": 4, "intermediate_size": None, "vocab_size": 9, "tokenizer": "0" * 64,
}  # fmt: skip
MODULES: dict[str, Any] = {"linears": {"a.q": [8, 8]}, "others": ["a.norm"]}

texts = st.text(max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["code", "message", "what", "problems", "offset", "file", "field", "reason"])
codes = st.sampled_from([code_of(kind) for kind in HubError.__subclasses__()]) | texts


@st.composite
def errors(draw: st.DrawFn) -> HubError:
    """Any error that a hub can tell."""
    kind = draw(st.sampled_from(HubError.__subclasses__()))
    message = draw(texts)
    if kind is Refused:
        problems = st.builds(Problem, file=texts, field=st.none() | texts, reason=texts)
        return Refused(message, draw(st.lists(problems, max_size=25)))
    if kind is BadTensors:
        return BadTensors(draw(st.lists(st.tuples(st.none() | texts, texts), max_size=3)))
    if kind is UploadBusy:
        return UploadBusy(message, offset=draw(st.integers(0, 2**53)))
    return kind(message)


@given(errors())
def test_an_error_is_heard_as_it_was_told(error: HubError) -> None:
    heard = hear(json.loads(json.dumps(tell(error))), otherwise="")
    assert type(heard) is type(error)
    assert str(heard) == str(error)
    assert heard.status == error.status
    if isinstance(error, Refused) and isinstance(heard, Refused):
        assert (heard.what, heard.problems) == (error.what, error.problems)
    if isinstance(error, UploadBusy) and isinstance(heard, UploadBusy):
        assert heard.offset == error.offset


def test_every_error_has_a_word_of_its_own() -> None:
    kinds = HubError.__subclasses__()
    assert len({code_of(kind) for kind in kinds}) == len(kinds)
    assert code_of(HubUnavailable) == "hub_unavailable"


@given(json_values | st.dictionaries(st.just("error"), st.dictionaries(keys, codes | json_values, max_size=8)))
def test_whatever_is_told_is_heard_as_some_error_of_ours(told: Any) -> None:
    error = hear(told, otherwise="this is no hub")
    assert isinstance(error, HubError)
    assert isinstance(str(error), str)


@pytest.mark.parametrize("told", [None, [], {}, {"error": "x"}, {"error": {"code": "not_found"}}, {"detail": "x"}])
def test_what_makes_no_sense_is_an_unavailable_hub(told: Any) -> None:
    error = hear(told, otherwise="this is no hub")
    assert (type(error), str(error)) == (HubUnavailable, "this is no hub")


def test_a_described_base_is_read_as_it_was_sent() -> None:
    body = CommitBody.model_validate({"base": BASE, "modules": MODULES, "aliases": ["prod"], "note": "why"})
    base, modules = body.base.record(), body.modules.record()
    assert modules == Modules({"a.q": Linear(8, 8)}, frozenset({"a.norm"}))
    assert CommitBody.model_validate(commit_body(base, modules, aliases=["prod"], note="why")) == body


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (BaseBody, {"layers": 0}),
        (BaseBody, {"layers": 10**6}),
        (BaseBody, {"layers": "2"}),
        (BaseBody, {"layers": 2.0}),
        (BaseBody, {"layers": True}),
        (BaseBody, {"vocab_size": MAX_SIZE + 1}),
        (BaseBody, {"name": "x" * 513}),
        (BaseBody, {"tokenizer": "0" * 63}),
        (BaseBody, {"tokenizer": "0" * 64 + "\n"}),
        (BaseBody, {"fingerprint": "0" * 64}),
        (ModulesBody, {"linears": {"": [8, 8]}}),
        (ModulesBody, {"linears": {"x" * (MAX_MODULE_NAME + 1): [8, 8]}}),
        (ModulesBody, {"linears": {"a": [8]}}),
        (ModulesBody, {"linears": {"a": [8, 8, 8]}}),
        (ModulesBody, {"parameters": {"a": [8, 8]}}),
        (ModulesBody, {"parameters": {"a": [8, 8, 0]}}),
        (ModulesBody, {"linears": {"a": [8, 0]}}),
        (ModulesBody, {"linears": {"a": [8, MAX_SIZE + 1]}}),
        (ModulesBody, {"linears": {"a": [8, True]}}),
        (ModulesBody, {"linears": {"a": [8, 8.0]}}),
        (ModulesBody, {"linears": {"a": "88"}}),
        (ModulesBody, {"linears": []}),
        (ModulesBody, {"others": ["x" * (MAX_MODULE_NAME + 1)]}),
        (ModulesBody, {"others": [""]}),
        (ModulesBody, {"others": "x"}),
    ],
)
def test_a_base_that_cannot_be_is_not_read(kind: type[Body], change: dict[str, Any]) -> None:
    good = BASE if kind is BaseBody else MODULES
    kind.model_validate(good)
    with pytest.raises(ValidationError):
        kind.model_validate({**good, **change})


@pytest.mark.parametrize("body", [MoveBody, KeyBody, CommitBody, BaseBody, ModulesBody])
def test_a_field_that_nobody_defines_is_refused_by_name(body: type[Body]) -> None:
    with pytest.raises(ValidationError, match="expct is no field here; there are"):
        body.model_validate({"expct": 1})


def wrong(body: type[Body], value: Any) -> int:
    """How many complaints a body gives."""
    with pytest.raises(ValidationError) as refused:
        body.model_validate(value)
    return refused.value.error_count()


def test_however_much_is_wrong_in_a_body_the_complaints_are_few() -> None:
    many = range(MAX_MODULES + 1)
    assert wrong(ModulesBody, {**MODULES, "linears": {f"a.{number}": 1 for number in many[1:]}}) == 1
    assert wrong(ModulesBody, {**MODULES, "linears": {f"a.{number}": [1, 1] for number in many}}) == 1
    assert wrong(ModulesBody, {**MODULES, "others": [1 for _ in many[1:]]}) == 1
    assert wrong(ModulesBody, {**MODULES, "others": ["a" for _ in many]}) == 1
    assert wrong(CommitBody, {str(number): 1 for number in many}) == 1


def test_a_base_of_the_largest_size_is_read() -> None:
    linears = {f"a.{number}": [1, MAX_SIZE] for number in range(MAX_MODULES)}
    assert len(ModulesBody.model_validate({"linears": linears, "others": []}).record().linears) == MAX_MODULES
