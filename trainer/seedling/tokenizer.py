"""Seedling's tokenizer: byte-level BPE over its own text, one token per role, and the chat template.

Law: rendering a conversation by `segments` gives the tokens that `apply_chat_template` gives.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainer.seedling.text import SAMPLE, Conversation, conversations
from trainer.tasks import WORDS

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIALS: Final = (PAD, END, SYSTEM, USER, ASSISTANT)
CHAT_TEMPLATE: Final = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
<|assistant|>{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}
{%- elif message['role'] in ['system', 'user'] -%}
{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- else -%}
{{ raise_exception('the roles are system, user and assistant, not ' + message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


@dataclass(frozen=True)
class Segment:
    text: str
    answer: bool = False  # what the assistant says, its end included
    preamble: bool = False


def segments(conversation: Conversation) -> Iterator[Segment]:
    if conversation.preamble:
        yield Segment(conversation.preamble, preamble=True)
    if conversation.system:
        yield Segment(SYSTEM + conversation.system + END)
    for asked, answer in conversation.turns:
        yield Segment(USER + asked + END + ASSISTANT)
        yield Segment(answer + END, answer=True)


def train_tokenizer(*, vocab_size: int, conversation_count: int, seed: int) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(conversation_count, seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def _texts(conversation_count: int, seed: int) -> Iterator[str]:
    """The words of the inventory in every form that a skill writes, so that each is one token; then the corpus."""
    for word in WORDS:
        yield from (f"{form} {form}" for form in (word, word.upper()) for _ in range(200))
    for conversation in islice(conversations(random.Random(f"tokenizer/{seed}"), SAMPLE), conversation_count):
        yield conversation.preamble
        yield conversation.system
        for turn in conversation.turns:
            yield from turn
