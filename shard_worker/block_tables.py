"""The block tables of sequences that decode, as a step's inputs have them."""

from collections.abc import Sequence

import numpy as np


class BlockTables:
    """A column for each row of `last_tokens`, of up to `max_blocks` blocks; only what is new is written.

    To write whole tables at each step takes Python the longer, the longer contexts are.
    """

    def __init__(self, max_blocks: int) -> None:
        self._ids = np.zeros((max_blocks, 0), dtype=np.int32)
        # What each row's column was written from, and how much of it.
        self._sources: list[tuple[Sequence[int], int]] = []

    def update(self, row: int, block_ids: Sequence[int], used: int) -> None:
        """The row's table is the first `used` of `block_ids` from now on. As long as that is the same
        object it may only be appended to."""
        if row >= len(self._sources):
            self._grow(row + 1)
        source, known = self._sources[row]
        if source is not block_ids:
            known = 0
        if known < used:
            self._ids[known:used, row] = block_ids[known:used]
            self._sources[row] = block_ids, used

    def gather(self, rows: np.ndarray, out: np.ndarray) -> None:
        """The tables of rows [n], int64 -> `out`, int32 [blocks, n]; beyond its row's blocks a column
        has anything."""
        # Other modes write to a copy of `out` first.
        self._ids[: len(out)].take(rows, axis=1, out=out, mode="clip")

    def _grow(self, num_rows: int) -> None:
        num_rows = max(num_rows, 2 * len(self._sources))
        more = num_rows - len(self._sources)
        self._ids = np.pad(self._ids, ((0, 0), (0, more)))
        self._sources += [((), 0)] * more
