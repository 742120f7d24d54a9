"""What a hub would refuse of an adapter, told before it is trained: by the config, on the base's own modules.

The hub's limits on sizes are those of a push, and stand elsewhere. A base that the hub cannot describe is trained on
all the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from hub.base import describe_base, modules
from hub.errors import BaseUnusable
from hub.families.method import Complaint, Config, Method
from hub.methods import METHODS, Limits, config_complaints, layout_of, shapes_are_told
from hub.targets import matching_complaint

NO_LIMITS: Final = Limits(sys.maxsize, sys.maxsize, sys.maxsize)
# An initialisation steers training only: what is saved is a plain LoRA of the base as it is.
INITIALISATION: Final = {"init_lora_weights": True}


def hub_problems(config: Any, folder: Path) -> list[str]:
    """Of a PEFT config; formats of our own are made as the hub wants them."""
    if isinstance(config, Mapping):
        return []
    written = {**as_written(config)}
    written |= {key: value for key, value in INITIALISATION.items() if key in written}
    method = METHODS[str(written["peft_type"])]
    complaints = config_complaints(method, written, NO_LIMITS)
    if shapes_are_told(method, written):
        complaints += on_the_base(method, written, folder)
    return [f"{key} {reason}" for key, reason in dict.fromkeys(complaints)]


def on_the_base(method: Method, written: Config, folder: Path) -> list[Complaint]:
    try:
        base, found = describe_base(folder), modules(folder)
    except BaseUnusable:
        return []
    slow = matching_complaint(written, found)
    return [("target_modules", slow)] if slow else [*layout_of(method, written, base, found).complaints]


def as_written(config: Any) -> Mapping[str, Any]:
    """The config as PEFT saves it."""
    fields: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=lambda value: sorted(value)))
    return fields
