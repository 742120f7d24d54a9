"""What can be wrong with a request or an adapter: each gets its error with value and limit, and the server goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.conftest import BASE, hub, serving

HI = [{"role": "user", "content": "Hello!"}]
MAX_RANK, MAX_BODY_BYTES = 3, 100_000


@pytest.fixture(scope="module")
def server_url(
    tmp_path_factory: pytest.TempPathFactory,
    random_adapter: Callable[[str, int], Path],
    foreign_adapter: tuple[Path, Path],
) -> Iterator[str]:
    """A server whose hub holds a good adapter, one of too high a rank, one for another base, and a damaged one."""
    home = tmp_path_factory.mktemp("errors") / "home"
    hub(home, "push", random_adapter("prompt", 1), "soft")
    hub(home, "push", random_adapter("lora", 1), "bot")
    adapter, base = foreign_adapter
    hub(home, "push", adapter, "foreign", "--base", base)
    hub(home, "push", random_adapter("ia3", 1), "damaged")
    damage(home, random_adapter("ia3", 1) / "adapter_model.safetensors")
    with serving(home, "--max-rank", str(MAX_RANK), "--max-body-bytes", str(MAX_BODY_BYTES)) as server:
        yield server.url


@pytest.fixture(scope="module")
def foreign_adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(adapter, base): a LoRA for a base of another shape."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("foreign")
    shape = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder / "base")
    model: Any = LlamaForCausalLM.from_pretrained(folder / "base")
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        str(folder / "adapter")
    )
    return folder / "adapter", folder / "base"


def damage(home: Path, stored: Path) -> None:
    """Flip one byte of a stored file, as a bad disk would."""
    content = bytearray(stored.read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    [blob] = [
        path for path in home.rglob("*") if path.is_file() and digest in (path.name, path.parent.name + path.name)
    ]
    content[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)


def ask(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={"messages": HI, "max_tokens": 4, **fields}, timeout=60)


@pytest.mark.parametrize(
    ("fields", "status", "code", "words"),
    [
        ({"model": "nobody"}, 404, "model_not_found", "nobody"),
        ({"model": "soft@9"}, 404, "model_not_found", "soft@9"),
        ({"model": "sofd"}, 404, "model_not_found", "soft"),
        ({"model": "../soft"}, 400, "invalid_value", "soft"),
        ({"model": "Soft"}, 400, "invalid_value", "Soft"),
        ({"model": "soft@"}, 400, "invalid_value", "soft@"),
        ({"model": "foreign"}, 400, "adapter_incompatible", "hidden_size 48"),
        ({"model": "bot"}, 400, "adapter_incompatible", f"above max_rank {MAX_RANK}"),
        ({"model": "damaged"}, 502, "adapter_unavailable", "damaged@1"),
        ({"model": "soft*1000"}, 400, "invalid_value", "1000"),
        ({"model": "+".join(["soft"] * 17)}, 400, "mixture_refused", "17"),
        ({"lora_path": "/etc/passwd"}, 400, "invalid_value", "not a path"),
        ({"messages": [{"role": "user", "content": "garden " * 8000}]}, 400, "context_length_exceeded", "tokens"),
        ({"max_tokens": 10**6}, 400, "context_length_exceeded", "1000"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools"),
        ({"temperatur": 1}, 400, "unknown_parameter", "'temperature'"),
        ({"temperature": -1}, 400, "invalid_value", "-1"),
        ({"n": 1000}, 400, "invalid_value", "16"),
        ({"logit_bias": {"99999999": 1}}, 400, "invalid_value", "99999999"),
        ({"user": "x" * MAX_BODY_BYTES}, 413, "body_too_large", str(MAX_BODY_BYTES)),
    ],
)
def test_what_is_wrong_is_named_with_its_limit_and_the_server_goes_on(
    server_url: str, fields: dict[str, Any], status: int, code: str, words: str
) -> None:
    for stream in (False, True):
        response = ask(server_url, stream=stream, **fields)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (status, code), error
        assert set(error) == {"message", "type", "param", "code"}
        assert words in error["message"]
        assert len(response.content) <= 4096
        assert "/tmp" not in response.text and "site-packages" not in response.text and ".py" not in response.text
    assert ask(server_url, model=BASE).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"messages": NaN}',
        b'{"a":' + b"[" * 50_000,
        b"\xff\xfe",
        b"{}",
        b'{"n":' + b"1" * 5000 + b"}",
    ],
)
def test_a_malformed_body_is_400(server_url: str, body: bytes) -> None:
    response = httpx.post(f"{server_url}/v1/chat/completions", content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "malformed_body")


@pytest.mark.parametrize(
    "prompt",
    [[10**9], [-1], [[5, 10**9]], [1.5], {"a": 1}, "", [], ["a", 1], [[]]],
    ids=lambda prompt: json.dumps(prompt),
)
def test_what_is_no_prompt_is_400(server_url: str, prompt: object) -> None:
    response = httpx.post(f"{server_url}/v1/completions", json={"model": BASE, "prompt": prompt})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")


def test_routes_that_are_not_there_answer_in_the_same_shape(server_url: str) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405)):
        response = httpx.request(method, server_url + path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_managing_needs_the_admin_key(server_url: str) -> None:
    response = httpx.post(f"{server_url}/v1/adapters/warm", json={"ref": "soft"})
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


def test_refused_adapters_are_shown_and_the_good_one_serves(server_url: str) -> None:
    assert ask(server_url, model="soft").headers["x-multigraft-adapters"] == "soft@1"
    for model in ("foreign", "bot", "damaged"):
        ask(server_url, model=model)
    shown = {line["name"]: line for line in httpx.get(f"{server_url}/v1/adapters").json()["data"]}
    assert shown["soft"]["tier"] == "device"
    for name in ("foreign", "bot"):
        assert shown[name]["tier"] == "failed"
        assert shown[name]["error"]
    refused = [
        line for line in httpx.get(f"{server_url}/metrics").text.splitlines() if "adapter_refused_total{" in line
    ]
    assert {line.split('"')[1] for line in refused} == {"adapter_incompatible", "adapter_unavailable"}
