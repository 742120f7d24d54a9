"""Semantic routing: the request's own prompt chooses the adapters, once, before anything is leased."""

from __future__ import annotations

from server.api.choose import Terms
from server.api.prompts import EncodedPrompt
from server.api.service import Service
from server.errors import UnsupportedParameter
from server.records import RoutingOrder


async def choose_by_prompt(service: Service, asked: RoutingOrder, prompt: EncodedPrompt) -> Terms:
    """Raises: UnsupportedParameter."""
    raise UnsupportedParameter("routing.mode semantic is not supported by this server yet", param="routing.mode")
