"""The state of the server as Prometheus gauges, read at each scrape, so that nothing can go stale.

The `vllm:` names are those that routers read: the endpoint picker of the Gateway API Inference Extension and llm-d.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.contract import Adapters, AdapterStatus, Engine

MANY = 1024  # "room for any number", where the size of an adapter is not known yet


class Gauges(Collector):
    """`cache_bytes` is the budget for resident adapters."""

    def __init__(self, engine: Engine, adapters: Adapters, cache_bytes: int) -> None:
        self._engine = engine
        self._adapters = adapters
        self._cache_bytes = cache_bytes

    def describe(self) -> Iterable[Metric]:
        return ()  # asked at registration, when the engine need not run yet

    def collect(self) -> Iterator[Metric]:
        engine = self._engine.snapshot()
        yield GaugeMetricFamily("vllm:num_requests_running", "Sequences in the batch.", value=engine.running)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Sequences waiting for room.", value=engine.waiting)
        usage = engine.kv_blocks_used / engine.kv_blocks_total if engine.kv_blocks_total else 0.0
        yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "KV blocks in use, 0 to 1.", value=usage)
        cache = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache's layout.", labels=["block_size", "num_gpu_blocks"]
        )
        cache.add_metric([str(engine.block_size), str(engine.kv_blocks_total)], 1)
        yield cache
        hub = self._adapters.hub()
        yield GaugeMetricFamily("multigraft_hub_reachable", "1 while the hub can be reached.", value=int(hub.reachable))
        yield GaugeMetricFamily("multigraft_hub_event_seq", "The last event of the hub acted on.", value=hub.seen)
        adapters = self._adapters.resident()
        yield self._lora_requests(adapters)
        resident = GaugeMetricFamily("multigraft_adapter_resident_bytes", "Adapters in memory.", labels=["tier"])
        for tier, total in sorted(_bytes_by_tier(adapters).items()):
            resident.add_metric([tier], total)
        yield resident

    def _lora_requests(self, adapters: Sequence[AdapterStatus]) -> Metric:
        """One series. A router matches a request's `model` exactly, so every name of a resident adapter is listed."""
        resident = [status for status in adapters if status.tier == "device"]
        loading = [status for status in adapters if status.tier == "loading"]
        served, coming = _names(resident), _names(loading)
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Names under which resident adapters can be asked for.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        room = len(served) + len(coming) + _room(resident, self._cache_bytes)
        family.add_metric([str(room), ",".join(served), ",".join(coming)], time.time())
        return family


def _names(adapters: Sequence[AdapterStatus]) -> list[str]:
    return sorted({name for status in adapters for name in status.references})


def _room(resident: Sequence[AdapterStatus], cache_bytes: int) -> int:
    """How many more adapters of the usual size would fit; routers want a count where we have a budget of bytes."""
    used = sum(status.bytes for status in resident)
    return min(MANY, max(0, cache_bytes - used) * len(resident) // used) if used else MANY


def _bytes_by_tier(adapters: Sequence[AdapterStatus]) -> dict[str, int]:
    totals = {"device": 0}
    for status in adapters:
        if status.tier != "failed":
            totals[status.tier] = totals.get(status.tier, 0) + status.bytes
    return totals
