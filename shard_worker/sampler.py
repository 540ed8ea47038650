"""From logits that are split over the ranks to the same token on every rank.

Greedy rows exchange one (value, token id) pair a rank. Rows with a temperature gather their logits and
draw with a counter-based generator (Philox, Salmon et al., 2011) keyed by the request's seed and the
index of the token, so that every rank draws the same, a replay gives the same text, and the rest of
the batch has no part in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shard_worker.sharding import TensorParallel


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence samples; `top_k` 0 is no limit, `temperature` 0 is greedy."""

    temperature: float
    top_k: int
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True)
class Draw:
    """One row to sample: how, and which token of its output this is (from 0)."""

    sampling: Sampling
    index: int


class Sampler:
    """Samples from vocab-parallel logits. `rank_sizes[r]` is how many token ids rank r has."""

    def __init__(self, tp: TensorParallel, rank_sizes: Sequence[int], start: int) -> None:
        self.tp = tp
        self.rank_sizes = tuple(rank_sizes)
        self.start = start

    def __call__(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        """float32 [num_rows, vocabulary of this rank] -> a token id for each row"""
        greedy = [row for row, draw in enumerate(draws) if draw.sampling.temperature == 0]
        random = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
        tokens = [0] * len(draws)
        if greedy:
            rows = logits if len(greedy) == len(draws) else logits[greedy]
            for row, token in zip(greedy, self._greedy(rows), strict=True):
                tokens[row] = token
        if random:
            whole = self.tp.comm.all_gather(logits[random].contiguous(), self.rank_sizes)
            for row, row_logits in zip(random, whole, strict=True):
                tokens[row] = draw_token(row_logits, draws[row])
        return tokens

    def _greedy(self, logits: Tensor) -> list[int]:
        """The likeliest token of each row; of equal ones the lowest id."""
        values, indices = logits.max(dim=-1)
        # Token ids are exact in float32 up to 2**24.
        pairs = torch.stack((values, (indices + self.start).float()), dim=-1)
        ranks = self.tp.comm.all_gather(pairs, (2,) * self.tp.size)  # [num_rows, 2 · size]
        best = ranks[:, 0::2].argmax(dim=-1, keepdim=True)
        return [int(token) for token in ranks[:, 1::2].gather(1, best).squeeze(1).tolist()]


def draw_token(logits: Tensor, draw: Draw) -> int:
    """One token of float32 [vocab_size]: temperature, then top-k, then top-p, then the draw."""
    sampling = draw.sampling
    uniform = np.random.Generator(
        np.random.Philox(key=np.array([sampling.seed, draw.index], dtype=np.uint64))
    ).random()
    # Where float16 overflowed there are infinities; a softmax of them would be NaN everywhere.
    finite = logits.nan_to_num(nan=torch.finfo(logits.dtype).min)
    scaled = finite.double() / sampling.temperature
    token_ids = None
    if 0 < sampling.top_k < scaled.numel():
        scaled, token_ids = scaled.topk(sampling.top_k)
    if sampling.top_p < 1:
        scaled, order = scaled.sort(descending=True, stable=True)
        token_ids = order if token_ids is None else token_ids[order]
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
    if sampling.top_p < 1:
        # The token that crosses top_p is the last one kept.
        kept = int(torch.searchsorted(cumulative, sampling.top_p)) + 1
        cumulative = cumulative[:kept]
    position = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    position = min(position, cumulative.numel() - 1)
    return position if token_ids is None else int(token_ids[position])
