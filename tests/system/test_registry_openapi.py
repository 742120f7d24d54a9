"""The registry's OpenAPI is true: whatever it allows is answered as it says, and what it does not allow is refused.

schemathesis makes requests from the description, good and bad ones; a fixed seed makes them the same each time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hub.manifest import CONFIG_FILE
from hub.registry import LocalHub
from tests.registries import ADMIN_KEY, threaded
from tests.unit.hub.makers import write_base, write_prompt

SEED = 20261122
EXAMPLES = 10
EXAMPLES_OF_WHAT_IS_THERE = 8
UNHELPFUL = list(HealthCheck)  # how fast examples are made is not what is tested
HEADERS = {"Authorization": f"Bearer {ADMIN_KEY}"}
FILES = (
    "/api/v1/files/{digest}/{path}",
    "/{space}/{slug}/resolve/{revision}/{path}",
    "/{slug}/resolve/{revision}/{path}",
)


def a_wrong_body_is_refused(_context: Any, response: Any, case: Any) -> None:
    """Bodies only: whatever a query holds is text, and text is often allowed."""
    body = case.meta.components.get(ParameterLocation.BODY)
    assert body is None or body.mode is GenerationMode.POSITIVE or response.status_code >= 400


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    a_wrong_body_is_refused,
]


@dataclass(frozen=True)
class Described:
    """`there` are values of parameters that name something in this registry."""

    url: str
    document: dict[str, Any]
    there: Mapping[str, str]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Described]:
    """One adapter, with a namespace and without."""
    root = tmp_path_factory.mktemp("openapi")
    hub = LocalHub(root / "home")
    folder = write_prompt(root / "adapter", write_base(root / "base"))
    hub.push(folder, "bot", aliases=["prod"])
    digest = hub.push(folder, "team/bot", aliases=["prod"]).digest
    there = {
        "name": "team/bot", "space": "team", "slug": "bot", "revision": "prod", "path": CONFIG_FILE, "digest": digest,
        "ref": "team/bot@prod", "range": "bytes=5-9",
    }  # fmt: skip
    with threaded(hub) as url:
        document = httpx.get(f"{url}/openapi.json", headers=HEADERS).raise_for_status().json()
        upload = {"name": "bot", "files": [{"path": "README.md", "size": 1, "sha256": "0" * 64}]}
        begun = httpx.post(f"{url}/api/v1/uploads", headers=HEADERS, json=upload).raise_for_status().json()
        yield Described(url, document, {**there, "upload": begun["upload"], "sha256": "0" * 64})


@pytest.fixture(scope="module")
def description(registry: Described) -> Any:
    found = schemathesis.openapi.from_dict(registry.document)
    found.config.base_url = registry.url
    return found.exclude(path="/api/v1/events")  # it never ends; tests/system/test_registry_events.py has it


def answers_of(
    operation: Any, mode: GenerationMode, *, examples: int, change: Callable[[Any], None] = lambda case: None
) -> Counter[int]:
    """Ask one route many times, check every answer, and count them by status."""
    counted: Counter[int] = Counter()

    @seed(SEED)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=UNHELPFUL
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case[Any]) -> None:
        change(case)
        counted[case.call_and_validate(checks=CHECKS, headers=HEADERS).status_code] += 1

    ask()
    return counted


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "not allowed"])
def test_every_route_answers_as_it_is_described(description: Any, mode: GenerationMode) -> None:
    tried = 0
    for found in description.get_all_operations():
        try:
            answers_of(found.ok(), mode, examples=EXAMPLES)
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # a route that takes nothing cannot be given anything wrong
            continue
        tried += 1
    assert tried > 20


def test_what_is_there_is_answered_as_it_is_described(description: Any, registry: Described) -> None:
    """Made-up names are never there, so no route that takes one would ever be seen to answer with what it has."""

    def name_what_is_there(case: Any) -> None:
        for values in (case.path_parameters, case.query, case.headers):
            for name in values or ():
                if name in registry.there:
                    values[name] = registry.there[name]

    for found in description.include(method=["GET", "HEAD", "PATCH"]).get_all_operations():
        operation = found.ok()
        counted = answers_of(
            operation, GenerationMode.POSITIVE, examples=EXAMPLES_OF_WHAT_IS_THERE, change=name_what_is_there
        )
        assert counted.keys() & {200, 206} or operation.method.upper() == "PATCH", (operation.label, counted)
        assert operation.path not in FILES or 206 in counted, (operation.label, counted)


def test_the_description_knows_every_route_that_is_not_hidden(registry: Described) -> None:
    paths = registry.document["paths"]
    assert "/api/v1/resolve" in paths
    assert set(FILES) <= set(paths)
    assert all("401" in operation["responses"] for methods in paths.values() for operation in methods.values())
    operations = [operation["operationId"] for methods in paths.values() for operation in methods.values()]
    assert len(operations) == len(set(operations))
