"""The names that semantic routing may choose from, with their centroids: read once, until the hub says that they moved.

Only the two small files of centroids are fetched, never an adapter's weights. What is kept is by digest, so an alias
that moves costs one look at what it now means. While the hub is away, what was known goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from server.adapters.semantic import Centroids
from server.adapters.source import Resolution, Source
from server.errors import Unavailable

MAX_STRAYS = 256  # centroids kept of digests that no name means now


class Catalogue:
    """Lives on the HTTP loop; the hub is asked in worker threads, by one caller at a time."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._names: Mapping[str, Resolution] = {}
        self._changes = 0
        self._known_at: int | None = None  # how many changes `_names` knows of
        self._centroids: dict[str, Centroids | None] = {}  # by digest
        self._asking = asyncio.Lock()

    def forget_names(self) -> None:
        self._changes += 1

    async def names(self) -> Mapping[str, Resolution]:
        """Every name that this base can serve, and what its default alias means.

        Raises: Unavailable, where nothing was known before.
        """
        async with self._asking:
            changes = self._changes  # before the answer: what happens while it comes makes it old again
            if self._known_at != changes:
                try:
                    listed = await asyncio.to_thread(self._source.listed)
                except Unavailable:
                    if not self._names:
                        raise
                else:
                    self._names = {line.resolution.name: line.resolution for line in listed}
                    self._known_at = changes
            return self._names

    async def centroids(self, resolution: Resolution) -> Centroids | None:
        """None for a version that has none. Raises: AdapterIncompatible, AdapterUnavailable, Unavailable."""
        async with self._asking:
            if resolution.digest not in self._centroids:
                self._centroids[resolution.digest] = await asyncio.to_thread(self._source.centroids, resolution)
                self._drop_strays()
            return self._centroids[resolution.digest]

    def _drop_strays(self) -> None:
        """The oldest first; the one that has just come is the last."""
        meant = {resolution.digest for resolution in self._names.values()}
        strays = [digest for digest in self._centroids if digest not in meant]
        for digest in strays[:-MAX_STRAYS]:
            del self._centroids[digest]
