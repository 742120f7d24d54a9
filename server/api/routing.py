"""The field `routing`: who chooses the adapters of a request. Pure; references are understood by the adapter store.

* `arrow` and `gate` choose token by token, in the engine (`server.primitives.route`).
* `semantic` chooses once, by the prompt, before anything is leased (`server.api.semantic`).
"""

from __future__ import annotations

from collections.abc import Collection

from server.api.choose import Terms, routes_itself
from server.api.requests import GenerationBody, RoutingItem
from server.errors import InvalidValue
from server.records import RoutingOrder


def read_routing(
    body: GenerationBody, terms: Terms, *, base_names: Collection[str], whole_names: Collection[str] = ()
) -> RoutingOrder | None:
    """`terms` is what the other fields choose. Raises: InvalidValue, naming the field."""
    item = body.routing
    if routes_itself(body, base_names=base_names, whole_names=whole_names):
        item = item or RoutingItem(mode="semantic")
        if item.mode != "semantic":
            raise InvalidValue(f"model auto is routing.mode semantic, not {item.mode}: send one", param="routing.mode")
    if item is None:
        return None
    order = RoutingOrder(item.mode, tuple(item.candidates or ()), item.top_k, item.temperature)
    twice = sorted({ref for ref in order.candidates if order.candidates.count(ref) > 1})
    if twice:
        raise InvalidValue(f"routing.candidates names {twice[0][:200]} twice", param="routing.candidates")
    if order.mode == "gate":
        if len(terms) != 1 or terms[0][1] != 1.0:
            raise InvalidValue("routing.mode gate needs one router as model, alone and at weight 1", param="model")
        return order
    if terms:
        raise InvalidValue(
            f"routing.mode {order.mode} chooses the adapters itself: model must be the base, and no other field may "
            "choose one",
            param="routing",
        )
    if order.mode == "arrow" and not order.candidates:
        raise InvalidValue("routing.mode arrow needs candidates", param="routing.candidates")
    return order
