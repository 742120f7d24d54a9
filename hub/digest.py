"""The one identity: a digest over the canonical config and every other kept file.

    sha256( canonical_json({"config": config, "files": [[path, sha256], ...] sorted by path}) )

Law: the order of keys, of files and of set-like lists changes nothing; any other change of any byte changes it.
See docs/decisions/0005-the-digest-covers-every-kept-file.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from hub.errors import BadReference
from hub.ref import printable
from hub.strict_json import canonical

CHUNK_BYTES = 1 << 20
DIGEST = r"sha256:[0-9a-f]{64}"
SHA256 = r"[0-9a-f]{64}"


def adapter_digest(config: Mapping[str, Any], files: Iterable[tuple[str, str]]) -> str:
    """The digest of an adapter; `files` are (path, sha256) of all kept files but adapter_config.json."""
    identity = {"config": dict(config), "files": sorted([path, sha256] for path, sha256 in files)}
    return f"sha256:{sha256_of(canonical(identity))}"


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_stream(source: BinaryIO) -> str:
    """Of the rest of a file, in flat memory."""
    hasher = hashlib.sha256()
    for chunk in chunks(source):
        hasher.update(chunk)
    return hasher.hexdigest()


def chunks(source: BinaryIO) -> Iterator[bytes]:
    """The rest of a file in pieces of at most CHUNK_BYTES."""
    while chunk := source.read(CHUNK_BYTES):
        yield chunk


def check_digest(digest: str) -> str:
    """Raises: BadReference unless it is a whole digest; so no other text becomes a key or a file name."""
    if not re.fullmatch(DIGEST, digest):
        raise BadReference(f"{printable(digest)} is no digest: sha256: and 64 of 0-9 a-f")
    return digest


def check_sha256(sha256: str) -> str:
    """Raises: BadReference unless it is 64 hex digits."""
    if not re.fullmatch(SHA256, sha256):
        raise BadReference(f"{printable(sha256)} is no sha256: 64 of 0-9 a-f")
    return sha256
