"""POST /tokenize and /detokenize: the union of what vLLM, llama.cpp and LoRAX take and answer."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from server.api.body import check, read_body
from server.api.messages import encode_messages
from server.api.prompts import refuse_hopeless
from server.api.requests import DetokenizeBody, TokenizeBody
from server.api.sampling import read_token_ids
from server.api.service import Service
from server.errors import MalformedBody
from server.text.vocabulary import decode

# Texts longer than the context may be counted, but not without bound.
MAX_CONTEXTS = 64


async def tokenize(service: Service, request: Request) -> dict[str, Any]:
    """Raises: BadRequest."""
    data = await read_body(request, limit=service.config.max_body_bytes)
    body = check(TokenizeBody, data, lenient=service.config.lenient).body
    given = {name: getattr(body, name) for name in ("prompt", "content", "inputs", "messages")}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        got = ", ".join(given) or "none"
        raise MalformedBody(f"one of prompt, content, inputs and messages is needed; got {got}", param="prompt")
    ids = await _encode(service, body, *given.values())
    limit = service.engine.max_model_len
    answer: dict[str, Any] = {"tokens": list(ids), "count": len(ids), "max_model_len": limit}
    strings = [service.tokenizer.vocabulary.label(token_id) for token_id in ids] if body.return_token_strs else None
    return answer | {"token_strs": strings}


async def detokenize(service: Service, request: Request) -> dict[str, Any]:
    """Raises: BadRequest."""
    data = await read_body(request, limit=service.config.max_body_bytes)
    body = check(DetokenizeBody, data, lenient=service.config.lenient).body
    vocabulary = service.tokenizer.vocabulary
    text = decode(vocabulary, read_token_ids(body.tokens, vocabulary_size=len(vocabulary), param="tokens"))
    return {"prompt": text, "content": text, "text": text}


async def _encode(service: Service, body: TokenizeBody, given: Any) -> tuple[int, ...]:
    if body.messages is not None:
        return await encode_messages(service, body.messages, body)
    limit = service.engine.max_model_len * MAX_CONTEXTS
    refuse_hopeless(len(given.encode()), service.tokenizer, max_model_len=limit, param="prompt")
    special = body.add_special_tokens is not False
    return await service.in_text_thread(lambda: service.tokenizer.encode(given, add_special_tokens=special))
