"""Semantic routing: the request's own prompt chooses the adapters, once, before anything is leased.

The prompt runs through the bare base in the running batch. The KV that this leaves is the base's own: where the base is
to answer, it finds all but the last tokens of the prompt computed.
"""

from __future__ import annotations

import uuid

from server.api.choose import Terms
from server.api.prompts import EncodedPrompt
from server.api.service import Service
from server.errors import EngineFailed, InvalidValue, UnsupportedParameter
from server.records import Failed, Finished, GenerationRequest, PromptChoice, RoutingOrder


async def choose_by_prompt(service: Service, asked: RoutingOrder, prompt: EncodedPrompt) -> PromptChoice:
    """Raises: UnsupportedParameter, and what `Adapters.nearest` and `Engine.submit` raise."""
    for field, value in (("top_k", asked.top_k), ("temperature", asked.temperature)):
        if value is not None:
            raise UnsupportedParameter(
                f"routing.{field} is not for routing.mode semantic, which chooses one adapter or none",
                param=f"routing.{field}",
            )

    async def embedded() -> tuple[float, ...]:
        return (await embed(service, prompt.ids)).embedding or ()

    return await service.adapters.nearest(asked.candidates, embedded)


def terms_of(choice: PromptChoice) -> Terms:
    return () if choice.chosen is None else ((choice.chosen, 1.0),)


async def embed(service: Service, prompt_ids: tuple[int, ...]) -> Finished:
    """The end of a request that embeds a prompt. Raises: InvalidValue, PromptTooLong, QueueFull, EngineFailed."""
    if not prompt_ids:
        raise InvalidValue("the prompt has no tokens", param="prompt")
    lease = await service.adapters.acquire(())
    request = GenerationRequest(
        request_id=f"embed-{uuid.uuid4().hex}",
        prompt_ids=prompt_ids,
        mixture=lease.mixture,
        max_tokens=0,
        embed=True,
    )
    stream = service.engine.submit(request, lease)
    try:
        async for event in stream:
            if isinstance(event, Failed):
                raise type(event.error)(event.error.message, retry_after_s=event.error.retry_after_s)
            if isinstance(event, Finished):
                return event
    finally:
        stream.cancel()
    raise EngineFailed("a prompt got no embedding")
