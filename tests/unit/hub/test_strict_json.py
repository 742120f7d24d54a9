"""JSON that two readers could understand differently is refused."""

import pytest

from hub.strict_json import BadJson, canonical, parse


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"x": {"a": 1, "a": 1}}', "stands twice"),
        (b"[NaN]", "no JSON number"),
        (b"[-Infinity]", "no JSON number"),
        (b"[1e999]", "not finite"),
        (b"\xff", "not UTF-8"),
        (b'"\\ud800"', "surrogate"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "too many digits"),
        (b"{", "line 1"),
        (b"", "line 1"),
    ],
)
def test_ambiguous_json_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadJson, match=reason):
        parse(data)


def test_the_canonical_text_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical({"b": 1, "a": [1, "ü"]}) == canonical({"a": [1, "ü"], "b": 1}) == b'{"a":[1,"\\u00fc"],"b":1}'
