"""A stored adapter as a folder again: what a pull writes, and how it is known to be there already."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from hub.blobs import flush_folder
from hub.digest import sha256_of_stream
from hub.errors import HubUnavailable, WouldOverwrite
from hub.manifest import MANIFEST_FILE, FileEntry, Manifest
from hub.ref import printable
from hub.strict_json import readable
from hub.validate import open_regular

Stream = Callable[[FileEntry], Iterator[bytes]]


def pull_folder(folder: Path, manifest: Manifest, stream: Stream, *, what: str) -> None:
    """Write an adapter, whole or not at all; a folder that holds it already is left as it is.

    Raises: WouldOverwrite, HubUnavailable, and what `stream` raises.
    """
    target = folder.absolute()
    if holds(target, manifest):
        return
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise WouldOverwrite(f"{printable(str(folder))} is there and holds something else than {what}")
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(aside, manifest, stream)
        aside.rename(target)
        flush_folder(target.parent)
    except OSError as error:
        raise HubUnavailable(f"{printable(str(folder))} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def holds(folder: Path, manifest: Manifest) -> bool:
    """Whether a folder is already exactly this adapter, as `pull_folder` makes it."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if names - {MANIFEST_FILE} != {entry.path for entry in manifest.files}:
        return False
    return all(_sha256_of_file(folder / entry.path) == entry.sha256 for entry in manifest.files)


def _write(folder: Path, manifest: Manifest, stream: Stream) -> None:
    folder.mkdir()
    for entry in manifest.files:
        with (folder / entry.path).open("xb") as target:
            for chunk in stream(entry):
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
    (folder / MANIFEST_FILE).write_bytes(readable(manifest.model_dump(mode="json")))
    flush_folder(folder)


def _sha256_of_file(path: Path) -> str | None:
    try:
        with open_regular(path) as source:
            return sha256_of_stream(source)
    except OSError:
        return None
