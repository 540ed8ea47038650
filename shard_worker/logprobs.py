"""Log-probabilities of tokens from logits that are split over the ranks.

Two exchanges whatever the vocabulary: what each rank knows of its part (its largest logit, the sum of
exponentials, the token's logit where it has it, its likeliest tokens), then how many of its tokens are
likelier than the one in question.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shard_worker.floats import from_ordered, to_ordered
from shard_worker.vocabulary import Vocabulary

# Numbers that a rank tells of a row beside its likeliest tokens.
_STATS = 3
_LOW_BITS = 2**32 - 1
# Rows that a rank looks at together: what 64-bit numbers they take is then still in a cache.
_ROWS = 8


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's natural log-probability, its rank (1 is the likeliest) and the likeliest tokens."""

    token_id: int
    logprob: float
    rank: int
    top_token_ids: Sequence[int]
    top_logprobs: Sequence[float]


class Logprobs:
    """Of the model's own distribution, before anything that changes how it is sampled from."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(
        self, logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
    ) -> list[TokenLogprobs]:
        """float32 [num_rows, vocabulary of this rank], left alone -> a token's numbers for each row

        `num_top[i]` of the likeliest tokens are named for row i, equal ones by ascending id. Every rank
        takes part; rank 0 alone gets the answer, the others an empty list.
        """
        # Numbers that overflowed stay comparable, as when they are sampled from. Minus zero becomes
        # zero, which has the other's order but not its bits.
        x = logits.nan_to_num(nan=torch.finfo(logits.dtype).min).add_(0.0)
        widest = max(num_top)
        tokens = torch.tensor(token_ids, device=x.device).unsqueeze(1)
        known = torch.cat(
            [
                torch.cat((self._stats(*rows).view(torch.int64), self._top(rows[0], widest)), -1)
                for rows in zip(x.split(_ROWS), tokens.split(_ROWS), strict=True)
            ]
        )
        widths = [_STATS + min(widest, size) for size in self.vocabulary.rank_sizes]
        pieces = self.vocabulary.gather(known, widths).split(widths, dim=-1)
        stats = torch.stack([piece[:, :_STATS] for piece in pieces], dim=-1).view(torch.float64)
        largest, total, chosen = stats.unbind(1)  # [num_rows, size] each
        chosen = chosen.amax(-1, keepdim=True)
        # In float32 exactly, which it was.
        likelier = (x > chosen.float()).sum(-1, keepdim=True)
        ranks = 1 + self.vocabulary.gather(likelier).sum(-1)
        if self.vocabulary.tp.rank != 0:
            return []
        peak = largest.amax(-1, keepdim=True)
        log_total = peak + (total * (largest - peak).exp()).sum(-1, keepdim=True).log()
        keys = torch.cat([piece[:, _STATS:] for piece in pieces], dim=-1)
        keys = keys.sort(dim=-1, descending=True).values[:, :widest]
        top_ids = (_LOW_BITS - (keys & _LOW_BITS)).tolist()
        top = _logprob(_value(keys), log_total).tolist()
        logprobs = _logprob(chosen, log_total).squeeze(1).tolist()
        return [
            TokenLogprobs(token, logprob, rank, row_ids[:count], row_top[:count])
            for token, logprob, rank, row_ids, row_top, count in zip(
                token_ids, logprobs, ranks.tolist(), top_ids, top, num_top, strict=True
            )
        ]

    def _stats(self, x: Tensor, tokens: Tensor) -> Tensor:
        """-> float64 [num_rows, 3]: the largest logit, the sum of exponentials relative to it, and the
        token's logit, -inf where another rank has it"""
        largest = x.amax(-1, keepdim=True).double()
        total = (x.double() - largest).exp_().sum(-1, keepdim=True)
        column = tokens - self.vocabulary.start
        inside = column.clamp(0, x.shape[1] - 1)
        chosen = x.gather(1, inside).double().masked_fill_(column != inside, float("-inf"))
        return torch.cat((largest, total, chosen), dim=-1)

    def _top(self, x: Tensor, count: int) -> Tensor:
        """The likeliest tokens of this rank as keys: int64 [num_rows, count or fewer]

        A key is the logit as an integer above the complement of the token id: the largest keys are the
        largest logits, of equal ones the lowest ids, and an id of any size is exact.
        """
        if count == 0:
            return x.new_empty((x.shape[0], 0), dtype=torch.int64)
        ids = torch.arange(self.vocabulary.start, self.vocabulary.stop, device=x.device)
        keys = to_ordered(x).long().bitwise_left_shift_(32).bitwise_or_(_LOW_BITS - ids)
        return keys.topk(min(count, x.shape[1]), dim=-1).values


def _value(keys: Tensor) -> Tensor:
    """The logits of keys, as float64."""
    return from_ordered((keys >> 32).int()).double()


def _logprob(logits: Tensor, log_total: Tensor) -> Tensor:
    """float32, and never infinite: a text format may have no word for that."""
    limits = torch.finfo(torch.float32)
    return (logits - log_total).clamp_(min=limits.min).float()
