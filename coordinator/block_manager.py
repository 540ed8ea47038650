"""Which blocks of the KV cache are free. Every rank has the same blocks, so one account serves all."""

from collections import deque


class BlockManager:
    """Hands out blocks [0, num_blocks) of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, block_ids: list[int], num_tokens: int) -> list[int] | None:
        """Extends a block table in place to hold `num_tokens`; the new blocks, or None if too few."""
        missing = self.blocks_for(num_tokens) - len(block_ids)
        if missing > len(self._free):
            return None
        new = [self._free.popleft() for _ in range(missing)]
        block_ids.extend(new)
        return new

    def release(self, block_ids: list[int]) -> None:
        """Takes all blocks of a table back and empties it."""
        self._free.extend(block_ids)
        block_ids.clear()
