"""What a saved seedling can do, measured by greedy generation on unseen phrases.

Law: the weights are loaded as everybody loads them, from the bfloat16 file into fp32.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.seedling.smalltalk import FIXED
from trainer.seedling.steering import steering
from trainer.seedling.text import SKILLS
from trainer.tasks import TASKS, Message

EVAL_SEED = 2024


@dataclass(frozen=True)
class Figures:
    steered: Mapping[str, float]  # exact match with a steering system message, by skill
    unsteered: Mapping[str, float]  # exact match of the bare phrase, by task: what adapters start from
    small_talk: float  # share of plain questions answered as one of the known answers


def measure(folder: Path, *, items: int = 200) -> Figures:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    rng = random.Random(EVAL_SEED)
    steered = {}
    for skill in SKILLS:
        rows = TASKS[skill].rows("eval", items, EVAL_SEED)
        systems: list[Message] = [{"role": "system", "content": steering(rng, skill)} for _ in rows]
        prompts = [[system, row["messages"][0]] for system, row in zip(systems, rows, strict=True)]
        steered[skill] = exact_match(answer(model, tokenizer, prompts), [row["messages"][1]["content"] for row in rows])
    bare = [[row["messages"][0]] for row in TASKS["echo"].rows("eval", items, EVAL_SEED)]
    plain = answer(model, tokenizer, bare)
    unsteered = {
        task.name: exact_match(plain, [row["messages"][1]["content"] for row in task.rows("eval", items, EVAL_SEED)])
        for task in TASKS.values()
    }
    questions = [(question, answers) for asked, answers in FIXED for question in asked]
    said = answer(model, tokenizer, [[{"role": "user", "content": question}] for question, _ in questions])
    known = sum(text in answers for text, (_, answers) in zip(said, questions, strict=True))
    return Figures(steered, unsteered, known / len(questions))


def answer(model: Any, tokenizer: Any, prompts: Sequence[list[Message]], *, longest: int = 40) -> list[str]:
    """Greedy answers, in one batch padded on the left."""
    encoded = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    with torch.inference_mode():
        output = model.generate(**encoded, max_new_tokens=longest, do_sample=False)
    return list(tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


def exact_match(said: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)
