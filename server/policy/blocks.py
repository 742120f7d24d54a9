"""KV blocks: who owns which, and which hold a prefix that the next request can reuse.

Knows numbers and keys only, never a tensor. A block is in one of three states: held (one or more owners), cached (no
owner, its content still answers to a key) or blank (no owner, no key). Cached blocks are handed out last, the least
recently released first.
Laws: every block is in exactly one state; a block is never handed out while it is held; blank + cached + held = all.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

Key = bytes


def block_key(parent: Key, tokens: Sequence[int], marks: Sequence[tuple[int, str]] = ()) -> Key:
    """The identity of a full block: its tokens, everything before them, and which mixture each was computed with.

    `marks` are the places in the block from which on another mixture works: (offset, its salt).
    """
    written = "".join(f"{offset}:{salt};" for offset, salt in marks)
    return hashlib.sha256(parent + array("q", tokens).tobytes() + written.encode()).digest()


class BlockPool:
    def __init__(self, total: int) -> None:
        self.total = total
        self._owners = [0] * total
        self._blank = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def available(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def held(self) -> int:
        return self.total - self.available

    def take(self) -> int:
        """A block without content. The caller has checked `available`."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._owners[block] = 1
        return block

    def find(self, key: Key) -> int | None:
        """The block that holds this content, if any; it is not taken yet."""
        return self._block_of.get(key)

    def is_held(self, block: int) -> bool:
        return self._owners[block] > 0

    def is_sole(self, block: int) -> bool:
        """It has one owner: released by that one, it is available."""
        return self._owners[block] == 1

    def share(self, block: int) -> None:
        """Add an owner to a block that `find` returned."""
        if self._owners[block] == 0:
            del self._cached[block]
        self._owners[block] += 1

    def publish(self, block: int, key: Key) -> None:
        """The block is full and will not change: others may find it. The first block of a key keeps it."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, block: int) -> None:
        assert self._owners[block] > 0, f"block {block} released without an owner"
        self._owners[block] -= 1
        if self._owners[block]:
            return
        if block in self._key_of:
            self._cached[block] = None
        else:
            self._blank.append(block)
