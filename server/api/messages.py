"""Messages of a chat as a template wants them, a role and one text each, and on to token ids."""

from __future__ import annotations

from collections.abc import Sequence

from server.api.prompts import refuse_hopeless
from server.api.requests import ChatBody, Message, TokenizeBody
from server.api.service import Service
from server.errors import InvalidValue, PromptTooLong, UnsupportedParameter

# OpenAI's newer name for the same place in the conversation; templates know the older one.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TURNS_NOT_MADE = ("refusal", "audio", "tool_calls", "function_call", "tool_call_id", "annotations")


async def encode_messages(
    service: Service, messages: Sequence[Message], body: ChatBody | TokenizeBody
) -> tuple[int, ...]:
    """Raises: UnsupportedParameter, InvalidValue, PromptTooLong."""
    limit = service.engine.max_model_len
    if len(messages) > limit:  # each takes a token at the least
        raise PromptTooLong(f"{len(messages)} messages are above the context of {limit} tokens", param="messages")
    plain = plain_messages(messages)
    size_bytes = sum(len(text.encode()) for message in plain for text in message.values())
    refuse_hopeless(size_bytes, service.tokenizer, max_model_len=limit, param="messages")
    continued = bool(body.continue_final_message)
    if continued and body.add_generation_prompt:
        raise InvalidValue(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    opened = not continued if body.add_generation_prompt is None else body.add_generation_prompt
    return await service.in_text_thread(
        lambda: service.tokenizer.encode_chat(
            plain,
            add_generation_prompt=opened,
            continue_final_message=continued,
            template_kwargs=body.chat_template_kwargs,
        )
    )


def plain_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Raises: UnsupportedParameter, InvalidValue."""
    return [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain(message: Message, path: str) -> dict[str, str]:
    for field in _TURNS_NOT_MADE:
        if getattr(message, field) not in (None, []):
            raise UnsupportedParameter(f"{path}.{field} is not supported by this server", param=f"{path}.{field}")
    if message.role in ("tool", "function"):
        raise UnsupportedParameter(f"role {message.role!r} is not supported: tools are not", param=f"{path}.role")
    if message.role not in _ROLES:
        raise InvalidValue(
            f"{path}.role must be one of {', '.join(_ROLES)}, not {message.role[:80]!r}", param=f"{path}.role"
        )
    plain = {"role": _ROLES[message.role], "content": _text(message.content, f"{path}.content")}
    if message.name is not None:
        plain["name"] = message.name
    if message.reasoning_content is not None:
        plain["reasoning_content"] = message.reasoning_content
    return plain


def _text(content: object, path: str) -> str:
    """Parts are joined by line breaks, as vLLM does for templates that take one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidValue(f"{path} must be a text or a list of text parts", param=path)
    return "\n".join(_part(part, f"{path}[{index}]") for index, part in enumerate(content))


def _part(part: object, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise InvalidValue(f'{path} must be a part like {{"type": "text", "text": "..."}}', param=path)
    if kind != "text":
        raise UnsupportedParameter(f"{path}: parts of type {kind[:80]!r} are not supported", param=f"{path}.type")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidValue(f"{path}.text must be a string", param=f"{path}.text")
    return text
