from __future__ import annotations

import json

from hypothesis import example, given
from hypothesis import strategies as st

from server.api.refusal import MAX_BODY_BYTES, error_body, error_response
from server.errors import Draining, InvalidValue, QueueFull, ServerError, Unauthorized

LONG = st.text(max_size=9).flatmap(lambda text: st.integers(0, 2000).map(lambda times: text * times))


@given(message=LONG, param=st.none() | LONG)
@example(message="x" * 5000, param=None)
@example(message="\U0001f331" * 5000, param="y" * 5000)
def test_an_error_has_four_keys_and_four_kilobytes_whatever_it_says(message: str, param: str | None) -> None:
    body = error_body(InvalidValue(message, param=param))
    assert len(body.encode()) <= MAX_BODY_BYTES
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "invalid_value"


def test_a_short_message_is_told_whole() -> None:
    assert json.loads(error_body(InvalidValue("n is 99", param="n"))) == {
        "error": {"message": "n is 99", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}
    }


def test_a_busy_server_says_when_to_come_back() -> None:
    response = error_response(QueueFull("full", retry_after_s=1.5))
    assert (response.status_code, response.headers["retry-after"], response.headers["retry-after-ms"]) == (
        503,
        "2",
        "1500",
    )
    assert error_response(Draining("bye")).headers["retry-after"] == "1"


def test_who_needs_a_key_is_told_which_kind() -> None:
    assert error_response(Unauthorized("no key")).headers["www-authenticate"] == "Bearer"


def leaves(root: type[ServerError]) -> list[type[ServerError]]:
    below = root.__subclasses__()
    return [root] if not below else [leaf for child in below for leaf in leaves(child)]


def test_every_error_of_the_tree_has_a_status_a_type_and_a_code() -> None:
    for leaf in leaves(ServerError):
        response = error_response(leaf("words"))
        error = json.loads(bytes(response.body))["error"]
        assert 400 <= response.status_code < 600
        assert error["type"] and isinstance(error["code"], str)
