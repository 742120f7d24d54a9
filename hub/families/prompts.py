"""Virtual tokens ahead of the sequence: prefix tuning, prompt tuning, multitask prompt tuning and P-tuning.

A multitask file holds a prompt that its tasks share and two factors for each task; PEFT is told the task with every
batch. An adapter of a hub answers as one task, so a file of several says which: `task_id`, a key of our own, which PEFT
passes over.
Source: peft 0.21.2, PrefixTuningConfig, PromptTuningConfig, MultitaskPromptTuningConfig, PromptEncoderConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hub import fields
from hub.base import Base, Modules
from hub.families.method import COMMON, INERT, NOTHING_SAVED, Complaint, Config, Field, Layout, Method
from hub.ref import printable

PROMPT_TENSOR = "prompt_embeddings"
TASK_COLUMNS, TASK_ROWS = "prefix_task_cols", "prefix_task_rows"

_SHARED: Mapping[str, Field] = {
    **COMMON,
    "modules_to_save": NOTHING_SAVED,
    "num_virtual_tokens": Field(fields.positive, shapes_tensors=True),
    "token_dim": Field(fields.optional_positive, shapes_tensors=True),
    "num_layers": Field(fields.optional_positive, shapes_tensors=True),
    "num_attention_heads": Field(fields.optional_positive, shapes_tensors=True),
    "num_transformer_submodules": Field(fields.one_of(1, None)),
}

# The MLPs and encoders of these three act while training; the saved tensor is their result.
_PREFIX: Mapping[str, Field] = {
    **_SHARED,
    "encoder_hidden_size": INERT,
    "prefix_projection": INERT,
    "init_weights": INERT,
}
_PROMPT: Mapping[str, Field] = {
    **_SHARED,
    "prompt_tuning_init": INERT,
    "prompt_tuning_init_text": INERT,
    "tokenizer_name_or_path": INERT,
    "tokenizer_kwargs": INERT,
}
_MULTITASK: Mapping[str, Field] = {
    **_PROMPT,
    # Inert: of a prompt that was trained before, whose values the saved tensors already hold.
    "prompt_tuning_init_state_dict_path": INERT,
    "prompt_tuning_init_task": INERT,
    "num_tasks": Field(fields.positive, shapes_tensors=True),
    "num_ranks": Field(fields.positive, shapes_tensors=True),
    "task_id": Field(fields.optional_whole),
}
_P_TUNING: Mapping[str, Field] = {
    **_SHARED,
    "encoder_reparameterization_type": INERT,
    "encoder_hidden_size": INERT,
    "encoder_num_layers": INERT,
    "encoder_dropout": INERT,
}


def _prefix_layout(config: Config, base: Base, modules: Modules) -> Layout:
    facts = {"token_dim": base.kv_width, "num_layers": base.layers, "num_attention_heads": base.kv_heads}
    shape = (config["num_virtual_tokens"], 2 * base.layers * base.kv_width)
    return Layout({PROMPT_TENSOR: shape}, _wrong_facts(config, facts, base))


def _prompt_layout(config: Config, base: Base, modules: Modules) -> Layout:
    facts = {"token_dim": base.hidden_size, "num_layers": base.layers, "num_attention_heads": base.heads}
    shape = (config["num_virtual_tokens"], base.hidden_size)
    return Layout({PROMPT_TENSOR: shape}, _wrong_facts(config, facts, base))


def _multitask_layout(config: Config, base: Base, modules: Modules) -> Layout:
    tasks, ranks, tokens = config.get("num_tasks", 1), config.get("num_ranks", 1), config["num_virtual_tokens"]
    layout = _prompt_layout(config, base, modules)
    factors = {TASK_COLUMNS: (tasks, tokens, ranks), TASK_ROWS: (tasks, ranks, base.hidden_size)}
    return replace(layout, shapes={**layout.shapes, **factors})


def _one_task(config: Config) -> list[Complaint]:
    tasks, chosen = config.get("num_tasks", 1), config.get("task_id")
    if type(tasks) is not int or tasks < 1 or (chosen is not None and type(chosen) is not int):
        return []  # they have those complaints
    if chosen is None and tasks > 1:
        return [
            (
                "task_id",
                f"is missing: the file holds {tasks} tasks and an adapter answers as one; write the number of the "
                f"task, 0 to {tasks - 1}, into adapter_config.json and push a version for each",
            )
        ]
    if chosen is not None and chosen >= tasks:
        return [("task_id", f"{chosen} is not among the {tasks} tasks, which are numbered from 0")]
    return []


def _wrong_facts(config: Config, facts: Mapping[str, int], base: Base) -> tuple[Complaint, ...]:
    return tuple(
        (key, f"is {config[key]}, but base {printable(base.name)} has {fact}")
        for key, fact in facts.items()
        if config.get(key) is not None and config[key] != fact
    )


_NEEDED = ("num_virtual_tokens",)

PREFIX = Method("prefix", "PREFIX_TUNING", _PREFIX, _NEEDED, _prefix_layout)
PROMPT = Method("prompt", "PROMPT_TUNING", _PROMPT, _NEEDED, _prompt_layout)
MULTITASK_PROMPT = Method(
    "multitask-prompt",
    "MULTITASK_PROMPT_TUNING",
    _MULTITASK,
    _NEEDED,
    _multitask_layout,
    contradictions=_one_task,
)
P_TUNING = Method("p-tuning", "P_TUNING", _P_TUNING, _NEEDED, _prompt_layout)
