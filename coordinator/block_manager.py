"""Which blocks of the KV cache are free, in use, or hold a prefix that others may use again.

Every rank has the same blocks, so one account serves all.

A full block whose tokens are known is *cached*: it is found again by its tokens and all those before
them. The way there is a tree: a cached block has an id of its own, and its key is the id of the block
before it with its own tokens. Keys are compared as a whole, so that no two prefixes can be mistaken for
each other as with a hash alone.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

Key = tuple[int, tuple[int, ...]]

ROOT = 0
"""The id that stands before the first block of every sequence."""


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in order. The first `num_cached` are in the prefix cache, or their
    content is; `prefix` is the id of the last of these."""

    block_ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    prefix: int = ROOT


class BlockManager:
    """Hands out blocks [0, num_blocks) of `block_size` tokens each, and counts their references.

    A block without references is free. One that is cached too is handed out last, the least recently
    used first; until then its content can be found.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._last_id = ROOT
        self.clear()

    def clear(self) -> None:
        """Makes every block free and forgets what they held. No table may be in use any more."""
        self._references = [0] * self.num_blocks
        self._free = list(range(self.num_blocks - 1, -1, -1))
        # Free blocks that are cached, the least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._cached: dict[Key, tuple[int, int]] = {}  # to the block and its id
        self._keys: dict[int, Key] = {}  # of the cached blocks

    @property
    def num_free(self) -> int:
        """Blocks without references, cached ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Of the free blocks, those that hold a prefix."""
        return len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def attach(self, table: BlockTable, token_ids: Sequence[int]) -> int:
        """Begins an empty table with the cached blocks of a sequence; the number of their tokens.

        At least one token is left out: a sequence needs one to compute for its next.
        """
        assert not table.block_ids
        size = self.block_size
        for start in range(0, len(token_ids) - size, size):
            found = self._cached.get((table.prefix, tuple(token_ids[start : start + size])))
            if found is None:
                break
            block, table.prefix = found
            table.block_ids.append(block)
            if self._references[block] == 0:
                del self._idle[block]
            self._references[block] += 1
        table.num_cached = len(table.block_ids)
        return table.num_cached * size

    def grow(self, table: BlockTable, num_tokens: int) -> list[int] | None:
        """Extends a table to hold `num_tokens`; the new blocks, or None, and no change, if too few."""
        missing = self.blocks_for(num_tokens) - len(table.block_ids)
        if missing <= 0:
            return []
        if missing > self.num_free:
            return None
        new = [self._take() for _ in range(missing)]
        table.block_ids += new
        return new

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._cached[self._keys.pop(block)]
        self._references[block] = 1
        return block

    def cache(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        """Makes blocks of a table findable: those after its `num_cached`, full with these tokens."""
        assert self.prefix_caching
        size = self.block_size
        for start in range(0, len(token_ids), size):
            key = (table.prefix, tuple(token_ids[start : start + size]))
            block = table.block_ids[table.num_cached]
            # Where another sequence computed the same, its block stays the one to be found.
            if key not in self._cached:
                self._last_id += 1
                self._cached[key] = block, self._last_id
                self._keys[block] = key
            table.prefix = self._cached[key][1]
            table.num_cached += 1

    def release(self, table: BlockTable) -> None:
        """Gives up all blocks of a table and empties it."""
        # Backwards: of a prefix that is cached the end is handed out first.
        for block in reversed(table.block_ids):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        table.block_ids.clear()
        table.num_cached, table.prefix = 0, ROOT
