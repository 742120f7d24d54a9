"""What the registry tells Prometheus: requests by route, bytes by direction, and what it holds at that moment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from hub.errors import HubError
from hub.registry import LocalHub

STORED_LIFE_S = 30.0  # the bytes of all blobs are counted on the disk, not at every scrape
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class RegistryMetrics:
    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "multigraft_registry_requests",
            "Requests, by the pattern of their route.",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self._duration = Histogram(
            "multigraft_registry_request_duration_seconds",
            "From a request's head to the end of its answer; event streams are not counted.",
            ["route"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        moved = Counter("multigraft_registry_bytes", "Bytes of bodies.", ["direction"], registry=self.registry)
        self.received = moved.labels("in")
        self.sent = moved.labels("out")

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """`route` is a pattern and never a path, so that the labels stay few; so does `method`."""
        method = method if method in ("GET", "HEAD", "POST", "PATCH", "DELETE") else "other"
        self._requests.labels(route, method, str(status)).inc()
        if not route.endswith("/events"):
            self._duration.labels(route).observe(seconds)

    def scrape(self) -> bytes:
        return generate_latest(self.registry)


class Holdings(Collector):
    """Read at each scrape, so that nothing can go stale."""

    def __init__(self, hub: LocalHub, watchers: Callable[[], int]) -> None:
        self._hub = hub
        self._watchers = watchers
        self._stored = (0.0, 0)

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        space = os.statvfs(self._hub.home)
        yield GaugeMetricFamily("multigraft_registry_watchers", "Open event streams.", value=self._watchers())
        yield GaugeMetricFamily(
            "multigraft_registry_disk_free_bytes",
            "Free on the disk of the hub's home.",
            value=space.f_bavail * space.f_frsize,
        )
        try:
            names, versions = self._hub.counts()
            head, stored = self._hub.head(), self._stored_bytes()
        except HubError:
            return  # the catalogue cannot be read: /ready says so
        yield GaugeMetricFamily("multigraft_registry_adapters", "Names with a live version.", value=names)
        yield GaugeMetricFamily("multigraft_registry_versions", "Live versions.", value=versions)
        yield GaugeMetricFamily("multigraft_registry_event_seq", "Number of the last event.", value=head)
        yield GaugeMetricFamily("multigraft_registry_blob_bytes", "Bytes of all blobs.", value=stored)

    def _stored_bytes(self) -> int:
        at, stored = self._stored
        if time.monotonic() - at > STORED_LIFE_S or not at:
            stored = self._hub.stored_bytes()
            self._stored = (time.monotonic(), stored)
        return stored
