"""Top-k, top-p and min-p over logits that are split over the ranks.

Each of them is a least logit that a token must have, so the ranks need to agree on no more than that
number. Tokens as likely as the last one that is kept are all kept.

Which collective comes next follows from gathered numbers by operations that IEEE 754 rounds in one way
only. An exponential is not among them: it may differ by the processor, so the rank that has a logit
takes it, and the result is what is gathered.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shard_worker.floats import from_ordered, to_ordered
from shard_worker.sampling import Sampling
from shard_worker.transfer import to_device
from shard_worker.vocabulary import Vocabulary

# How many of its likeliest tokens a rank shows where a top-p is looked for. A model that knows what to
# say has far fewer in its top-p; other rows are searched digit by digit.
CANDIDATES = 64
_DIGIT_BITS = 8
_BASE = 1 << _DIGIT_BITS
_ALL_BITS = 2**31 - 1  # of an int32 but its sign


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where rows are cut off, on the device, and what of it the host knows.

    top_k (int64, 0: none) and top_p (float64, 1: none), [n, 1], are of `rows`, or of all rows where that
    is None; min_p (0: none) and temperature, float64 [num_rows, 1], of all.
    """

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    temperature: Tensor
    num_candidates: int
    """How many of its likeliest tokens each rank shows; 0 where no row has a top-k or a top-p."""
    has_top_p: bool
    has_both: bool
    """A row may have a top-k and a top-p."""
    has_min_p: bool
    rows: Tensor | None = None

    @classmethod
    def of(
        cls, samplings: Sequence[Sampling], vocab_size: int, device: torch.device
    ) -> "Cuts | None":
        """Those of rows that sample so; None where none is cut."""
        limits = [s.top_k if s.top_k < vocab_size else 0 for s in samplings]
        nucleus = [s.top_p < 1 for s in samplings]
        has_min_p = any(s.min_p > 0 for s in samplings)
        cut = [row for row in range(len(samplings)) if limits[row] or nucleus[row]]
        if not cut and not has_min_p:
            return None

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return to_device(values, device, dtype).unsqueeze(1)

        has_top_p = any(nucleus)
        return cls(
            top_k=column([limits[row] for row in cut], torch.int64),
            top_p=column([samplings[row].top_p for row in cut], torch.float64),
            min_p=column([s.min_p for s in samplings], torch.float64),
            temperature=column([s.temperature for s in samplings], torch.float64),
            num_candidates=max(*limits, CANDIDATES if has_top_p else 0, 0),
            has_top_p=has_top_p,
            has_both=any(limits[row] and nucleus[row] for row in cut),
            has_min_p=has_min_p,
            rows=None if len(cut) == len(samplings) else to_device(cut, device),
        )


class Truncation:
    """Finds the least logit that is kept of each row. All ranks find the same.

    Nothing waits for the device, unless it `looks` which rows a search can be spared: that is free on a
    CPU, and on a GPU it would be to wait for all that is queued. All ranks look, or none does.
    """

    def __init__(self, vocabulary: Vocabulary, *, looks: bool) -> None:
        self.vocabulary = vocabulary
        self.looks = looks

    def __call__(self, logits: Tensor, mass: Tensor, largest: Tensor, cuts: Cuts) -> Tensor:
        """Finite float32 [num_rows, vocabulary of this rank] -> float32 [num_rows, 1]

        `mass` (float64) is each token's probability but for a factor of its row, `largest` [num_rows, 1]
        the logit of each row's likeliest token.
        """
        least = torch.full_like(largest, float("-inf"))
        if cuts.num_candidates and cuts.rows is None:
            least = self._top(logits, mass, cuts)
        elif cuts.num_candidates:
            least[cuts.rows] = self._top(logits[cuts.rows], mass[cuts.rows], cuts)
        if cuts.has_min_p:
            least = torch.maximum(least, _min_p(largest, cuts))
        # Whatever was rounded, the likeliest token stays.
        return torch.minimum(least, largest)

    def _top(self, logits: Tensor, mass: Tensor, cuts: Cuts) -> Tensor:
        """The least logit in the top-k and, of what that leaves, in the top-p; of `cuts.rows`"""
        values, masses, unseen = self._candidates(logits, mass, cuts.num_candidates)
        kth = values.gather(1, (cuts.top_k - 1).clamp_(min=0))
        least = kth.masked_fill_(cuts.top_k == 0, float("-inf"))
        if not cuts.has_top_p:
            return least
        # Probabilities count among what top-k has left.
        left = mass.masked_fill(logits < least, 0) if cuts.has_both else mass
        total = self.vocabulary.gather(left.sum(-1, keepdim=True)).cumsum(-1)[:, -1:]
        wanted = cuts.top_p * total
        # The token that crosses top_p is the last one kept.
        within = masses.mul_(values >= least).cumsum_(-1)
        crossing = torch.searchsorted(within, wanted)
        found = crossing < values.shape[1]
        crossed = values.gather(1, crossing.clamp_(max=values.shape[1] - 1))
        crossed.masked_fill_(~found | (cuts.top_p == 1), float("-inf"))
        least = torch.maximum(least, crossed)
        # A crossing is the true one when no likelier token was kept back.
        sure = (crossed >= unseen) | (cuts.top_p == 1)
        if not self.looks:
            return torch.where(sure, least, self._search(logits, mass, wanted))
        unsure = (~sure).squeeze(1).nonzero().squeeze(1)
        if len(unsure):
            least[unsure] = self._search(logits[unsure], mass[unsure], wanted[unsure])
        return least

    def _candidates(
        self, logits: Tensor, mass: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `count` likeliest tokens of every rank, or all it has, best first: their logits (float32)
        and masses, and [num_rows, 1] a logit such that all likelier tokens are among them."""
        counts = [min(count, size) for size in self.vocabulary.rank_sizes]
        local, columns = logits.topk(counts[self.vocabulary.tp.rank], dim=-1)
        payload = torch.cat((local.double(), mass.gather(1, columns)), dim=-1)
        widths = [2 * n for n in counts]
        pieces = self.vocabulary.gather(payload, widths).split(widths, dim=-1)
        ranks = list(zip(pieces, counts, self.vocabulary.rank_sizes, strict=True))
        unseen = logits.new_full((len(logits), 1), float("-inf"))
        for piece, n, size in ranks:
            if n < size:
                unseen = torch.maximum(unseen, piece[:, n - 1 : n].float())
        values = torch.cat([piece[:, :n] for piece, n, _ in ranks], dim=-1).float()
        masses = torch.cat([piece[:, n:] for piece, n, _ in ranks], dim=-1)
        values, order = values.sort(dim=-1, descending=True, stable=True)
        return values, masses.gather(1, order), unseen

    def _search(self, logits: Tensor, mass: Tensor, wanted: Tensor) -> Tensor:
        """The greatest logit such that tokens of it and more have the wanted mass: [num_rows, 1]

        A radix search: of the logits' bits, in an order in which integers compare as the numbers do, the
        digits are found from the highest on, each from the mass of the tokens by that digit, summed over
        the ranks. It takes as long for a flat distribution as for a peaked one, and decides nothing on
        the host.
        """
        # Turned around, so that the likeliest tokens have the lowest digits.
        bits = to_ordered(logits).bitwise_xor_(_ALL_BITS)
        inside = mass.clone()  # 0 for tokens that don't begin with the digits found so far
        above = torch.zeros_like(wanted)  # mass of the tokens above those
        found = torch.zeros_like(wanted, dtype=torch.int64)
        for shift in range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS):
            digits = (bits >> shift).bitwise_and_(_BASE - 1)
            local = mass.new_zeros((len(mass), _BASE)).scatter_add_(1, digits.long(), inside)
            whole = self.vocabulary.gather_equal(local).cumsum(1)[:, -1]
            reached = torch.cat((above, whole), dim=-1).cumsum_(-1)
            digit = torch.searchsorted(reached[:, 1:].contiguous(), wanted).clamp_(max=_BASE - 1)
            above = reached.gather(1, digit)
            found = (found << _DIGIT_BITS) | digit
            if shift:
                inside.masked_fill_(digits != digit.int(), 0)
        # Where rounding has let no digit reach it the bits may be no number's: then all are kept.
        least = from_ordered((_ALL_BITS - found).int())
        return least.nan_to_num_(nan=torch.finfo(torch.float32).min)


def _min_p(largest: Tensor, cuts: Cuts) -> Tensor:
    """The least logit of a token with p >= min_p · p_max: float32 [num_rows, 1]"""
    # p is proportional to exp(logit / temperature).
    exact = largest.double() + cuts.temperature * cuts.min_p.log()
    # Rounded up, so that no float32 comes between.
    bound = exact.float()
    higher = torch.nextafter(bound, torch.full_like(bound, float("inf")))
    return torch.where(bound < exact, higher, bound)
