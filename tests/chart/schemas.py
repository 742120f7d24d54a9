"""Kubernetes' own JSON schemas, strict: an unknown field is an error. One registry a version, since it takes a while.

The operator's two kinds are no part of Kubernetes; of them only the fields that the chart uses are known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from kubernetes_validate import utils
from referencing import Registry, Resource

STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
TEXT = {"type": "string"}


def _closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "required": sorted(properties),
    }


OPERATOR: Mapping[str, Any] = {
    "ServiceMonitor": _closed(
        selector=_closed(matchLabels=STRINGS),
        endpoints={
            "type": "array",
            "items": _closed(
                port=TEXT,
                path=TEXT,
                interval={"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                relabelings={
                    "type": "array",
                    "items": _closed(action={"enum": ["replace"]}, targetLabel=TEXT, replacement=TEXT),
                },
            ),
        },
    ),
    "PrometheusRule": _closed(groups={"type": "array", "items": _closed(name=TEXT, rules={"type": "array"})}),
}


def complaints(item: Mapping[str, Any], version: str) -> Iterator[str]:
    """What that version of Kubernetes would refuse in the object."""
    for error in _validator(item["apiVersion"], item["kind"], version).iter_errors(item):
        yield f"{item['kind']} {item['metadata']['name']}: {error.json_path}: {error.message[:300]}"


@cache
def _validator(api_version: str, kind: str, version: str) -> Draft202012Validator:
    if api_version == "monitoring.coreos.com/v1":
        metadata = _closed(name=TEXT, labels=STRINGS)
        return Draft202012Validator(_closed(apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=OPERATOR[kind]))
    group, _, name = api_version.rpartition("/")
    stem = f"{group.partition('.')[0]}-{name}" if group else name
    folder, full = _folder(version)
    schema = utils.schema_contents(f"{folder}/{kind.lower()}-{stem}.json", full)
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions(version))


@cache
def _definitions(version: str) -> Registry[Any]:
    folder, full = _folder(version)
    return Resource.from_contents(utils.schema_contents(f"{folder}/_definitions.json", full)) @ Registry()


def _folder(version: str) -> tuple[str, str]:
    [full] = {found for found in utils.all_versions() if found.startswith(f"{version}.")}
    return f"kubernetes-json-schema/v{full}-local-strict", full
