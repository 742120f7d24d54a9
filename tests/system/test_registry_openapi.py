"""The registry's OpenAPI is true: whatever it allows is answered as it says, and what it does not allow is refused.

schemathesis makes requests from the description, good and bad ones; a fixed seed makes them the same each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hub.registry import LocalHub
from tests.registries import ADMIN_KEY, threaded
from tests.unit.hub.makers import write_base, write_prompt

EXAMPLES = 15
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
UNHELPFUL = list(HealthCheck)  # how fast examples are made is not what is tested
HEADERS = {"Authorization": f"Bearer {ADMIN_KEY}"}


@dataclass(frozen=True)
class Described:
    url: str
    document: dict[str, Any]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Described]:
    root = tmp_path_factory.mktemp("openapi")
    hub = LocalHub(root / "home")
    hub.push(write_prompt(root / "adapter", write_base(root / "base")), "team/bot", aliases=["prod"])
    with threaded(hub) as url:
        yield Described(url, httpx.get(f"{url}/openapi.json", headers=HEADERS).raise_for_status().json())


@pytest.fixture(scope="module")
def description(registry: Described) -> Any:
    found = schemathesis.openapi.from_dict(registry.document)
    found.config.base_url = registry.url
    return found.exclude(path="/api/v1/events")  # it never ends; tests/system/test_registry_events.py has it


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "not allowed"])
def test_every_route_answers_as_it_is_described(description: Any, mode: GenerationMode) -> None:
    tried = 0
    for found in description.get_all_operations():
        operation = found.ok()

        @seed(20261122)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=UNHELPFUL,
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def answers(case: schemathesis.Case[Any]) -> None:
            case.call_and_validate(checks=CHECKS, headers=HEADERS)

        try:
            answers()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # a route that takes nothing cannot be given anything wrong
            continue
        tried += 1
    assert tried > 20


def test_the_description_knows_every_route_that_is_not_hidden(registry: Described) -> None:
    paths = registry.document["paths"]
    assert "/api/v1/resolve" in paths
    assert "/{space}/{slug}/resolve/{revision}/{path}" in paths
    assert all("401" in operation["responses"] for methods in paths.values() for operation in methods.values())
