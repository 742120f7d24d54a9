"""The tree at the top of errors.py is the tree of the code."""

import re

import hub.errors as errors
from hub.errors import HubError, Problem, Refused


def test_every_error_stands_in_the_tree_with_its_status() -> None:
    documented = dict(re.findall(r"[├└]── (\w+)\s+(\d{3})", errors.__doc__ or ""))
    actual = {error.__name__: str(error.status) for error in HubError.__subclasses__()}
    assert actual == documented


def test_a_refusal_lists_its_problems_and_says_how_many_more_there_are() -> None:
    text = str(Refused("x", [Problem("f", str(number), "is wrong") for number in range(25)]))
    assert text.splitlines()[0] == "x was refused: 25 problems"
    assert "f: 19: is wrong" in text
    assert text.endswith("... and 5 more")
