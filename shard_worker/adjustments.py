"""What changes logits before they are sampled from: penalties, bias, and stops that come too early.

Each rank adjusts the token ids of its own range, so nothing is exchanged. What is touched is few
columns of a row (the tokens that a text has, the ids that a request names), so rows are adjusted by
column and not as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shard_worker.sampling import Sampling


class Seen:
    """The tokens of a sequence in this rank's range, once each, and how often the output has them.

    columns: int64 [num_seen], counted from the range's start. counts: float32 [num_seen], 0 for a token
    that only the prompt has.
    """

    def __init__(
        self,
        start: int,
        stop: int,
        prompt: Iterable[int],
        output: Iterable[int],
        device: torch.device,
    ) -> None:
        self._start, self._stop = start, stop
        counts = {token - start: 0 for token in prompt if start <= token < stop}
        for token in output:
            if start <= token < stop:
                counts[token - start] = counts.get(token - start, 0) + 1
        self._places = {column: place for place, column in enumerate(counts)}
        self.columns = torch.tensor(list(counts), dtype=torch.int64, device=device)
        self.counts = torch.tensor(list(counts.values()), dtype=torch.float32, device=device)

    def append(self, token: int) -> None:
        """The output has grown by one token."""
        if not self._start <= token < self._stop:
            return
        column = token - self._start
        place = self._places.setdefault(column, len(self._places))
        if place < len(self.counts):
            self.counts[place] += 1
        else:
            self.columns = torch.cat((self.columns, self.columns.new_tensor([column])))
            self.counts = torch.cat((self.counts, self.counts.new_ones(1)))


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What changes one sequence's logits in this rank's range."""

    sampling: Sampling
    seen: Seen | None
    """Where the sequence has penalties."""
    bias_columns: Tensor  # int64 [num_biased]
    bias: Tensor  # float32 [num_biased]
    stop_columns: Tensor  # int64 [num_stops]

    @classmethod
    def of(
        cls,
        sampling: Sampling,
        start: int,
        stop: int,
        token_ids: Sequence[int],
        num_prompt: int,
        device: torch.device,
    ) -> Adjustment | None:
        """For a rank with the token ids [start, stop); None when its logits stay as they are.

        `token_ids` are the prompt, `num_prompt` long, and what was generated after it.
        """
        penalises = (
            sampling.repetition_penalty != 1
            or sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
        )
        bias = {t - start: value for t, value in sampling.logit_bias.items() if start <= t < stop}
        stops = {t - start for t in sampling.stop_token_ids if start <= t < stop}
        if not sampling.min_tokens:
            stops = set()
        if not penalises and not bias and not stops:
            return None
        return cls(
            sampling,
            Seen(start, stop, token_ids[:num_prompt], token_ids[num_prompt:], device)
            if penalises
            else None,
            torch.tensor(list(bias), dtype=torch.int64, device=device),
            torch.tensor(list(bias.values()), dtype=torch.float32, device=device),
            torch.tensor(sorted(stops), dtype=torch.int64, device=device),
        )

    def append(self, token: int) -> None:
        """The sequence's output has grown by one token."""
        if self.seen is not None:
            self.seen.append(token)


def adjust(logits: Tensor, rows: Sequence[tuple[int, int, Adjustment]]) -> None:
    """Adjusts float32 logits [num_rows, vocabulary of this rank] IN PLACE.

    `rows` are (row, tokens that the sequence's output has, its adjustment).
    """
    if penalised := [(row, a.seen, a.sampling) for row, _, a in rows if a.seen is not None]:
        _penalise(logits, penalised)
    if biased := [(row, a) for row, _, a in rows if len(a.bias)]:
        index = _index([(row, a.bias_columns) for row, a in biased])
        logits[index] += torch.cat([a.bias for _, a in biased])
    stops = [
        (row, a.stop_columns)
        for row, num_output, a in rows
        if num_output < a.sampling.min_tokens and len(a.stop_columns)
    ]
    if stops:
        logits[_index(stops)] = float("-inf")


def _penalise(logits: Tensor, rows: Sequence[tuple[int, Seen, Sampling]]) -> None:
    places = [(row, seen.columns) for row, seen, _ in rows]
    index = _index(places)
    counts = torch.cat([seen.counts for _, seen, _ in rows])
    repetition, presence, frequency = _spread(
        logits.new_tensor(
            [(s.repetition_penalty, s.presence_penalty, s.frequency_penalty) for *_, s in rows]
        ),
        places,
    ).unbind(1)
    values = logits[index]
    # Keskar et al. (CTRL, 2019), as in transformers: towards less likely on either side of zero.
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= presence * (counts > 0) + frequency * counts
    logits[index] = values


def _index(places: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Columns of several rows as an index into them all."""
    columns = torch.cat([columns for _, columns in places])
    return _spread(columns.new_tensor([row for row, _ in places]), places), columns


def _spread(x: Tensor, places: Sequence[tuple[int, Tensor]]) -> Tensor:
    """[num_rows, ...] -> [num_columns, ...]: each row's entry for each of its columns"""
    return x.repeat_interleave(
        torch.tensor([len(columns) for _, columns in places], device=x.device), dim=0
    )
