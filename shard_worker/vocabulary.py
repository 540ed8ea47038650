"""The token ids as they are split over the ranks, and what the ranks exchange about them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shard_worker.tensor_parallel import Collectives, TensorParallel


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """This rank has the ids [start, stop); `rank_sizes[r]` is how many rank r has."""

    tp: TensorParallel
    rank_sizes: tuple[int, ...]
    start: int
    collectives: Collectives

    @property
    def stop(self) -> int:
        return self.start + self.rank_sizes[self.tp.rank]

    @property
    def size(self) -> int:
        return sum(self.rank_sizes)

    def gather(self, x: Tensor, widths: Sequence[int] | None = None) -> Tensor:
        """[num_rows, widths[rank]] -> [num_rows, sum(widths)]; without `widths` one column a rank."""
        return self.collectives.all_gather(x, widths or (1,) * self.tp.size)

    def gather_equal(self, x: Tensor) -> Tensor:
        """[num_rows, width], of one width on all ranks -> [num_rows, size, width]"""
        whole = self.gather(x, (x.shape[1],) * self.tp.size)
        return whole.unflatten(1, (self.tp.size, x.shape[1]))
