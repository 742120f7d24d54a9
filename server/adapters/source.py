"""The hub as the server sees it: names become digests, digests become tensors, every byte re-hashed on the way.

The only file beside `server.main` that knows the hub; the lowerings know its table of kinds. What the hub raises leaves
here as the server's own errors.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import Tensor
from torch.nn.functional import normalize

from hub.base import Base
from hub.cache import Remembered
from hub.contract import Adapter as HubAdapter
from hub.contract import HubReader, places
from hub.errors import BadReference, BadTensors, Corrupt, HubError, HubUnavailable, LogLost, NotFound
from hub.keys import fits
from hub.manifest import (
    CENTROID_TENSORS_FILE,
    CENTROIDS_FILE,
    GOLDEN_ROWS_FILE,
    GOLDEN_TENSORS_FILE,
    WEIGHTS_FILE,
    Manifest,
)
from hub.ref import Reference, parse_reference
from server.adapters.semantic import Centroids
from server.adapters.tensor_file import TensorFiles
from server.errors import (
    AdapterIncompatible,
    AdapterUnavailable,
    InvalidValue,
    ModelNotFound,
    ServerError,
    Unavailable,
)
from server.records import UNKNOWN_MODEL

P = ParamSpec("P")
R = TypeVar("R")
MAX_FIXED = 4096
HUB_RETRY_S = 2.0
NAMES_LIFE_S = 5.0
SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "experts",
    "tokenizer",
)


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a reference means today. `alias` is the pointer it went through, if any.

    `remembered`: what it meant when the hub was last asked; it cannot be reached now.
    """

    name: str
    version: int
    digest: str
    alias: str | None
    remembered: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class GoldenRow:
    """A prompt and the logits (vocabulary) that must follow it."""

    prompt_ids: tuple[int, ...]
    logits_V: Tensor


@dataclass(frozen=True, slots=True)
class Artifact:
    """An adapter in host memory, as it was pushed."""

    kind: str
    rank: int | None
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    golden: tuple[GoldenRow, ...]
    tier: str  # where its weights were read: disk, or hub when that is across the network
    golden_is_quantized: bool = False  # its logits are those of a base in few bits


@dataclass(frozen=True, slots=True)
class Listed:
    """A name of the hub and what its default alias means."""

    resolution: Resolution
    kind: str
    created: int


class Happened(NamedTuple):
    """An event of the hub: its number, and the name that something happened to."""

    seq: int
    name: str


class Forgotten(Exception):
    """The hub has gone back behind the events that were seen: what is known of its aliases must be asked anew."""


class Source:
    """Blocking calls: the store makes them from worker threads.

    `allow` are patterns of the names that this server may load, none meaning all; others do not exist for it.
    """

    def __init__(self, hub: HubReader, base: Base, *, default_alias: str, allow: Sequence[str] = ()) -> None:
        self._hub = hub
        self._base = base
        self._default_alias = default_alias
        self._allow = tuple(allow)
        self._fixed: OrderedDict[str, Resolution] = OrderedDict()  # references that cannot move
        self._files = TensorFiles()
        self._names: list[str] = []
        self._names_until = 0.0

    def pointer(self, text: str) -> tuple[str, str] | None:
        """(name, alias) when the reference goes through an alias, None when it names a version or a digest.

        Raises: InvalidValue.
        """
        reference = _translate(text, parse_reference, text)
        if reference.version is not None or reference.digest is not None:
            return None
        return reference.name, reference.selector or self._default_alias

    def resolve(self, text: str) -> Resolution:
        """Raises: InvalidValue, ModelNotFound."""
        fixed = self._fixed.get(text)
        if fixed is not None:
            return fixed
        reference = _translate(text, parse_reference, text)
        if not self._allows(reference.name):
            raise ModelNotFound(UNKNOWN_MODEL.format(text[:200]), param="model")
        try:
            found = self._hub.resolve(reference, default_alias=self._default_alias)
        except NotFound as error:
            raise ModelNotFound(UNKNOWN_MODEL.format(text[:200]) + self._hint(reference)) from error
        except HubError as error:
            raise _server_error(text, error) from error
        remembered = isinstance(found, Remembered)
        resolution = Resolution(found.name, found.version, found.digest, found.alias, remembered)
        if found.alias is None:
            self._fixed[text] = resolution
            if len(self._fixed) > MAX_FIXED:
                self._fixed.popitem(last=False)
        return resolution

    def earlier(self, name: str, alias: str) -> Sequence[Resolution]:
        """Where an alias was before, the latest place first, without what was removed. Raises: AdapterUnavailable."""
        been = places(_translate(name, self._hub.log, name), alias)
        found = []
        for version in dict.fromkeys(reversed(been[:-1])):
            with suppress(ModelNotFound):
                found.append(self.resolve(f"{name}@{version}"))
        return found

    def fetch(self, resolution: Resolution) -> Artifact:
        """Read and verify everything of one version. Raises: AdapterIncompatible, AdapterUnavailable."""
        manifest = _translate(resolution.label, self._hub.manifest, resolution.digest)
        self._check_base(manifest, resolution.label)
        entry = manifest.file(WEIGHTS_FILE)
        tier = "disk" if entry is not None and self._hub.at_hand(entry) else "hub"
        tensors = self._tensors(manifest, WEIGHTS_FILE, resolution.label)
        golden: tuple[GoldenRow, ...] = ()
        quantized = False
        if manifest.file(GOLDEN_TENSORS_FILE) is not None:
            golden, quantized = self._golden(manifest, resolution.label)
        return Artifact(manifest.kind, manifest.rank, manifest.config, tensors, golden, tier, quantized)

    def centroids(self, resolution: Resolution) -> Centroids | None:
        """Where the prompts of one version lie, if it tells; reads nothing else of it.

        Raises: AdapterIncompatible, AdapterUnavailable.
        """
        manifest = _translate(resolution.label, self._hub.manifest, resolution.digest)
        self._check_base(manifest, resolution.label)
        if manifest.file(CENTROIDS_FILE) is None:
            return None
        said = json.loads(_translate(resolution.label, self._hub.read, manifest.digest, CENTROIDS_FILE))
        tensors = self._tensors(manifest, CENTROID_TENSORS_FILE, resolution.label)
        units_CE = normalize(tensors["centroids"], dim=-1)
        return Centroids(tensors["mean"], tensors["scale"], units_CE, float(said["threshold"]))

    def listed(self) -> Sequence[Listed]:
        """Every name that this base can serve under its default alias."""
        adapters = _translate("the hub", self._hub.adapters)
        return [line for adapter in adapters if (line := self._line(adapter, self._default_alias)) is not None]

    def described(self, text: str) -> Listed | None:
        """What one reference means, if this base can serve it. Raises: InvalidValue, ModelNotFound."""
        resolution = self.resolve(text)
        adapters = _translate("the hub", self._hub.adapters, resolution.name)
        return self._line(adapters[0], str(resolution.version)) if adapters else None

    def head(self) -> int:
        return _translate("the hub", self._hub.head)

    def watch(self, after: int) -> Iterator[Sequence[Happened]]:
        """Events as they happen, and none now and then. Raises: Unavailable, Forgotten."""
        try:
            for events in self._hub.watch(after):
                for event in events:
                    if event.kind == "removed":
                        self._fixed.clear()
                yield [Happened(event.seq, event.name) for event in events]
        except LogLost as error:
            self._fixed.clear()
            raise Forgotten from error
        except HubError as error:
            raise _server_error("its events", error) from error

    def _allows(self, name: str) -> bool:
        return not self._allow or any(fits(name, pattern) for pattern in self._allow)

    def _line(self, adapter: HubAdapter, selector: str) -> Listed | None:
        version = int(selector) if selector.isdecimal() else adapter.aliases.get(selector)
        found = next((one for one in adapter.versions if one.version == version), None)
        if found is None or found.fingerprint != self._base.fingerprint or not self._allows(adapter.name):
            return None
        resolution = Resolution(adapter.name, found.version, found.digest, None)
        return Listed(resolution, found.kind, int(found.at.timestamp()))

    def _check_base(self, manifest: Manifest, label: str) -> None:
        if manifest.base.fingerprint == self._base.fingerprint:
            return
        for name in SHAPE_FIELDS:
            theirs, ours = getattr(manifest.base, name), getattr(self._base, name)
            if theirs != ours:
                raise AdapterIncompatible(
                    f"{label} was made for {manifest.base.name} with {name} {theirs}; this server's base "
                    f"{self._base.name} has {name} {ours}",
                    param="model",
                )
        raise AdapterIncompatible(f"{label} was made for another base than {self._base.name}", param="model")

    def _tensors(self, manifest: Manifest, path: str, label: str) -> Mapping[str, Tensor]:
        entry = manifest.file(path)
        if entry is None:
            raise AdapterUnavailable(f"{label} has no {path}")
        content = _translate(label, self._hub.load, manifest.digest, entry)
        try:
            return self._files.read(content)
        except BadTensors as error:
            raise AdapterUnavailable(f"{path} of {label} is no safetensors file: {error}") from error

    def _golden(self, manifest: Manifest, label: str) -> tuple[tuple[GoldenRow, ...], bool]:
        """The rows, and whether their base was in few bits."""
        told = json.loads(_translate(label, self._hub.read, manifest.digest, GOLDEN_ROWS_FILE))
        tensors = self._tensors(manifest, GOLDEN_TENSORS_FILE, label)
        rows = tuple(
            GoldenRow(tuple(tensors[f"{row}.input_ids"].tolist()), tensors[f"{row}.logits"])
            for row in range(len(told["rows"]))
        )
        return rows, told.get("quantize") is not None

    def _hint(self, reference: Reference) -> str:
        """Names like the one that is not there. A list that is a few seconds old does: unknown names come in floods."""
        now = time.monotonic()
        if now > self._names_until:
            with suppress(ServerError):
                listed = _translate("the hub", self._hub.adapters)
                self._names = [adapter.name for adapter in listed if self._allows(adapter.name)]
            self._names_until = now + NAMES_LIFE_S
        near = get_close_matches(reference.name, self._names, n=3)
        return f"; near names: {', '.join(near)}" if near else ""


def _translate(what: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    try:
        return call(*args, **kwargs)
    except HubError as error:
        raise _server_error(what, error) from error


def _server_error(what: str, error: HubError) -> ServerError:
    if isinstance(error, BadReference):
        return InvalidValue(str(error), param="model")
    if isinstance(error, NotFound):
        return ModelNotFound(UNKNOWN_MODEL.format(what[:200]), param="model")
    if isinstance(error, Corrupt):
        return AdapterUnavailable(f"{what} is corrupt in the hub: its bytes do not match their digest")
    if isinstance(error, HubUnavailable):
        return Unavailable(f"the hub cannot be reached for {what[:200]}", retry_after_s=HUB_RETRY_S)
    return AdapterUnavailable(f"the hub did not give {what}: {type(error).__name__}")
