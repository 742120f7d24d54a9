from __future__ import annotations

import threading
import time

import httpx

from server.contract import HubStatus
from tests.unit.server.api.live import BASE, Live, wait_until

HI = [{"role": "user", "content": "Hi"}]


def test_a_server_that_works_is_well_and_ready(http: httpx.Client) -> None:
    assert (http.get("/health").status_code, http.get("/health").json()) == (200, {"status": "ok"})
    ready = http.get("/ready")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "hub": "reachable"})
    assert http.get("/version").json() == {"version": "0.0.test", "base": BASE}


def test_a_server_whose_hub_is_away_is_ready_and_says_so(live: Live, http: httpx.Client) -> None:
    live.adapters.status = HubStatus(False, 7, time.time() - 60)
    ready = http.get("/ready")
    assert (ready.status_code, ready.json()["status"], ready.json()["hub"]) == (200, "ready", "away")
    assert ready.json()["hub_away_s"] >= 60
    lines = http.get("/metrics").text.splitlines()
    assert "multigraft_hub_reachable 0.0" in lines
    assert "multigraft_hub_event_seq 7.0" in lines


def test_a_dead_engine_is_neither_well_nor_ready(live: Live, http: httpx.Client) -> None:
    live.engine.alive = False
    assert (http.get("/health").status_code, http.get("/ready").status_code) == (503, 503)


def test_a_draining_server_finishes_what_runs_and_takes_nothing_new(live: Live, http: httpx.Client) -> None:
    live.engine.step_s = 0.02
    finished: list[str] = []

    def run() -> None:
        body = {"messages": HI, "stream": True}
        finished.append(httpx.post(live.url + "/v1/chat/completions", json=body, timeout=10).text)

    running = threading.Thread(target=run)
    running.start()
    wait_until(lambda: live.engine.open == 1)
    live.app.state.draining = True
    assert (http.get("/health").status_code, http.get("/ready").status_code) == (200, 503)
    for route, body in (("/v1/chat/completions", {"messages": HI}), ("/v1/completions", {"prompt": "Hi"})):
        refused = http.post(route, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"]
    assert http.get("/v1/models").status_code == 200
    running.join(10)
    assert finished[0].endswith("data: [DONE]\n\n")


def test_requests_are_counted_by_how_they_ended(live: Live, http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json={"messages": HI, "model": "pirate", "max_tokens": 4})
    http.post("/v1/chat/completions", json={"messages": HI, "model": "pirate", "max_tokens": 4, "stream": True})
    http.post("/v1/chat/completions", json={"messages": HI, "model": "pirate+soft", "max_tokens": 4})
    http.post("/v1/chat/completions", json={"messages": HI, "model": "nobody"})
    http.post("/v1/chat/completions", json={"nonsense": 1})
    text = http.get("/metrics").text
    for line in (
        'multigraft_requests_total{adapter="pirate@2",outcome="completed"} 2.0',
        'multigraft_requests_total{adapter="mixture",outcome="completed"} 1.0',
        'multigraft_requests_total{adapter="unresolved",outcome="refused"} 2.0',
        'multigraft_generation_tokens_total{adapter="pirate@2"} 8.0',
        'multigraft_time_to_first_token_seconds_count{adapter="pirate@2"} 2.0',
        'multigraft_inter_token_latency_seconds_count{adapter="pirate@2"} 6.0',
        'multigraft_request_duration_seconds_count{adapter="pirate@2"} 2.0',
        "vllm:num_requests_running 0.0",
        "vllm:num_requests_waiting 0.0",
        "vllm:kv_cache_usage_perc 0.0",
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="1000"} 1.0',
    ):
        assert line in text
    prompt = len(live.engine.requests[0].prompt_ids)
    assert f'multigraft_prefix_cache_hit_tokens_total{{adapter="pirate@2"}} {prompt - 1}.0' in text
    assert f'multigraft_prompt_tokens_total{{adapter="pirate@2"}} {2 * prompt}.0' in text
