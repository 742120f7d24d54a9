"""What happens to running and new requests when versions move, fail, leave, and when the server dies."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch

from tests.system.conftest import ADMIN, BASE, hub, serving

RandomAdapter = Callable[[str, int], Path]
KINDS = ["lora", "ia3", "prefix", "prompt"]
# One for all threads, without the certificates that `httpx.post` loads at each call: two dozen streams share two cores.
CLIENT = httpx.Client(verify=False, timeout=120)


def ask(url: str, model: str, content: str = "red apple", tokens: int = 24) -> tuple[str, list[dict[str, Any]]]:
    """Greedy, without end: the text and what served it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = CLIENT.post(f"{url}/v1/chat/completions", json=body)
    answer.raise_for_status()
    return answer.json()["choices"][0]["message"]["content"], answer.json()["adapters"]


def stream(url: str, model: str, tokens: int) -> tuple[str, str]:
    """The whole text of one streamed answer and the digest that its first chunk names ("" for the base)."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "red apple"}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    text, digest, ended = "", None, False
    with CLIENT.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                if digest is None:
                    digest = chunk["adapters"][0]["digest"] if chunk["adapters"] else ""
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
    assert ended and digest is not None, "the stream was dropped"
    return text, digest


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def metric(url: str, name: str) -> float:
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith(name) and not line.startswith("#"):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"no metric {name}")


def push(home: Path, folder: Path, name: str) -> str:
    """The digest."""
    return hub(home, "push", folder, name).stdout.split()[-1]


@pytest.fixture
def four(home: Path, random_adapter: RandomAdapter) -> dict[str, str]:
    """Two versions of each kind, `prod` on the first; digest -> NAME@N."""
    digests = {}
    for kind in KINDS:
        for version in (1, 2):
            digests[push(home, random_adapter(kind, version), kind)] = f"{kind}@{version}"
        hub(home, "alias", f"{kind}@1", "prod")
    return digests


def test_moving_aliases_drops_no_stream_and_every_text_is_its_own_digests(home: Path, four: dict[str, str]) -> None:
    tokens = 60
    with serving(home) as server:
        alone = {digest: ask(server.url, label, tokens=tokens)[0] for digest, label in four.items()}
        alone[""] = ask(server.url, BASE, tokens=tokens)[0]
        assert len(set(alone.values())) == len(alone), f"two adapters answer alike, which would prove nothing: {alone}"
        done = threading.Event()
        seen: list[tuple[str, str]] = []
        failures: list[BaseException] = []

        def keep_asking(model: str) -> None:
            try:
                while not done.is_set():
                    seen.append(stream(server.url, model, tokens))
            except BaseException as error:  # noqa: BLE001  handed to the test
                failures.append(error)

        models = ["lora@prod", "ia3@prod", "prefix@prod", "prompt@prod", BASE, "lora@prod"] * 2
        threads = [threading.Thread(target=keep_asking, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        last = {}
        for move in range(10):
            kind = KINDS[move % 4]
            version = 2 if (move // 4) % 2 == 0 else 1
            hub(home, "alias", f"{kind}@{version}", "prod")
            last[kind] = version
        wait_for(lambda: metric(server.url, "multigraft_adapter_swaps_total") >= 10)
        count = len(seen)
        wait_for(lambda: len(seen) >= count + 24, 60)
        done.set()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
        for text, digest in seen:
            assert text == alone[digest], f"{four.get(digest, BASE)} did not answer as it does alone"
        assert {digest for _, digest in seen} >= {*four, ""}, "a version never served"
        for kind, version in last.items():
            assert ask(server.url, f"{kind}@prod")[1][0]["version"] == version


def with_golden(folder: Path, copy: Path, *, spoil: float = 0.0) -> Path:
    """The adapter with golden rows that PEFT computed, moved by `spoil` standard deviations."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from hub.base import find_base

    shutil.copytree(folder, copy)
    model = AutoModelForCausalLM.from_pretrained(find_base(BASE), dtype=torch.float32)
    ids = torch.arange(5, 17)
    with torch.inference_mode():
        logits = PeftModel.from_pretrained(model, copy).eval()(ids[None]).logits[0, -1].float()
    generator = torch.Generator().manual_seed(0)
    logits = logits + spoil * logits.std() * torch.randn(logits.shape, generator=generator)
    safetensors.torch.save_file({"0.input_ids": ids, "0.logits": logits}, copy / "golden.safetensors")
    (copy / "golden.json").write_text(json.dumps({"schema_version": 1, "rows": [{"prompt": "?", "tokens": 12}]}))
    return copy


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_a_version_that_fails_its_golden_rows_never_serves(
    kind: str, home: Path, random_adapter: RandomAdapter, tmp_path: Path
) -> None:
    push(home, with_golden(random_adapter(kind, 1), tmp_path / "good"), "bot")
    with serving(home) as server:
        text, served = ask(server.url, "bot")
        assert served[0]["version"] == 1
        bad = push(home, with_golden(random_adapter(kind, 2), tmp_path / "bad", spoil=0.3), "bot")

        def refused() -> bool:
            lines = httpx.get(f"{server.url}/v1/adapters").json()["data"]
            return any(line["digest"] == bad and line["tier"] == "failed" for line in lines)

        wait_for(refused)
        assert ask(server.url, "bot") == (text, served), "the version before did not keep serving"
        assert metric(server.url, 'multigraft_adapter_refused_total{reason="adapter_unavailable"}') == 1
        assert any("golden row 0 is off by" in line for line in server.lines)
        asked = httpx.post(f"{server.url}/v1/completions", json={"model": "bot@2", "prompt": "x"})
        assert asked.status_code == 502
        assert asked.json()["error"]["code"] == "adapter_unavailable"
        good = push(home, with_golden(random_adapter(kind, 3), tmp_path / "better"), "bot")
        wait_for(lambda: ask(server.url, "bot")[1][0]["digest"] == good)


def test_the_cache_evicts_what_nobody_holds_and_never_what_is_pinned(home: Path, random_adapter: RandomAdapter) -> None:
    for seed in range(1, 5):
        push(home, random_adapter("lora", seed), f"bot-{seed}")
    with serving(home) as probe:
        ask(probe.url, "bot-1")
        one = httpx.get(f"{probe.url}/v1/adapters").json()["data"][0]["bytes"]
    with serving(home, "--adapter-bytes", str(2 * one + 1)) as server:

        def resident() -> set[str]:
            return {line["name"] for line in httpx.get(f"{server.url}/v1/adapters").json()["data"]}

        first = ask(server.url, "bot-1")[0]
        ask(server.url, "bot-2")
        ask(server.url, "bot-1")
        ask(server.url, "bot-3")
        assert resident() == {"bot-1", "bot-3"}, "the least recently used one was to leave"
        pinned = httpx.post(f"{server.url}/v1/adapters/pin", json={"ref": "bot-3"}, headers=ADMIN)
        assert pinned.status_code == 200, pinned.text
        ask(server.url, "bot-4")
        ask(server.url, "bot-2")
        assert resident() == {"bot-3", "bot-2"}
        assert ask(server.url, "bot-1")[0] == first, "an adapter that came back answers otherwise"


def test_a_killed_server_leaves_a_hub_that_verifies(home: Path, four: dict[str, str]) -> None:
    with serving(home) as server:
        asking = threading.Thread(target=lambda: _ignore(lambda: stream(server.url, "lora@prod", 200)), daemon=True)
        asking.start()
        wait_for(lambda: metric(server.url, "vllm:num_requests_running") >= 1)
        server.stop(signal.SIGKILL)
    for label in four.values():
        hub(home, "verify", label)
    with serving(home) as server:
        assert ask(server.url, "lora@prod")[1][0]["version"] == 1


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(home: Path, four: dict[str, str]) -> None:
    with serving(home) as server:
        whole = ask(server.url, "lora@1", tokens=400)[0]
        results: list[tuple[str, str]] = []
        running = threading.Thread(target=lambda: results.append(stream(server.url, "lora@1", 400)))
        running.start()
        wait_for(lambda: metric(server.url, "vllm:num_requests_running") >= 1)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503, 5)
        late = httpx.post(f"{server.url}/v1/completions", json={"model": BASE, "prompt": "x"})
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "draining"
        assert "retry-after" in late.headers
        running.join()
        assert results[0][0] == whole
        assert server.process.wait(timeout=30) == 0


def _ignore(call: Callable[[], object]) -> None:
    try:
        call()
    except (httpx.HTTPError, AssertionError):
        return


def test_requests_in_flight_are_freed_when_their_clients_leave(home: Path, four: dict[str, str]) -> None:
    with serving(home) as server, httpx.Client() as client:
        bodies = [
            {"model": model, "prompt": "red apple", "max_tokens": 900, "ignore_eos": True, "stream": True}
            for model in ("lora@prod", "prefix@prod")
        ]
        with ExitStack() as streams:
            kept = []  # a generator that is collected closes its stream
            for body in bodies:
                answer = streams.enter_context(client.stream("POST", f"{server.url}/v1/completions", json=body))
                kept.append(answer.iter_lines())
                next(kept[-1])
            wait_for(lambda: metric(server.url, "vllm:num_requests_running") == 2)
            assert metric(server.url, "vllm:kv_cache_usage_perc") > 0
        wait_for(lambda: metric(server.url, "vllm:num_requests_running") == 0, 5)
        assert metric(server.url, "vllm:kv_cache_usage_perc") == 0
        leases = [line["leases"] for line in httpx.get(f"{server.url}/v1/adapters").json()["data"]]
        assert leases == [0, 0]
