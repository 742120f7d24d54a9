"""The two patches that a client sends: RFC 7386, and Kubernetes' strategic merge, in which lists have keys.

Source: RFC 7386; k8s.io/apimachinery strategicpatch. Only the lists that the chart has are known by their keys.
"""

from __future__ import annotations

from typing import Any

KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "topologySpreadConstraints": "topologyKey",
    "ownerReferences": "uid",
}
PORT_KEYS = ("containerPort", "port")


def merge(old: Any, change: Any) -> Any:
    """A null removes; what is no object is replaced."""
    if not isinstance(change, dict):
        return change
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in change.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def strategic_merge(old: Any, change: Any, name: str = "") -> Any:
    """As `merge`, but a list of objects that have a key is merged object by object."""
    if isinstance(change, list):
        return _merge_list(old if isinstance(old, list) else [], change, name)
    if not isinstance(change, dict):
        return change
    if change.get("$patch") == "replace":
        return {key: value for key, value in change.items() if key != "$patch"}
    merged = dict(old) if isinstance(old, dict) else {}
    retained = change.get("$retainKeys")
    if retained is not None:
        merged = {key: value for key, value in merged.items() if key in retained}
    for key, value in change.items():
        if key.startswith(("$retainKeys", "$setElementOrder/")):
            continue
        if key.startswith("$deleteFromPrimitiveList/"):
            target = key.partition("/")[2]
            merged[target] = [item for item in merged.get(target, []) if item not in value]
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = strategic_merge(merged.get(key), value, key)
    for key, order in change.items():
        if key.startswith("$setElementOrder/"):
            _order(merged, key.partition("/")[2], order)
    return merged


def _merge_list(old: list[Any], change: list[Any], name: str) -> list[Any]:
    key = _key(name, [*old, *change])
    if key is None:
        return change
    merged = {item[key]: item for item in old}
    for item in change:
        if item.get("$patch") == "delete":
            merged.pop(item[key], None)
        else:
            merged[item[key]] = strategic_merge(merged.get(item[key]), item)
    return list(merged.values())


def _key(name: str, items: list[Any]) -> str | None:
    if name == "ports":
        return next((key for key in PORT_KEYS if items and all(key in item for item in items)), None)
    return KEYS.get(name)


def _order(merged: dict[str, Any], name: str, order: list[Any]) -> None:
    items = merged.get(name, [])
    key = _key(name, items)
    if key is not None:
        wanted = [item[key] for item in order]
        items.sort(key=lambda item: wanted.index(item[key]) if item[key] in wanted else len(wanted))
