"""What is recorded of an adapter, once, at push. Frozen; nothing here touches a file.

Law: a manifest is read back equal to what was written, and its digest follows from its config and files alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from hub.base import Base
from hub.digest import DIGEST, SHA256, adapter_digest
from hub.errors import Corrupt

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
GOLDEN_ROWS_FILE = "golden.json"
GOLDEN_TENSORS_FILE = "golden.safetensors"
CENTROIDS_FILE = "centroids.json"
CENTROID_TENSORS_FILE = "centroids.safetensors"
RECIPE_FILE = "recipe.json"
METRICS_FILE = "metrics.json"
README_FILE = "README.md"
TEMPLATE_FILE = "chat_template.jinja"
MANIFEST_FILE = "manifest.json"

# A flat name: no separator can stand in it, and no dot can start it.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\z")]
# Any: which kinds there are is written in `hub.methods` alone, and a newer hub may hold one that is unknown here.
KindName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,31}\z")]
Sha256 = Annotated[str, StringConstraints(pattern=rf"^{SHA256}\z")]
Digest = Annotated[str, StringConstraints(pattern=rf"^{DIGEST}\z")]


class FileEntry(BaseModel):
    """One kept file. Units: size in bytes."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    path: FileName
    size: int
    sha256: Sha256


class Manifest(BaseModel):
    """Everything that a server or a person asks of an adapter before its weights are read.

    Units: `bytes` is the size of the weights file; `parameters` counts its values.
    `targets` are the last parts of the adapted modules' names; empty for virtual tokens. `exact`: whether a
    server adds what is stored; whether that is exactly what it was made of is another question (`hub.fidelity`).
    """

    model_config = ConfigDict(frozen=True, defer_build=True, extra="forbid")

    schema_version: Literal[1] = 1
    digest: Digest
    kind: KindName
    base: Base
    config: dict[str, Any]
    files: tuple[FileEntry, ...]
    rank: int | None = None
    virtual_tokens: int | None = None
    targets: tuple[str, ...] = ()
    parameters: int
    bytes: int
    exact: bool = True
    error: float | None = None
    parents: tuple[Digest, ...] = ()
    recipe: dict[str, Any] | None = None
    data_digest: str | None = None
    metrics: dict[str, Any] | None = None

    def file(self, path: str) -> FileEntry | None:
        """The entry of one kept file, or None."""
        return next((entry for entry in self.files if entry.path == path), None)

    def recomputed_digest(self) -> str:
        """What the digest must be, from the config and the files."""
        return identity(self.config, self.files)


def parse_manifest(text: str, digest: str) -> Manifest:
    """The manifest of a digest, believed only if its content has that digest.

    Raises: Corrupt.
    """
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise Corrupt(f"the manifest of {digest} is damaged: {error.error_count()} fields do not fit") from error
    if manifest.digest != digest or manifest.recomputed_digest() != digest:
        raise Corrupt(f"the manifest of {digest} is damaged: its content has another digest")
    return manifest


def identity(config: dict[str, Any], files: tuple[FileEntry, ...]) -> str:
    """The digest of an adapter with this config and these kept files."""
    return adapter_digest(config, [(entry.path, entry.sha256) for entry in files if entry.path != CONFIG_FILE])
