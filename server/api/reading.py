"""A parsed body to a ticket: what is to be generated, and the shape in which to say it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from server.api.body import check
from server.api.choose import Terms, choose
from server.api.generation import Order
from server.api.messages import encode_messages
from server.api.prompts import EncodedPrompt, encode_prompt, read_prompts
from server.api.requests import MAX_SEQUENCES, ChatBody, CompletionBody, GenerationBody
from server.api.routing import read_routing
from server.api.sampling import read_sampling, read_stops, read_token_ids
from server.api.service import Service
from server.api.shapes import ChatShape, CompletionShape, Wanted
from server.errors import InvalidValue

COMPLETION_TOKENS = 16  # OpenAI's default for completions; chats go on to the end of the context


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that was understood. `ignored` are the unknown fields that a lenient server passed over."""

    order: Order
    shape: ChatShape | CompletionShape
    stream: bool
    include_usage: bool
    continuous_usage: bool
    ignored: tuple[str, ...]


async def read_chat(service: Service, data: dict[str, Any]) -> Ticket:
    """Raises: BadRequest."""
    checked = check(ChatBody, data, lenient=service.config.lenient)
    body = checked.body
    ids = await encode_messages(service, body.messages, body)
    order = _order(
        service, body, (EncodedPrompt(ids),), max_tokens=_max_tokens(body), logprobs=_chat_logprobs(body), echo=False
    )
    shape = ChatShape(_wanted(service, body, order), service.tokenizer.vocabulary, ids)
    return _ticket(body, order, shape, checked.ignored)


async def read_completion(service: Service, data: dict[str, Any]) -> Ticket:
    """Raises: BadRequest."""
    checked = check(CompletionBody, data, lenient=service.config.lenient)
    body = checked.body
    prompts = await _encode_prompts(service, body)
    max_tokens = _max_tokens(body)
    order = _order(
        service,
        body,
        prompts,
        max_tokens=COMPLETION_TOKENS if max_tokens is None else max_tokens,
        logprobs=body.logprobs,
        echo=bool(body.echo),
    )
    wanted = _wanted(service, body, order)
    shape = CompletionShape(wanted, service.tokenizer.vocabulary, [prompt.ids for prompt in prompts], n=order.n)
    return _ticket(body, order, shape, checked.ignored)


def read_choice(service: Service, body: GenerationBody) -> Terms:
    """Raises: InvalidValue, UnsupportedParameter, MixtureRefused."""
    return choose(body, base_names=service.base_names, whole_names=service.adapters.given_names())


def _order(
    service: Service,
    body: GenerationBody,
    prompts: tuple[EncodedPrompt, ...],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    echo: bool,
) -> Order:
    size = len(service.tokenizer.vocabulary)
    terms = read_choice(service, body)
    return Order(
        terms=terms,
        routing=read_routing(body, terms, base_names=service.base_names, whole_names=service.adapters.given_names()),
        prompts=prompts,
        sampling=read_sampling(body, seed=_seed(body), vocabulary_size=size),
        n=_choices(service, body, prompts=len(prompts)),
        max_tokens=max_tokens,
        stops=read_stops(body.stop),
        stop_token_ids=frozenset(
            read_token_ids(body.stop_token_ids or [], vocabulary_size=size, param="stop_token_ids")
        ),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        echo=echo,
        return_routing=bool(body.return_routing),
    )


async def _encode_prompts(service: Service, body: CompletionBody) -> tuple[EncodedPrompt, ...]:
    prompts = read_prompts(body.prompt)
    limit = service.engine.max_model_len
    special = body.add_special_tokens is not False
    return await service.in_text_thread(
        lambda: tuple(
            encode_prompt(prompt, service.tokenizer, max_model_len=limit, add_special_tokens=special)
            for prompt in prompts
        )
    )


def _ticket(body: GenerationBody, order: Order, shape: ChatShape | CompletionShape, ignored: tuple[str, ...]) -> Ticket:
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidValue("stream_options is only for stream=true", param="stream_options")
    return Ticket(
        order=order,
        shape=shape,
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None and bool(options.continuous_usage_stats),
        ignored=ignored,
    )


def _wanted(service: Service, body: GenerationBody, order: Order) -> Wanted:
    return Wanted(
        model=body.model or service.base_id,
        logprobs=order.logprobs is not None,
        token_ids=bool(body.return_token_ids),
        echo=order.echo,
        routing=order.return_routing,
        usage=body.stream_options is not None and bool(body.stream_options.include_usage),
    )


def _choices(service: Service, body: GenerationBody, *, prompts: int) -> int:
    count = body.n or 1
    if count > service.config.max_choices:
        raise InvalidValue(f"n is {count}, above the maximum of {service.config.max_choices}", param="n")
    if prompts * count > MAX_SEQUENCES:
        raise InvalidValue(
            f"{prompts} prompts with n={count} are {prompts * count} texts, above the maximum of {MAX_SEQUENCES}",
            param="n",
        )
    return count


def _seed(body: GenerationBody) -> int:
    return secrets.randbits(63) if body.seed is None else body.seed


def _max_tokens(body: ChatBody | CompletionBody) -> int | None:
    older, newer = body.max_tokens, body.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise InvalidValue(f"max_tokens is {older} and max_completion_tokens is {newer}: send one", param="max_tokens")
    return older if newer is None else newer


def _chat_logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidValue("top_logprobs needs logprobs=true", param="top_logprobs")
    return None
