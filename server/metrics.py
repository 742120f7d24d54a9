"""What the server counts, for Prometheus: one registry per server. Gauges stand in `server.api.gauges`.

The label `adapter` is bounded: `base`, `name@version`, `mixture`, `other` beyond `MAX_ADAPTER_LABELS` of them, and
`unresolved` for a request that ended before it was known what would serve it.
"""

from __future__ import annotations

import time
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from server.records import Mixture

Outcome = Literal["completed", "cancelled", "refused", "failed"]

MAX_ADAPTER_LABELS = 256
BASE, MIXTURE, ROUTED, OTHER, UNRESOLVED = "base", "mixture", "routed", "other", "unresolved"

_FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_LOAD_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._labels: set[str] = set()
        self.requests = Counter(
            "multigraft_requests", "Generation requests by how they ended.", ["adapter", "outcome"], registry=registry
        )
        self.first_token = Histogram(
            "multigraft_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            ["adapter"],
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self.inter_token = Histogram(
            "multigraft_inter_token_latency_seconds",
            "Between two tokens of one choice.",
            ["adapter"],
            buckets=_INTER_TOKEN_S,
            registry=registry,
        )
        self.duration = Histogram(
            "multigraft_request_duration_seconds",
            "From the arrival of a request to its end.",
            ["adapter"],
            buckets=_REQUEST_S,
            registry=registry,
        )
        self.prompt_tokens = Counter("multigraft_prompt_tokens", "Prompt tokens.", ["adapter"], registry=registry)
        self.generation_tokens = Counter(
            "multigraft_generation_tokens", "Generated tokens.", ["adapter"], registry=registry
        )
        self.prefix_hits = Counter(
            "multigraft_prefix_cache_hit_tokens",
            "Prompt tokens found in the prefix cache.",
            ["adapter"],
            registry=registry,
        )
        self.load = Histogram(
            "multigraft_adapter_load_seconds",
            "Loading an adapter, by the tier it came from.",
            ["tier"],
            buckets=_LOAD_S,
            registry=registry,
        )
        self.swaps = Counter(
            "multigraft_adapter_swaps", "Times that a name began to mean another version.", registry=registry
        )
        self.refused = Counter(
            "multigraft_adapter_refused", "Adapters that were not let in.", ["reason"], registry=registry
        )

    def scrape(self) -> bytes:
        return generate_latest(self.registry)

    def adapter_loaded(self, tier: str, seconds: float) -> None:
        self.load.labels(tier).observe(seconds)

    def adapter_swapped(self) -> None:
        self.swaps.inc()

    def adapter_refused(self, reason: str) -> None:
        """`reason` is an error code, never a message: the label stays bounded."""
        self.refused.labels(reason).inc()

    def request_refused(self, outcome: Outcome) -> None:
        """A generation request that ended before it was known what would serve it."""
        self.requests.labels(UNRESOLVED, outcome).inc()

    def meter(self, mixture: Mixture, *, arrived: float) -> Meter:
        """`arrived` on the clock of `time.perf_counter`."""
        return Meter(self, self.adapter_label(mixture), arrived)

    def adapter_label(self, mixture: Mixture) -> str:
        if mixture.routing is not None and mixture.routing.mode == "arrow":
            return ROUTED
        if not mixture.terms:
            return BASE
        if len(mixture.terms) > 1:
            return MIXTURE
        label = f"{mixture.terms[0].name}@{mixture.terms[0].version}"
        if label not in self._labels:
            if len(self._labels) >= MAX_ADAPTER_LABELS:
                return OTHER
            self._labels.add(label)
        return label


class Meter:
    """The clock of one generation request. Its label is looked up once, not at every token."""

    def __init__(self, metrics: Metrics, adapter: str, arrived: float) -> None:
        self._metrics = metrics
        self._adapter = adapter
        self._arrived = arrived
        self._inter_token = metrics.inter_token.labels(adapter)
        self._last: dict[int, float] = {}
        self._ended = False

    def token(self, choice: int) -> None:
        now = time.perf_counter()
        last = self._last.get(choice)
        if last is not None:
            self._inter_token.observe(now - last)
        elif not self._last:
            self._metrics.first_token.labels(self._adapter).observe(now - self._arrived)
        self._last[choice] = now

    def finish(self, outcome: Outcome, *, prompt_tokens: int, generated_tokens: int, cached_tokens: int) -> None:
        """Idempotent: the first outcome stands."""
        if self._ended:
            return
        self._ended = True
        metrics, adapter = self._metrics, self._adapter
        metrics.requests.labels(adapter, outcome).inc()
        metrics.duration.labels(adapter).observe(time.perf_counter() - self._arrived)
        metrics.prompt_tokens.labels(adapter).inc(prompt_tokens)
        metrics.generation_tokens.labels(adapter).inc(generated_tokens)
        metrics.prefix_hits.labels(adapter).inc(cached_tokens)
