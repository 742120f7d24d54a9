"""POST /v1/embeddings, in OpenAI's shape: texts to vectors of length one, by the base itself.

It is the embedding that semantic routing compares prompts by: the mean over the tokens of the hidden states that enter
the middle layer. A base that was not trained for it embeds weakly: all its vectors lie close together.
Source: OpenAI's specification 2.3.0; base64 is of little-endian fp32.
"""

from __future__ import annotations

import asyncio
import base64
import math
import struct
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.answer import served_headers
from server.api.body import check, read_body
from server.api.choose import ROUTED, read_terms
from server.api.disconnect import ClientGone, unless_disconnected
from server.api.prompts import EncodedPrompt, encode_prompt, read_prompts
from server.api.requests import MAX_INPUTS, EmbeddingsBody
from server.api.semantic import embed
from server.api.service import Service
from server.errors import Draining, InvalidValue, ModelNotFound, ServerError, UnsupportedParameter
from server.records import UNKNOWN_MODEL, Finished, Mixture

AT_ONCE = 32  # prompts of one request in the engine: the others wait here, not in its queue


async def embeddings(service: Service, request: Request) -> Response:
    """Raises: ServerError, ClientGone."""
    arrived = time.perf_counter()
    try:
        if request.app.state.draining:
            raise Draining("this server is shutting down and takes no new requests")
        data = await read_body(request, limit=service.config.max_body_bytes)
        checked = check(EmbeddingsBody, data, lenient=service.config.lenient)
        prompts = await _read(service, checked.body)
        done = await unless_disconnected(request.receive, _embed_all(service, prompts))
    except ServerError as error:
        service.metrics.request_refused("failed" if error.status == 500 else "refused")
        raise
    except ClientGone:
        service.metrics.request_refused("cancelled")
        raise
    tokens = sum(len(prompt.ids) for prompt in prompts)
    service.metrics.meter(Mixture(), arrived=arrived).finish(
        "completed", prompt_tokens=tokens, generated_tokens=0, cached_tokens=0
    )
    write = _base64 if checked.body.encoding_format == "base64" else list
    body = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": write(_unit(one.embedding or ()))}
            for index, one in enumerate(done)
        ],
        "model": checked.body.model or service.base_id,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return JSONResponse(body, headers=served_headers(service, Mixture(), checked.ignored))


async def _read(service: Service, body: EmbeddingsBody) -> tuple[EncodedPrompt, ...]:
    """Raises: BadRequest, ModelNotFound."""
    await _check_model(service, body.model)
    if body.dimensions is not None:
        raise UnsupportedParameter(
            f"dimensions={body.dimensions} is not supported: this base was not trained to have its embeddings cut",
            param="dimensions",
        )
    inputs = read_prompts(body.input, param="input", limit=MAX_INPUTS)
    limit = service.engine.max_model_len
    special = body.add_special_tokens is not False
    prompts = await service.in_text_thread(
        lambda: tuple(
            encode_prompt(one, service.tokenizer, max_model_len=limit, add_special_tokens=special, param="input")
            for one in inputs
        )
    )
    for index, prompt in enumerate(prompts):
        if not prompt.ids:
            raise InvalidValue(f"input[{index}] has no tokens", param="input")
    return prompts


async def _check_model(service: Service, model: str | None) -> None:
    """Only the base embeds. Raises: ModelNotFound, UnsupportedParameter, InvalidValue."""
    names, given = service.base_names, service.adapters.given_names()
    if not model or model in names:
        return
    if model != ROUTED or ROUTED in given:
        for reference, _ in read_terms(model, base_names=names, whole_names=given):
            if await service.adapters.known(reference) is None:
                raise ModelNotFound(UNKNOWN_MODEL.format(model[:200]), param="model")
    raise UnsupportedParameter(f"model must be {service.base_id}: embeddings are the base's own", param="model")


async def _embed_all(service: Service, prompts: Sequence[EncodedPrompt]) -> list[Finished]:
    """All of them, or the first error; what still runs then is given up."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(prompt: EncodedPrompt) -> Finished:
        async with places:
            return await embed(service, prompt.ids)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(prompt)) for prompt in prompts]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _unit(embedding: Sequence[float]) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in embedding)) or 1.0
    return [value / length for value in embedding]


def _base64(values: Sequence[float]) -> Any:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
