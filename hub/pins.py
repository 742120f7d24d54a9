"""Which adapters of a hub another one pins, by name and digest, and cannot be served without: a router its experts.

A hub takes a router only while all its experts are there and fit it, and keeps them as long as a version of it is live.
Law: what a live version pins is a live version of that name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hub.families.method import Config
from hub.fields import shown
from hub.manifest import Manifest
from hub.methods import METHODS
from hub.ref import parse_reference

PINNING_FIELD = "experts"
_EXPERT_KIND = "lora"
# What makes of a LoRA more than low-rank terms at Linears, by the only values that do not.
_PLAIN: dict[str, tuple[object, ...]] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
    "alora_invocation_tokens": (None,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


class Pin(NamedTuple):
    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}"


def pins_of(config: Config) -> tuple[Pin, ...]:
    """What a sound config pins, in its order."""
    found = [parse_reference(text) for text in METHODS[config["peft_type"]].pins(config)]
    return tuple(Pin(one.name, str(one.digest)) for one in found)


def why_no_expert(expert: Manifest, router: Manifest) -> str | None:
    """Why an adapter cannot be an expert of a router, by their records, or None."""
    if expert.kind != _EXPERT_KIND:
        return f"is of kind {expert.kind}; a router's experts are LoRA adapters"
    if expert.base.fingerprint != router.base.fingerprint:
        return (
            f"is of base {expert.base.name} (fingerprint {expert.base.fingerprint[:12]}), the router of "
            f"{router.base.name} (fingerprint {router.base.fingerprint[:12]})"
        )
    more = ", ".join(more_than_low_rank(expert.config))
    return f"has {more}; experts are low-rank terms alone" if more else None


def more_than_low_rank(config: Config) -> Iterable[str]:
    """What a LoRA's config asks for beside low-rank terms at Linears."""
    for key, plain in _PLAIN.items():
        if key in config and config[key] not in plain:
            yield f"{key} {shown(config[key])}"
