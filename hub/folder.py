"""A stored adapter as a folder again: what a pull writes, and how it is known to be there already."""

from __future__ import annotations

import os
from pathlib import Path

from hub.blobs import BlobStore, flush_folder
from hub.digest import sha256_of_stream
from hub.manifest import MANIFEST_FILE, Manifest
from hub.strict_json import readable
from hub.validate import open_regular


def write_folder(folder: Path, manifest: Manifest, blobs: BlobStore) -> None:
    """Make a new folder of the kept files and the manifest, all flushed to the disk.

    Raises: OSError, NotFound, Corrupt; then the folder is there in part.
    """
    folder.mkdir()
    for entry in manifest.files:
        with (folder / entry.path).open("xb") as target:
            for chunk in blobs.stream(entry.sha256):
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
    (folder / MANIFEST_FILE).write_bytes(readable(manifest.model_dump(mode="json")))
    flush_folder(folder)


def holds(folder: Path, manifest: Manifest) -> bool:
    """Whether a folder is already exactly this adapter, as `write_folder` makes it."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if names - {MANIFEST_FILE} != {entry.path for entry in manifest.files}:
        return False
    return all(_sha256_of_file(folder / entry.path) == entry.sha256 for entry in manifest.files)


def _sha256_of_file(path: Path) -> str | None:
    try:
        with open_regular(path) as source:
            return sha256_of_stream(source)
    except OSError:
        return None
