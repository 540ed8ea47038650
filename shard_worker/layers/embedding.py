"""The vocabulary at both ends of a model, split over the ranks by token id."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shard_worker.layers.linear import Weight
from shard_worker.sharding import ShardTensors


class VocabParallelEmbedding:
    """Rows [start, stop) of the embedding; other ranks' tokens look up zero and the ranks sum."""

    def __init__(self, tensors: ShardTensors, module: str) -> None:
        self.tp = tensors.tp
        self.weight = tensors.take(f"{module}.weight")
        self.start, self.stop = tensors.layout.ranges["vocab"]
        self._collectives = tensors.tp.collectives(module)

    def partial(self, token_ids: Tensor) -> Tensor:
        """[num_tokens] -> [num_tokens, hidden], zero where another rank has the token"""
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.start
        mine = (local >= 0) & (local < self.stop - self.start)
        rows = F.embedding(torch.where(mine, local, 0), self.weight)
        return rows.masked_fill_(~mine.unsqueeze(-1), 0)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[num_tokens] -> [num_tokens, hidden], equal on all ranks"""
        return self._collectives.all_reduce(self.partial(token_ids))


class Embedding:
    """A whole embedding on every rank: positions, which are few."""

    def __init__(self, tensors: ShardTensors, module: str) -> None:
        self.weight = tensors.take(f"{module}.weight")

    def __call__(self, ids: Tensor) -> Tensor:
        """[num_tokens] -> [num_tokens, hidden]"""
        return F.embedding(ids, self.weight)


class VocabParallelLMHead:
    """Logits of this rank's token ids. The sampler exchanges as much of them as it needs."""

    def __init__(
        self, tensors: ShardTensors, module: str, tied_to: VocabParallelEmbedding | None = None
    ) -> None:
        self.tp = tensors.tp
        self.weight = Weight(
            tensors, tied_to.weight if tied_to else tensors.take(f"{module}.weight")
        )
        self.start, self.stop = tensors.layout.ranges["vocab"]
        self.rank_sizes = tuple(
            stop - start for start, stop in (ranges["vocab"] for ranges in tensors.layout.ranks)
        )

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[num_rows, hidden] -> float32 [num_rows, vocabulary of this rank], which is `out` if given"""
        logits = self.weight.multiply(x)
        return logits.float() if out is None else out.copy_(logits)
