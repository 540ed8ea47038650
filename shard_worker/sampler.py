"""From logits that are split over the ranks to the same token on every rank.

No rank ever sees the logits of the whole vocabulary. Greedy rows exchange one (value, token id) pair a
rank. A row with a temperature is drawn by inverting its distribution in the order of token ids: the
ranks exchange their shares of the probability, which tells whose token it is, and that rank finds it
among its own.

The draw is a counter-based generator's (Philox, Salmon et al., 2011), keyed by the request's seed and
the index of the token, so that every rank draws the same, a replay gives the same text, and the rest of
the batch has no part in it.

On a GPU all of this is only queued; penalties and log-probabilities alone wait for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shard_worker import philox
from shard_worker.adjustments import Adjustment, adjust
from shard_worker.logprobs import Logprobs
from shard_worker.sampling import Sampling
from shard_worker.tensor_parallel import TensorParallel
from shard_worker.transfer import to_device
from shard_worker.truncation import Cuts, Truncation
from shard_worker.vocabulary import Vocabulary

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Draw:
    """One row to sample: how, which token of its output this is (from 0), and what changes before."""

    sampling: Sampling
    index: int
    adjustment: Adjustment | None = None


class Sampler:
    """Samples from vocab-parallel logits. `rank_sizes[r]` is how many token ids rank r has."""

    def __init__(
        self,
        tp: TensorParallel,
        rank_sizes: Sequence[int],
        start: int,
        device: torch.device = _CPU,
    ) -> None:
        self.tp = tp
        self.rank_sizes = tuple(rank_sizes)
        self.device = device
        self.vocabulary = Vocabulary(tp, self.rank_sizes, start, tp.collectives("sampler"))
        self.truncation = Truncation(self.vocabulary, looks=device.type == "cpu")
        self.logprobs = Logprobs(self.vocabulary)

    def adjustment(
        self, sampling: Sampling, token_ids: Sequence[int], num_prompt_tokens: int
    ) -> Adjustment | None:
        """What changes this rank's logits of a sequence with these tokens, for `Draw`; None: nothing.

        It counts tokens: every sampled one is to be appended to it.
        """
        ids = self.vocabulary
        return Adjustment.of(
            sampling, ids.start, ids.stop, token_ids, num_prompt_tokens, self.device
        )

    def __call__(self, logits: Tensor, draws: Sequence[Draw]) -> Tensor:
        """float32 [num_rows, vocabulary of this rank], which is written to -> token ids [num_rows]"""
        adjusted = [
            (row, draw.index, draw.adjustment)
            for row, draw in enumerate(draws)
            if draw.adjustment is not None
        ]
        if adjusted:
            adjust(logits, adjusted)
        random = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
        if not random:
            return self.greedy(logits)
        if len(random) == len(draws):
            return self.drawn(logits, self._columns(draws))
        greedy = [row for row, draw in enumerate(draws) if draw.sampling.temperature == 0]
        tokens = torch.empty(len(draws), dtype=torch.int64, device=logits.device)
        rows = to_device(greedy, logits.device)
        tokens[rows] = self.greedy(logits[rows])
        rows = to_device(random, logits.device)
        tokens[rows] = self.drawn(logits[rows], self._columns([draws[row] for row in random]))
        return tokens

    def greedy(self, logits: Tensor) -> Tensor:
        """The likeliest token of each row; of equal ones the lowest id: int64 [num_rows]"""
        values, indices = logits.max(dim=-1)
        # Token ids are exact in float32 up to 2**24.
        pairs = torch.stack((values, (indices + self.vocabulary.start).float()), dim=-1)
        ranks = self.vocabulary.gather(pairs, (2,) * self.tp.size)  # [num_rows, 2 · size]
        best = ranks[:, 0::2].argmax(dim=-1, keepdim=True)
        return ranks[:, 1::2].gather(1, best).squeeze(1).long()

    def drawn(self, logits: Tensor, columns: "Columns") -> Tensor:
        """A token of each row by its temperature, top-k, top-p and min-p: int64 [num_rows]. Writes to
        the logits, float32 [num_rows, vocabulary of this rank]."""
        gather = self.vocabulary.gather
        # Where float16 overflowed there are infinities; their differences would be NaN.
        logits.nan_to_num_(nan=torch.finfo(logits.dtype).min)
        largest = gather(logits.amax(-1, keepdim=True)).amax(-1, keepdim=True)
        # In float64 hardly a token is unlikely enough to be denormal, of which exp is many times slower.
        mass = logits.double().sub_(largest).mul_(columns.inverse_temperature).exp_()
        if columns.cuts is not None:
            least = self.truncation(logits, mass, largest, columns.cuts)
            mass.masked_fill_(logits < least, 0)
        cumulative = mass.cumsum_(-1)
        bounds = gather(cumulative[:, -1:]).cumsum(-1)  # [num_rows, size]
        target = columns.uniform * bounds[:, -1:]
        owner = _invert(bounds, target)
        before = bounds.gather(1, (owner - 1).clamp_(min=0)).mul_(owner > 0)
        token = self.vocabulary.start + _invert(cumulative, target - before)
        # A rank that does not own a row has searched in vain.
        token.masked_fill_(owner != self.tp.rank, -1)
        return gather(token).amax(-1)

    def _columns(self, draws: Sequence[Draw]) -> "Columns":
        samplings = [draw.sampling for draw in draws]
        return Columns(
            _column([1 / sampling.temperature for sampling in samplings], self.device),
            _column(uniforms(draws), self.device),
            Cuts.of(samplings, self.vocabulary.size, self.device),
        )


@dataclass(frozen=True, slots=True)
class Columns:
    """How rows are drawn, as the device has it: float64 [num_rows, 1] each."""

    inverse_temperature: Tensor
    uniform: Tensor
    """In [0, 1): which part of the row's distribution it is."""
    cuts: Cuts | None


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return to_device(values, device, torch.float64).unsqueeze(1)


def uniforms(draws: Sequence[Draw]) -> list[float]:
    """Of each row a number in [0, 1) that the seed and the index of the token decide."""
    return philox.uniforms([(draw.sampling.seed, draw.index) for draw in draws])


def _invert(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first column whose cumulative mass exceeds the target, int64 [num_rows, 1]

    Of a target that rounding has pushed to the end or beyond, the last column that has mass.
    """
    found = torch.searchsorted(cumulative, target, right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(found, last)
