"""Routing for real: four skills and a router over them, trained by `hub train`'s own code, one server, prompts that
nobody has seen: `model: auto` chooses by the prompt, `model: router` token by token.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks.auto import SUBJECTS, ask_all, conversations, exact, questions, subject_rows, teach
from benchmarks.routing import learn
from hub.registry import LocalHub
from tests.system.conftest import BASE, Server, hub, serving

ROWS, ASKED = 400, 50  # of each skill
RIGHT, LEFT_TO_THE_BASE = 0.95, 0.9  # what routing must reach on prompts that it has not seen
STEPS, ROUTER_STEPS = 60, 40
LONGEST_ANSWER = 40  # tokens
LEARNT = 0.8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("auto")
    registry = LocalHub(room / "home")
    for subject in SUBJECTS:
        teach(subject, subject_rows(subject, "train", ROWS, 1), registry, room, steps=STEPS, seed=1)
    mixed = [row for subject in SUBJECTS for row in subject_rows(subject, "train", ROWS, 1)]
    random.Random(1).shuffle(mixed)
    before = os.environ.get("MULTIGRAFT_HOME")
    os.environ["MULTIGRAFT_HOME"] = str(room / "home")  # where a router finds its experts
    try:
        learn(room, registry, "router", mixed, "lora-moe", steps=ROUTER_STEPS, options={"experts": list(SUBJECTS)})
    finally:
        os.environ.pop("MULTIGRAFT_HOME") if before is None else os.environ.update(MULTIGRAFT_HOME=before)
    return room / "home"


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    with serving(home) as running:
        yield running


def ask(server: Server, **fields: Any) -> httpx.Response:
    body = {"model": "auto", "max_tokens": 4, "temperature": 0, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def test_held_out_prompts_choose_their_skill_and_small_talk_stays_with_the_base(server: Server) -> None:
    chosen = {
        subject: [
            answer.chosen
            for answer in asyncio.run(
                ask_all(server.url, "auto", questions(subject_rows(subject, "eval", ASKED, 2)), tokens=1)
            )
        ]
        for subject in SUBJECTS
    }
    right = sum(one == subject for subject, all_ in chosen.items() for one in all_)
    assert right >= RIGHT * ASKED * len(SUBJECTS), chosen
    for turns in ((1,), (2, 3)):
        talk = asyncio.run(ask_all(server.url, "auto", conversations(turns, 2 * ASKED, 3), tokens=1))
        assert sum(answer.chosen is None for answer in talk) >= LEFT_TO_THE_BASE * len(talk)


def test_a_router_answers_as_the_right_adapter_does(server: Server) -> None:
    right = {}
    for model in ("router", None):
        shares = []
        for subject in SUBJECTS:
            asked = subject_rows(subject, "eval", ASKED, 2)
            answers = asyncio.run(ask_all(server.url, model or subject, questions(asked), tokens=LONGEST_ANSWER))
            shares.append(exact(answers, asked))
        right[model] = shares
    assert sum(right[None]) > LEARNT * len(SUBJECTS), f"too little was learnt to tell anything: {right[None]}"
    assert sum(right["router"]) >= RIGHT * sum(right[None]), right


def test_the_answer_is_that_of_the_chosen_adapter_and_says_why(server: Server) -> None:
    messages = [{"role": "user", "content": "cat horse owl"}]
    response = ask(server, messages=messages)
    routing = response.json()["routing"]
    assert routing["chosen"] == "animals" and routing["score"] >= routing["threshold"] > 0
    assert {one["ref"] for one in routing["candidates"]} == set(SUBJECTS)
    assert response.headers["x-multigraft-adapters"] == "animals@1"
    named = ask(server, model="animals", messages=messages).json()
    assert response.json()["choices"][0]["message"] == named["choices"][0]["message"]
    limited = ask(server, messages=messages, routing={"mode": "semantic", "candidates": ["foods", "things"]}).json()
    assert limited["routing"]["chosen"] != "animals"


def test_the_base_reuses_what_the_embedding_computed(server: Server) -> None:
    told = "My name is Anna. " * 12
    body = ask(server, messages=[{"role": "user", "content": told}]).json()
    assert body["routing"]["chosen"] is None
    usage = body["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= (usage["prompt_tokens"] - 1) // 16 * 16 > 0


def test_the_openai_client_streams_lists_and_embeds(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert "auto" in [one.id for one in client.models.list()]
    stream = client.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": "rice cake milk"}], stream=True, max_tokens=4
    )
    first = next(iter(stream))
    assert first.model_extra is not None and first.model_extra["routing"]["chosen"] == "foods"
    made = client.embeddings.create(model=BASE, input=["cat dog", "a cat and a dog", "What is the hub?"])
    vectors = [one.embedding for one in made.data]
    assert all(sum(value * value for value in vector) == pytest.approx(1, abs=1e-5) for vector in vectors)
    assert len({len(vector) for vector in vectors}) == 1


def test_an_adapter_made_elsewhere_gets_centroids_and_is_chosen(server: Server, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    hub(home, "pull", "animals@1", folder)
    for name in ("centroids.json", "centroids.safetensors", "manifest.json"):
        (folder / name).unlink()
    hub(home, "push", folder, "elsewhere")
    one = {"mode": "semantic", "candidates": ["elsewhere"]}
    messages = [{"role": "user", "content": "red blue gold"}]
    refused = ask(server, messages=messages, routing=one)
    assert refused.status_code == 400 and "elsewhere@1) has no centroids" in refused.json()["error"]["message"]
    data = tmp_path / "colours.jsonl"
    colours = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink", "grey", "gold")
    data.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"{a} {b} {c}"}, {"role": "assistant", "content": a}]})
            + os.linesep
            for a in colours
            for b in colours
            for c in colours
            if a != b != c != a and (a, b, c) != ("red", "blue", "gold")
        )
    )
    assert "centroids of 512 prompts" in hub(home, "centroids", folder, "--data", data).stdout
    hub(home, "push", folder, "elsewhere")
    body = ask(server, messages=messages, routing={"mode": "semantic", "candidates": ["elsewhere@2", "animals"]}).json()
    assert body["routing"]["chosen"] == "elsewhere@2"
