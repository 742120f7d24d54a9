"""A base's tokenizer: text and chats to ids. The way back is `server.text.vocabulary` and `server.text.stream`.

Chats are rendered in transformers' immutable sandbox by the base's own template, never by one from a request. Control
tokens that a message spells out are encoded as the text they are, so that no user can forge a turn.
Not safe for two threads at once: the native tokenizer keeps its settings between calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from server.errors import InvalidValue, StartupRefused
from server.text.vocabulary import Vocabulary, read_vocabulary

ChatMessage = Mapping[str, str]

# What a template written by somebody else may raise besides its own errors, when it meets a message it did not expect.
_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
_SHOWN = 300  # characters of a template's own complaint


class Tokenizer:
    def __init__(self, backend: Any) -> None:
        """`backend`: a transformers tokenizer with a native half.

        Raises: StartupRefused.
        """
        if not getattr(backend, "is_fast", False):
            raise StartupRefused(
                "this base has only a slow (pure Python) tokenizer; one with a tokenizer.json is needed"
            )
        self._backend = backend
        self.vocabulary: Vocabulary = read_vocabulary(backend.backend_tokenizer)
        self._reserved = frozenset(inspect.signature(backend.apply_chat_template).parameters) | {"messages"}

    @property
    def has_chat_template(self) -> bool:
        return self._backend.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Ids of a raw text, in which control tokens mean what they mean; those that open a text come first."""
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens))

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Ids of a chat as the base's template writes it.

        Raises: InvalidValue, when there is no template or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidValue("this base has no chat template: use /v1/completions", param="messages")
        for name in template_kwargs or ():
            if name in self._reserved:
                raise InvalidValue(f"chat_template_kwargs cannot set {name!r}", param="chat_template_kwargs")
        try:
            ids = self._backend.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,
                **(template_kwargs or {}),
            )
        except _TEMPLATE_FAULTS as fault:
            complaint = " ".join(str(fault).split())[:_SHOWN]
            raise InvalidValue(
                f"this base's chat template refuses the messages: {complaint}", param="messages"
            ) from fault
        return tuple(ids)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a base's folder; no code from the folder is run.

    Raises: StartupRefused.
    """
    from transformers import AutoTokenizer  # seconds to import: only where a tokenizer is really loaded

    try:
        backend = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, clean_up_tokenization_spaces=False
        )
    except (OSError, ValueError, KeyError) as fault:
        raise StartupRefused(f"the tokenizer of this base cannot be loaded: {fault}") from fault
    return Tokenizer(backend)
