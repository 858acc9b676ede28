"""Blocks of the KV cache: who holds them, which hold reusable prefixes, which to take next.

A block is in exactly one state:
    owned    referenced by one or more requests
    cached   unreferenced, its content known by hash and reusable; counts as free
    empty    unreferenced, its content worthless
`free` is the queue of cached and empty blocks in the order in which they will be taken: empty ones first, then the
least recently freed. Prefix hashes are SHA-256 over (salt, parent, tokens), never Python's `hash`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full block that follows the block hashed `parent`. A chain begins with `root_hash`."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


def root_hash(salt: str) -> bytes:
    """Where a chain begins: requests with different salts share no block."""
    return hashlib.sha256(b"pagoda\0" + salt.encode("utf-8", "surrogatepass")).digest()


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now, cached ones among them."""
        return len(self._free)

    @property
    def num_owned(self) -> int:
        return self.num_blocks - len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks with one reference each; a cached one loses its content. Raises ValueError when short."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of the chain `hashes`; their references are unchanged."""
        found = []
        for value in hashes:
            block = self._block_of.get(value)
            if block is None:
                break
            found.append(block)
        return found

    def num_unreferenced(self, blocks: Iterable[int]) -> int:
        return sum(self._references[block] == 0 for block in blocks)

    def is_private(self, block: int) -> bool:
        """True when the block may be written: one owner, and no name by which others could find it."""
        return self._references[block] == 1 and self._hash_of[block] is None

    def name_of(self, block: int) -> bytes | None:
        """The hash by which the block is found."""
        return self._hash_of[block]

    def share(self, blocks: Iterable[int]) -> None:
        """One reference more for each block; a cached one leaves the free queue."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less for each block; the tail of a chain is freed first, so that its head lives longest."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, value: bytes) -> None:
        """Make an owned block's content findable. The first block of a content keeps its name: tables never change."""
        if value not in self._block_of and self._hash_of[block] is None:
            self._block_of[value] = block
            self._hash_of[block] = value

    def _forget(self, block: int) -> None:
        value = self._hash_of[block]
        if value is not None:
            del self._block_of[value]
            self._hash_of[block] = None

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Prove the invariants against the blocks of all live requests. Raises AssertionError naming the breach."""
        held = Counter(block for blocks in owners for block in blocks)
        for block, count in enumerate(self._references):
            if count != held[block]:
                raise AssertionError(f"block {block} has {count} references and {held[block]} owners")
            if (count == 0) != (block in self._free):
                raise AssertionError(
                    f"block {block} with {count} references is {'' if count else 'not '}in the free queue"
                )
        for value, block in self._block_of.items():
            if self._hash_of[block] != value:
                raise AssertionError(f"block {block} is found by a hash it does not have")
        named = sum(value is not None for value in self._hash_of)
        if named != len(self._block_of):
            raise AssertionError(f"{named} blocks have a hash, {len(self._block_of)} can be found")
