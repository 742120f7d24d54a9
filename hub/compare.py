"""What can be told of versions by reading them, from any hub: whether their bytes are whole, and what parts two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hub.contract import Change, Difference, Resolved, Verified
from hub.errors import Corrupt, NotFound

if TYPE_CHECKING:
    from hub.folder import Stream
    from hub.manifest import FileEntry, Manifest


def verify_files(resolved: Resolved, manifest: Manifest, stream: Stream) -> Verified:
    """Read every byte; the streams re-hash. Raises: Corrupt with every damaged file."""
    damaged = [reason for entry in manifest.files if (reason := _damage(entry, stream)) is not None]
    if damaged:
        raise Corrupt(f"{resolved.name}@{resolved.version} is damaged: {'; '.join(damaged)}")
    total = sum(entry.size for entry in manifest.files)
    return Verified(resolved.name, resolved.version, resolved.digest, len(manifest.files), total)


def difference(before: Resolved, old: Manifest, after: Resolved, new: Manifest) -> Difference:
    """Field by field; a file by its digest."""
    first, second = _facts(old), _facts(new)
    changes = [
        Change(field, first.get(field), second.get(field))
        for field in sorted(first.keys() | second.keys())
        if first.get(field) != second.get(field)
    ]
    return Difference(before, after, tuple(changes))


def _damage(entry: FileEntry, stream: Stream) -> str | None:
    size = 0
    try:
        for chunk in stream(entry):
            size += len(chunk)
    except (NotFound, Corrupt) as error:
        return f"{entry.path}: {error}"
    return None if size == entry.size else f"{entry.path}: has {size} bytes, the manifest says {entry.size}"


def _facts(manifest: Manifest) -> dict[str, Any]:
    """A manifest as flat fields; files by their digest, so that a change of content is a change."""
    whole = manifest.model_dump(mode="json", exclude={"files", "digest", "schema_version"})
    files = {f"files.{entry.path}": f"sha256:{entry.sha256} ({entry.size} bytes)" for entry in manifest.files}
    return {**dict(_flat(whole, "")), **files}


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
