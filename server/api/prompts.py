"""Prompts to token ids: the four forms that completions take, and what is too long to be worth encoding."""

from __future__ import annotations

from dataclasses import dataclass

from server.api.requests import MAX_PROMPTS
from server.api.sampling import read_token_ids
from server.errors import InvalidValue, PromptTooLong
from server.text.tokenizer import Tokenizer
from server.text.vocabulary import decode


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    ids: tuple[int, ...]
    text: str | None = None  # as it was sent, if it was sent as text

    def echo(self, tokenizer: Tokenizer) -> str:
        return self.text if self.text is not None else decode(tokenizer.vocabulary, self.ids)


def read_prompts(prompt: object, *, param: str = "prompt", limit: int = MAX_PROMPTS) -> list[str | list[int]]:
    """A string, a list of strings, a list of token ids, or a list of those, as one list of prompts.

    Raises: InvalidValue.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise InvalidValue(f"{param} must be a string, a list of strings, token ids, or a list of those", param=param)
    if _is_ids(prompt):
        return [prompt]
    if len(prompt) > limit:
        raise InvalidValue(f"{param} is a list of {len(prompt)}, above the maximum of {limit}", param=param)
    for index, item in enumerate(prompt):
        if not isinstance(item, str) and not (isinstance(item, list) and _is_ids(item)):
            raise InvalidValue(f"{param}[{index}] must be a string or a list of token ids", param=f"{param}[{index}]")
    return prompt


def encode_prompt(
    prompt: str | list[int],
    tokenizer: Tokenizer,
    *,
    max_model_len: int,
    add_special_tokens: bool,
    param: str = "prompt",
) -> EncodedPrompt:
    """Raises: InvalidValue, PromptTooLong."""
    if isinstance(prompt, list):
        return EncodedPrompt(read_token_ids(prompt, vocabulary_size=len(tokenizer.vocabulary), param=param))
    refuse_hopeless(len(prompt.encode()), tokenizer, max_model_len=max_model_len, param=param)
    return EncodedPrompt(tokenizer.encode(prompt, add_special_tokens=add_special_tokens), prompt)


def refuse_hopeless(size_bytes: int, tokenizer: Tokenizer, *, max_model_len: int, param: str) -> None:
    """Refuse a text that cannot fit even if all its tokens were the longest, without the seconds of encoding it.

    Raises: PromptTooLong.
    """
    least = size_bytes // max(1, tokenizer.vocabulary.longest)
    if least > max_model_len:
        raise PromptTooLong(
            f"this model's maximum context length is {max_model_len} tokens; the prompt has at least {least}",
            param=param,
        )


def _is_ids(items: list[object]) -> bool:
    return all(type(item) is int for item in items)
