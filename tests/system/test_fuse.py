"""`hub fuse` and `hub extract` as a person runs them, and a server that proves and serves what they made."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from hub.base import find_base
from tests.system.conftest import BASE, hub, serving

MIXTURE = "team/one*0.5+team/two*-0.25"


@pytest.fixture
def stocked(home: Path, random_adapter: Callable[[str, int], Path]) -> Path:
    for seed, name in enumerate(("team/one", "team/two")):
        hub(home, "push", random_adapter("lora", seed), name)
    return home


def tuned_seedling(folder: Path) -> Path:
    """A whole fine-tune whose change is of rank two, at two kinds of Linear."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(find_base(BASE), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(("v_proj.weight", "down_proj.weight")):
            rows, columns = parameter.shape
            parameter.data += 0.1 * torch.randn(rows, 2) @ torch.randn(2, columns)
    model.save_pretrained(folder)
    shutil.copy(find_base(BASE) / "tokenizer.json", folder)
    return folder


def answer(url: str, model: str) -> Any:
    body = {"model": model, "prompt": "red apple old lamp", "max_tokens": 12, "temperature": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_a_fused_version_answers_as_its_mixture_and_an_extracted_one_is_proved(stocked: Path, tmp_path: Path) -> None:
    done = hub(stocked, "fuse", MIXTURE, "--method", "cat", "--as", "team/both", "--alias", "prod", "--json")
    made = json.loads(done.stdout)
    assert made["pushed"]["reference"] == "team/both@1"
    assert made["metrics"]["relative_error"] < 1e-6
    assert [(one["name"], one["weight"]) for one in made["parents"]] == [("team/one", 0.5), ("team/two", -0.25)]
    shown = hub(stocked, "show", "team/both@prod").stdout
    assert "fuse method=cat" in shown and "team/two@1 * -0.25" in shown
    assert "none from the exact weighted sum of its parents but rounding" in shown
    done = hub(stocked, "extract", BASE, tuned_seedling(tmp_path / "tuned"), "--rank", "2", "--push", "team/tuned")
    assert "8 Linears, rank up to 2" in done.stdout and "team/tuned@1 sha256:" in done.stdout
    assert "left out" not in done.stdout
    shown = hub(stocked, "show", "team/tuned").stdout
    assert re.search(r"served +exactly as it is stored", shown)
    assert re.search(r"deviation +none from the difference of the two models at their Linears but rounding", shown)
    with serving(stocked) as server:
        assert answer(server.url, "team/both@prod") == answer(server.url, MIXTURE)
        # Its golden rows held, or the server would not have answered by it.
        assert answer(server.url, "team/tuned") != answer(server.url, BASE)
