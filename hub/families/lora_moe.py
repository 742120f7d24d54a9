"""lora-moe: a trained router over adapters of this hub, which it names by their digests and does not copy.

In every decoder layer one linear row per expert for the token, `router.weight`, and one for the prompt,
`router.prompt_weight`; both (layers, experts, hidden size). What they compute is written in `server.primitives.route`;
the format is ours, PEFT has no such kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hub import fields
from hub.base import Base, Modules
from hub.digest import DIGEST
from hub.errors import BadReference
from hub.families.method import COMMON, INERT, NOTHING_SAVED, Complaint, Config, Field, Layout, Method
from hub.fields import shown
from hub.ref import parse_reference

ROUTER_TENSORS = ("router.weight", "router.prompt_weight")
MAX_EXPERTS = 256


def _experts(value: Any) -> str | None:
    """A list of name@sha256:... with whole digests, none twice."""
    if not isinstance(value, list) or not 2 <= len(value) <= MAX_EXPERTS:
        return f"must be a list of 2 to {MAX_EXPERTS} references, not {shown(value)}"
    digests = []
    for item in value:
        try:
            digest = parse_reference(item).digest if isinstance(item, str) else None
        except BadReference as error:
            return str(error)
        if digest is None or not re.fullmatch(DIGEST, digest):
            return f"{shown(item)} pins no expert: name@sha256: and 64 of 0-9 a-f are wanted"
        digests.append(digest)
    twice = next((digest for digest in digests if digests.count(digest) > 1), None)
    return None if twice is None else f"names {twice} twice"


FIELDS: Mapping[str, Field] = {
    **COMMON,
    "modules_to_save": NOTHING_SAVED,
    "experts": Field(_experts, shapes_tensors=True),
    "top_k": Field(fields.positive),
    "router_aux_loss_coef": INERT,  # of its training
}


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    return Layout(dict.fromkeys(ROUTER_TENSORS, (base.layers, len(config["experts"]), base.hidden_size)))


def _contradictions(config: Config) -> list[Complaint]:
    experts, top_k = config.get("experts"), config.get("top_k")
    if isinstance(experts, list) and type(top_k) is int and top_k > len(experts):
        return [("top_k", f"{top_k} is above the {len(experts)} experts")]
    return []


def _pins(config: Config) -> list[str]:
    return list(config["experts"])


LORA_MOE = Method(
    "lora-moe",
    "LORA_MOE",
    FIELDS,
    required=("experts", "top_k"),
    layout=_layout,
    contradictions=_contradictions,
    pins=_pins,
)
