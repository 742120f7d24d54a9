"""Every series that the alerts and the dashboard may ask for, with its labels, and how to read them out of a query.

`test_processes.py` holds this table against what the two programs really show.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

TARGET = frozenset({"job", "instance", "namespace", "pod"})  # what Prometheus adds on Kubernetes

SERVER: Mapping[str, frozenset[str]] = {
    "multigraft_requests_total": frozenset({"adapter", "outcome"}),
    "multigraft_time_to_first_token_seconds_bucket": frozenset({"adapter", "le"}),
    "multigraft_inter_token_latency_seconds_bucket": frozenset({"adapter", "le"}),
    "multigraft_request_duration_seconds_bucket": frozenset({"adapter", "le"}),
    "multigraft_prompt_tokens_total": frozenset({"adapter"}),
    "multigraft_generation_tokens_total": frozenset({"adapter"}),
    "multigraft_prefix_cache_hit_tokens_total": frozenset({"adapter"}),
    "multigraft_adapter_load_seconds_bucket": frozenset({"tier", "le"}),
    "multigraft_adapter_resident_bytes": frozenset({"tier"}),
    "multigraft_adapter_swaps_total": frozenset(),
    "multigraft_hub_reachable": frozenset(),
    "multigraft_hub_event_seq": frozenset(),
    "vllm:num_requests_running": frozenset(),
    "vllm:num_requests_waiting": frozenset(),
    "vllm:kv_cache_usage_perc": frozenset(),
    "process_resident_memory_bytes": frozenset(),
    "process_cpu_seconds_total": frozenset(),
}
SELDOM: Mapping[str, frozenset[str]] = {  # shown only after a version was refused
    "multigraft_adapter_refused_total": frozenset({"reason"}),
}
REGISTRY: Mapping[str, frozenset[str]] = {
    "multigraft_registry_requests_total": frozenset({"route", "method", "status"}),
    "multigraft_registry_request_duration_seconds_bucket": frozenset({"route", "le"}),
    "multigraft_registry_bytes_total": frozenset({"direction"}),
    "multigraft_registry_adapters": frozenset(),
    "multigraft_registry_versions": frozenset(),
    "multigraft_registry_blob_bytes": frozenset(),
    "multigraft_registry_disk_free_bytes": frozenset(),
    "multigraft_registry_event_seq": frozenset(),
    "multigraft_registry_watchers": frozenset(),
    "process_resident_memory_bytes": frozenset(),
    "process_cpu_seconds_total": frozenset(),
}
KNOWN = {**SERVER, **SELDOM, **REGISTRY, "up": frozenset()}

_SELECTOR = re.compile(r"\b((?:multigraft_|vllm:|process_|up\b)[a-z0-9_:]*)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)")
_GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")


def asked(query: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Each series of a query, with the labels that its matchers name."""
    for name, matchers in _SELECTOR.findall(_GROUPING.sub("", query)):
        yield name, frozenset(_MATCHER.findall(matchers))


def grouped(query: str) -> frozenset[str]:
    """The labels by which a query aggregates or joins."""
    return frozenset(label for labels in _GROUPING.findall(query) for label in re.findall(r"\w+", labels))


def strange(query: str) -> list[str]:
    """What a query asks for and nobody shows."""
    series = list(asked(query))
    found = [name for name, _ in series if name not in KNOWN]
    for name, labels in series:
        found += [f"{name}{{{label}}}" for label in labels - KNOWN.get(name, labels) - TARGET]
    everything = TARGET.union(*(KNOWN.get(name, frozenset()) for name, _ in series))
    return found + sorted(grouped(query) - everything) + ([] if series else ["asks for nothing"])
