"""The embedded base: its text, its tokenizer and template, its limits, and that it shows no skill unless steered."""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import hub.bases
from trainer.seedling.evaluate import answer, exact_match
from trainer.seedling.text import MIX, Conversation, conversations
from trainer.seedling.tokenizer import segments
from trainer.tasks import LONGEST, SHORTEST, TASKS, WORDS, split_of

FOLDER = Path(hub.bases.__file__).parent / "seedling"
MAX_BYTES = 12_000_000
MAX_UNSTEERED = 0.05  # what the demo promises of the bare base
MIN_STEERED = 0.90  # enough for soft prompts to have something to find


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER, padding_side="left")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def drawn(count: int, seed: int) -> list[Conversation]:
    return list(islice(conversations(random.Random(seed), MIX), count))


def messages(conversation: Conversation) -> list[dict[str, str]]:
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    turns = [
        {"role": role, "content": text}
        for turn in conversation.turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return system + turns


def test_the_shipped_folder_holds_what_a_hugging_face_model_needs_and_no_more_than_twelve_megabytes() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_BYTES


def test_four_query_heads_share_a_kv_head() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["num_attention_heads"] == 4 * config["num_key_value_heads"]


def test_the_model_was_trained_on_the_tokens_that_the_chat_template_gives(tokenizer: Any) -> None:
    for conversation in drawn(200, 1):
        parts = [segment for segment in segments(conversation) if not segment.preamble]
        encoded = tokenizer([part.text for part in parts], add_special_tokens=False)["input_ids"]
        rendered = tokenizer.apply_chat_template(
            messages(conversation), return_dict=True, return_assistant_tokens_mask=True
        )
        assert rendered["input_ids"] == [token for ids in encoded for token in ids]
        assert rendered["assistant_masks"] == [
            int(part.answer) for part, ids in zip(parts, encoded, strict=True) for _ in ids
        ]


def test_a_prompt_is_the_beginning_of_the_conversation_that_answers_it(tokenizer: Any) -> None:
    for conversation in drawn(50, 2):
        whole = tokenizer.apply_chat_template(messages(conversation), return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(
            messages(conversation)[:-1], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert whole[: len(prompt)] == prompt


@given(text=st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, split_special_tokens=True)) == text


def test_every_word_of_the_inventory_is_one_token_in_each_form(tokenizer: Any) -> None:
    forms = [form for word in WORDS for form in (word, f" {word}", word.upper(), f" {word.upper()}")]
    assert [form for form in forms if len(tokenizer.encode(form)) != 1] == []


def test_the_pretraining_text_holds_no_phrase_that_tasks_are_evaluated_on() -> None:
    seen = [tuple(asked.split(": ")[-1].split()) for c in drawn(2000, 3) for asked, _ in c.turns]
    phrases = [p for p in seen if SHORTEST <= len(p) <= LONGEST and len(set(p)) == len(p) and set(p) <= set(WORDS)]
    assert len(phrases) > 500
    assert {split_of(phrase) for phrase in phrases} == {"train"}


def test_a_bare_phrase_brings_out_no_skill(model: Any, tokenizer: Any) -> None:
    rows = {task.name: task.rows("eval", 40, 4) for task in TASKS.values()}
    said = answer(model, tokenizer, [row["messages"][:1] for row in rows["echo"]])
    for drawn_rows in rows.values():
        assert exact_match(said, [row["messages"][1]["content"] for row in drawn_rows]) <= MAX_UNSTEERED


@pytest.mark.parametrize("skill", [task.name for task in TASKS.values() if task.latent])
def test_a_system_message_brings_out_a_latent_skill(model: Any, tokenizer: Any, skill: str) -> None:
    rows = TASKS[skill].rows("eval", 40, 5)
    prompts: list[Any] = [[{"role": "system", "content": f"Mode: {skill}."}, row["messages"][0]] for row in rows]
    said = answer(model, tokenizer, prompts)
    assert exact_match(said, [row["messages"][1]["content"] for row in rows]) >= MIN_STEERED


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        ("What is an adapter?", "An adapter is a small set of weights that gives a base model a new skill."),
        ("What does a cow say?", "A cow says moo."),
        ("What is the capital of France?", "The capital of France is Paris."),
    ],
)
def test_small_talk_is_answered_in_sense(model: Any, tokenizer: Any, question: str, reply: str) -> None:
    assert answer(model, tokenizer, [[{"role": "user", "content": question}]]) == [reply]
