"""A tiny random base with its own tokenizer, made once, and variants of it: enough to train in a second."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}\n{% else %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")

MakeBase = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Several threads on a shared machine wait for each other; one also makes every sum the same."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Write a base folder: a random model of any type with the tiny sizes below, and a byte-level tokenizer."""

    def make(template: str | None = UNMARKED, *, model_type: str = "llama", **sizes: Any) -> Path:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        folder = tmp_path_factory.mktemp("base")
        tokenizer = make_tokenizer(template)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        config = CONFIG_MAPPING[model_type](
            **{
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "pad_token_id": 0,
                "bos_token_id": None,
                "eos_token_id": 1,
                **sizes,
            }
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


def make_tokenizer(template: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", extra_special_tokens=special[2:]
    )
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def tiny_base(make_base: MakeBase) -> Path:
    return make_base()


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Forty chats of two words, each answered by the first of them."""
    words = [f"{a}{b}" for a in "bcdfgklm" for b in "aeiou"]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{word} {words[-i]}"},
                {"role": "assistant", "content": word},
            ]
        }
        for i, word in enumerate(words)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
