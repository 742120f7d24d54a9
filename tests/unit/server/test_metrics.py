from __future__ import annotations

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.api.gauges import MANY, Gauges
from server.contract import AdapterStatus
from server.metrics import BASE, MAX_ADAPTER_LABELS, MIXTURE, OTHER, Metrics
from server.records import AdapterTerm, Mixture
from server.text.tokenizer import Tokenizer
from tests.unit.server.api.fakes import FakeAdapters, FakeEngine, digest_of
from tests.unit.server.text.tokenizers_for_tests import byte_level


def term(name: str, version: int = 1) -> AdapterTerm:
    return AdapterTerm(name, name, version, digest_of(name, version), "lora")


def status(name: str, *references: str, tier: str = "device") -> AdapterStatus:
    return AdapterStatus(name, 1, digest_of(name, 1), "lora", tier, 1000, 0, False, 8, references)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.scrape().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def watched(*statuses: AdapterStatus, cache_bytes: int = 10_000) -> Metrics:
    adapters = FakeAdapters(resident_digests={one.digest: one for one in statuses})
    metrics = Metrics()
    metrics.registry.register(Gauges(FakeEngine(Tokenizer(byte_level())), adapters, cache_bytes))
    return metrics


def test_the_adapter_label_is_bounded() -> None:
    metrics = Metrics()
    assert metrics.adapter_label(Mixture()) == BASE
    assert metrics.adapter_label(Mixture((term("a", 3),))) == "a@3"
    assert metrics.adapter_label(Mixture((term("a"), term("b")))) == MIXTURE
    labels = {metrics.adapter_label(Mixture((term("n", version),))) for version in range(1000)}
    assert len(labels) == MAX_ADAPTER_LABELS  # one was taken by a@3, one is `other`
    assert OTHER in labels
    assert metrics.adapter_label(Mixture((term("a", 3),))) == "a@3", "a label once given is kept"


def test_a_meter_counts_one_request_once() -> None:
    metrics = Metrics()
    meter = metrics.meter(Mixture(), arrived=time.perf_counter() - 1.0)
    for choice in (0, 1, 0, 0):
        meter.token(choice)
    for outcome in ("completed", "cancelled"):
        meter.finish(outcome, prompt_tokens=5, generated_tokens=4, cached_tokens=3)
    found = samples(metrics)
    base = (("adapter", BASE),)
    assert found["multigraft_time_to_first_token_seconds_count", base] == 1
    assert found["multigraft_time_to_first_token_seconds_sum", base] >= 1.0
    assert found["multigraft_inter_token_latency_seconds_count", base] == 2
    assert found["multigraft_prompt_tokens_total", base] == 5
    assert found["multigraft_generation_tokens_total", base] == 4
    assert found["multigraft_prefix_cache_hit_tokens_total", base] == 3
    outcomes = {labels: value for (name, labels), value in found.items() if name == "multigraft_requests_total"}
    assert outcomes == {(("adapter", BASE), ("outcome", "completed")): 1}


def test_what_happens_to_adapters_is_counted() -> None:
    metrics = Metrics()
    metrics.adapter_loaded("hub", 0.02)
    metrics.adapter_swapped()
    metrics.adapter_refused("adapter_unavailable")
    found = samples(metrics)
    assert found["multigraft_adapter_load_seconds_count", (("tier", "hub"),)] == 1
    assert found["multigraft_adapter_swaps_total", ()] == 1
    assert found["multigraft_adapter_refused_total", (("reason", "adapter_unavailable"),)] == 1


def test_routers_see_every_name_of_every_resident_adapter_in_one_series() -> None:
    metrics = watched(
        status("a", "a", "a@1", "a@prod"),
        status("b", "b@1"),
        status("c", "c", tier="loading"),
        status("d", tier="failed"),
    )
    [(labels, value)] = [
        (dict(labels), value) for (name, labels), value in samples(metrics).items() if name == "vllm:lora_requests_info"
    ]
    assert labels["running_lora_adapters"] == "a,a@1,a@prod,b@1"
    assert labels["waiting_lora_adapters"] == "c"
    assert int(labels["max_lora"]) == 5 + 8, "the names that there are, and eight more adapters of 1000 bytes"
    assert value == pytest.approx(time.time(), abs=60)


def test_room_is_told_before_the_first_adapter_and_when_there_is_none() -> None:
    def room(metrics: Metrics) -> int:
        [labels] = [dict(labels) for name, labels in samples(metrics) if name == "vllm:lora_requests_info"]
        return int(labels["max_lora"])

    assert room(watched()) == MANY
    assert room(watched(status("a", "a"), cache_bytes=1000)) == 1


def test_bytes_are_summed_by_tier() -> None:
    found = samples(watched(status("a"), status("b"), status("d", tier="failed")))
    assert found["multigraft_adapter_resident_bytes", (("tier", "device"),)] == 2000
    assert ("multigraft_adapter_resident_bytes", (("tier", "failed"),)) not in found
