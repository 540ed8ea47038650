"""Every rank draws the same token, from the right distribution, whatever else is in the batch.

What is right is said by transformers' own processors, in float64 on the logits of the whole vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from colrow.errors import InvalidArgument
from shard_worker import truncation
from shard_worker.logprobs import TokenLogprobs
from shard_worker.sampler import Draw, Sampler
from shard_worker.sampling import Sampling
from shard_worker.tensor_parallel import TensorParallel
from tests.unit.thread_ranks import run_ranks

INF = float("inf")
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)


@dataclass(frozen=True)
class Row:
    """One row to sample: the next token of a text."""

    sampling: Sampling
    index: int = 0
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()

    @property
    def place(self) -> int:
        """Which token of the output this is; texts may be left out where they play no part."""
        return len(self.output) or self.index

    def draw(self, sampler: Sampler) -> Draw:
        text = (*self.prompt, *self.output)
        adjustment = sampler.adjustment(self.sampling, text, len(self.prompt))
        return Draw(self.sampling, self.place, adjustment)


def sample(
    logits: Tensor, rows: Sequence[Row], sizes: Sequence[int] = (), looks: bool = True
) -> list[int]:
    """What the ranks, with `sizes` token ids each, sample; they must all sample the same.

    Those that don't look at intermediate results do as on a GPU.
    """
    sizes = tuple(sizes) or (logits.shape[1],)
    assert sum(sizes) == logits.shape[1]

    def one(tp: TensorParallel) -> list[int]:
        start = sum(sizes[: tp.rank])
        sampler = Sampler(tp, sizes, start)
        sampler.truncation.looks = looks
        piece = logits[:, start : start + sizes[tp.rank]].clone()
        return sampler(piece, [row.draw(sampler) for row in rows]).tolist()

    first, *others = run_ranks(len(sizes), one)
    assert all(tokens == first for tokens in others), "the ranks disagree"
    return first


def sampling(temperature: float = 1.0, **fields: Any) -> Sampling:
    return replace(GREEDY, temperature=temperature, **fields)


def random_logits(rows: int, vocab_size: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def splits(vocab_size: int) -> st.SearchStrategy[list[int]]:
    """How many token ids each of one to four ranks has."""
    return st.sets(st.integers(1, vocab_size - 1), max_size=3).map(
        lambda cuts: [b - a for a, b in itertools.pairwise([0, *sorted(cuts), vocab_size])]
    )


# What transformers says


def adjusted(logits: Tensor, row: Row) -> Tensor:
    """float32 [vocab_size] after penalties, bias and the stops that come too early."""
    s = row.sampling
    scores = logits.clone().unsqueeze(0)
    text = torch.tensor([[*row.prompt, *row.output]], dtype=torch.int64)
    if s.repetition_penalty != 1 and text.numel():
        scores = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(text, scores)
    scores = scores[0]
    counts = torch.bincount(torch.tensor(row.output, dtype=torch.int64), minlength=len(scores))
    scores = scores - s.presence_penalty * (counts > 0) - s.frequency_penalty * counts
    for token, bias in s.logit_bias.items():
        scores[token] += bias
    if row.place < s.min_tokens:
        scores[list(s.stop_token_ids)] = -INF
    return scores


def warped(scores: Tensor, s: Sampling) -> Tensor:
    """float64 [vocab_size] after temperature, top-k, top-p and min-p, -inf where they cut."""
    ids: Any = None
    result = scores.double().unsqueeze(0) / s.temperature
    if s.top_k:
        result = TopKLogitsWarper(s.top_k)(ids, result)
    if s.top_p < 1:
        result = TopPLogitsWarper(s.top_p)(ids, result)
    if s.min_p > 0:
        result = MinPLogitsWarper(s.min_p)(ids, result)
    return result[0]


def expected_token(logits: Tensor, row: Row) -> int:
    """The distribution of transformers, inverted at the number that seed and index give."""
    s = row.sampling
    scores = adjusted(logits, row)
    if s.temperature == 0:
        return int(scores.argmax())
    cumulative = warped(scores, s).softmax(-1).cumsum(-1).numpy()
    key = np.array([s.seed, row.place], dtype=np.uint64)
    uniform = np.random.Generator(np.random.Philox(key=key)).random()
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


VOCAB = 37
TOKENS = st.integers(0, VOCAB - 1)

SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.integers(0, 40),
    top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.3, 5.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.5, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.5, 1.1]),
    logit_bias=st.dictionaries(TOKENS, st.floats(-100, 100, width=32), max_size=3),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(TOKENS, max_size=3).map(tuple),
)
ROWS = st.builds(
    Row,
    SETTINGS,
    index=st.just(0),
    prompt=st.lists(TOKENS, min_size=1, max_size=12).map(tuple),
    output=st.lists(TOKENS, max_size=8).map(tuple),
)


@given(
    rows=st.lists(ROWS, min_size=1, max_size=5),
    sizes=splits(VOCAB),
    seed=st.integers(0, 2**32),
    candidates=st.sampled_from([1, 3, 64]),
    looks=st.booleans(),
)
@settings(max_examples=250, deadline=None)
def test_tokens_are_those_of_transformers_however_the_vocabulary_is_split(
    rows: list[Row], sizes: list[int], seed: int, candidates: int, looks: bool
) -> None:
    """Also when a rank shows so few tokens that a top-p has to be searched for."""
    logits = random_logits(len(rows), VOCAB, seed)
    expected = [
        expected_token(row_logits, row) for row_logits, row in zip(logits, rows, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "CANDIDATES", candidates)
        assert sample(logits, rows, sizes, looks) == expected


@given(rows=st.lists(ROWS, min_size=2, max_size=6), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_row_samples_the_same_alone_and_in_any_batch(
    rows: list[Row], data: st.DataObject
) -> None:
    logits = random_logits(len(rows), VOCAB)
    alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    order = data.draw(st.permutations(range(len(rows))))
    together = sample(logits[list(order)], [rows[i] for i in order], (11, 26))
    assert together == [alone[i] for i in order]


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("sizes", [(3000,), (1500, 1500), (1, 2000, 999)])
@pytest.mark.parametrize("looks", [True, False])
def test_top_p_of_flat_and_of_peaked_distributions(
    looks: bool, scale: float, top_p: float, sizes: Sequence[int]
) -> None:
    """From one token to thousands; all that are as likely as the last one are kept."""
    logits = random_logits(6, 3000, scale=scale)
    rows = [Row(sampling(0.7 + 0.1 * i, top_p=top_p, seed=i)) for i in range(6)]
    if scale == 0:
        rows_without = [replace(row, sampling=replace(row.sampling, top_p=1.0)) for row in rows]
        assert sample(logits, rows, sizes, looks) == sample(logits, rows_without)
    else:
        expected = [expected_token(x, row) for x, row in zip(logits, rows, strict=True)]
        assert sample(logits, rows, sizes, looks) == expected


# Greedy


@pytest.mark.parametrize("sizes", [(10,), (5, 5), (1, 9), (4, 3, 3)])
@pytest.mark.parametrize(
    ("best", "expected"),
    [([7], 7), ([0], 0), ([9], 9), ([2, 3], 2), ([3, 8], 3), ([4, 5], 4), (range(10), 0)],
)
def test_greedy_takes_the_likeliest_and_of_equals_the_lowest_id(
    sizes: Sequence[int], best: Sequence[int], expected: int
) -> None:
    logits = torch.full((1, 10), -1.0)
    logits[0, list(best)] = 2.5
    assert sample(logits, [Row(GREEDY)], sizes) == [expected]


def test_greedy_ids_of_a_large_vocabulary_are_exact() -> None:
    vocab_size = 300_000
    for token in (vocab_size - 1, 2**18 + 1, 123_457):
        logits = torch.zeros(1, vocab_size)
        logits[0, token] = 1e-6
        assert sample(logits, [Row(GREEDY)], (100_001, 199_999)) == [token]


@pytest.mark.parametrize("sizes", [(6,), (2, 4), (1, 1, 4)])
def test_greedy_with_infinite_logits(sizes: Sequence[int]) -> None:
    rows = [
        [-INF, -INF, -INF, -5.0, -INF, -INF],
        [3e38, 1.0, INF, 3e38, 0.0, INF],
        [-INF] * 6,
    ]
    assert sample(torch.tensor(rows), [Row(GREEDY)] * 3, sizes) == [3, 2, 0]


def test_greedy_rows_alone_make_one_exchange() -> None:
    def exchanges(tp: TensorParallel) -> tuple[int, int]:
        Sampler(tp, (5, 5), 5 * tp.rank)(torch.zeros(3, 5), [Draw(GREEDY, 0)] * 3)
        (stats,) = tp.all_stats()
        return stats.calls, stats.payload_bytes

    assert run_ranks(2, exchanges) == [(1, 3 * 2 * 4)] * 2


# Draws


def test_a_draw_depends_on_seed_and_index_alone() -> None:
    def drawn(rows: Sequence[Row]) -> list[int]:
        return sample(torch.zeros(len(rows), 1000), rows, (400, 600))

    rows = [Row(sampling(seed=seed), index) for seed in range(8) for index in range(8)]
    tokens = drawn(rows)
    assert tokens == drawn(rows), "a replay gives the same"
    # Of 64 draws among 1000 tokens about two fall on one that was drawn before.
    assert len(set(tokens)) > 55
    assert tokens != drawn([Row(sampling(seed=r.index), r.sampling.seed) for r in rows])


def test_the_seeds_range_is_64_bits() -> None:
    rows = [Row(sampling(seed=seed)) for seed in (0, 1, 2**32, 2**63, 2**64 - 1)]
    assert len(set(sample(torch.zeros(5, 100_000), rows))) == 5


NUM_DRAWS = 4000
# Beyond this, the statistic of up to 7 degrees of freedom is seen once in a million times; and the
# seeds are fixed, so that a test that passes goes on passing.
CHI_SQUARE_BOUND = 41.0


def probabilities(logits: Tensor, row: Row) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = (
        warped(adjusted(logits, row), row.sampling).softmax(-1).numpy()
    )
    return result


@pytest.mark.parametrize(
    "settings",
    [
        sampling(),
        sampling(0.5),
        sampling(3.0),
        sampling(top_k=3),
        sampling(top_k=1),
        sampling(top_p=0.7),
        sampling(min_p=0.2),
        sampling(1.5, top_k=5, top_p=0.8, min_p=0.1),
        sampling(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25),
        sampling(logit_bias={4: -100.0, 7: 3.0}),
        sampling(stop_token_ids=(4, 1), min_tokens=NUM_DRAWS),
    ],
    ids=str,
)
@pytest.mark.parametrize("varied", ["seed", "index"])
def test_draws_follow_the_distribution(settings: Sampling, varied: str) -> None:
    """Over many requests, and over the tokens of one request."""
    logits = torch.tensor([0.0, 1.5, -0.5, 1.0, 2.0, -1.0, 0.5, -2.0])
    text = Row(settings, prompt=(4, 1, 1), output=(4, 6, 6, 5))
    expected = probabilities(logits, text) * NUM_DRAWS
    sampler = Sampler(run_ranks(1, lambda tp: tp)[0], (8,), 0)
    adjustment = text.draw(sampler).adjustment
    draws = [
        Draw(replace(settings, seed=n if varied == "seed" else 11), 3 if varied == "seed" else n)
        for n in range(NUM_DRAWS)
    ]
    draws = [replace(draw, adjustment=adjustment) for draw in draws]
    tokens = sampler(logits.repeat(NUM_DRAWS, 1), draws)
    counts = np.bincount(tokens, minlength=len(logits))
    assert not counts[expected == 0].any(), "a token that was cut"
    possible = expected > 0
    deviation = (counts[possible] - expected[possible]) ** 2 / expected[possible]
    assert deviation.sum() < CHI_SQUARE_BOUND, f"{counts} for {expected}"


@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.2, 1.0, 5.0]),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_draws_never_leave_what_is_kept(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(1, 50, seed)
    row = Row(sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed))
    possible = np.flatnonzero(probabilities(logits[0], row))
    rows = [replace(row, index=index) for index in range(20)]
    assert set(sample(logits.repeat(20, 1), rows, (20, 30))) <= set(possible.tolist())


def drawn_of(logits: Tensor, settings: Sampling, count: int = 60) -> set[int]:
    """The tokens that many seeds draw, with the vocabulary on two ranks."""
    rows = [Row(replace(settings, seed=seed)) for seed in range(count)]
    half = logits.shape[-1] // 2
    return set(sample(logits.repeat(count, 1), rows, (half, logits.shape[-1] - half)))


def test_top_p_keeps_the_token_that_crosses_it_and_always_one() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    for top_p, possible in (
        (0.01, {0}),
        (0.49, {0}),
        (0.51, {0, 1}),
        (0.79, {0, 1}),
        (0.9, {0, 1, 2}),
    ):
        assert drawn_of(logits, sampling(top_p=top_p)) == possible, top_p


@pytest.mark.parametrize("candidates", [1, 64])
def test_a_top_p_that_rounding_keeps_out_of_reach_keeps_all(
    candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truncation, "CANDIDATES", candidates)
    logits = random_logits(200, 50, scale=0.1)
    for top_p in (1 - 2**-53, 1 - 2**-50, 1 - 2**-24):
        rows = [Row(sampling(top_p=top_p, seed=seed)) for seed in range(200)]
        rows_without = [replace(row, sampling=replace(row.sampling, top_p=1.0)) for row in rows]
        assert sample(logits, rows, (20, 30)) == sample(logits, rows_without)


def test_tokens_as_likely_as_the_last_one_kept_are_all_kept() -> None:
    logits = torch.tensor([1.0, 3.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    assert drawn_of(logits, sampling(2.0, top_k=2), 200) == {0, 1, 3, 5}
    assert drawn_of(logits, sampling(2.0, top_k=4), 200) == {0, 1, 3, 5}
    assert drawn_of(logits, sampling(2.0, top_p=0.5), 200) == {0, 1, 3, 5}
    assert drawn_of(logits, sampling(1.0, min_p=math.exp(-2) * 0.999), 200) == {0, 1, 3, 5}
    assert drawn_of(logits, sampling(1.0, min_p=1.0)) == {1}
    assert drawn_of(logits, sampling(2.0, top_k=2, top_p=0.999), 200) == {0, 1, 3, 5}


@pytest.mark.parametrize("candidates", [1, 2, 64])
def test_a_rank_that_holds_most_of_the_likely_tokens_keeps_none_back(
    candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank's best token would complete the top-p too, but is less likely than theirs."""
    monkeypatch.setattr(truncation, "CANDIDATES", candidates)
    logits = torch.tensor([3.0, 2.9, 2.8, 2.0, -9.0, -9.0])
    assert drawn_of(logits, sampling(top_p=0.5)) == {0, 1}
    assert drawn_of(logits, sampling(top_p=0.7), 120) == {0, 1, 2}
    assert drawn_of(logits, sampling(top_p=0.9), 120) == {0, 1, 2, 3}
    assert drawn_of(logits.flip(0), sampling(top_p=0.5)) == {5, 4}


# Limits


@pytest.mark.parametrize("temperature", [1e-2, 1e-6, 1e-30, 1e-45])
@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.5}], ids=str)
def test_a_temperature_near_zero_is_greedy(temperature: float, cut: dict[str, Any]) -> None:
    logits = random_logits(40, 100)
    near = [Row(sampling(temperature, seed=row, **cut), row) for row in range(40)]
    assert sample(logits, near, (30, 70)) == sample(logits, [Row(GREEDY)] * 40)


def test_a_high_temperature_is_near_uniform() -> None:
    logits = torch.tensor([10.0, 0.0, -10.0, 5.0])
    rows = [Row(sampling(100.0, seed=seed)) for seed in range(400)]
    tokens = sample(logits.repeat(400, 1), rows, (1, 3))
    assert min(tokens.count(token) for token in range(4)) > 70


CUTS: list[dict[str, Any]] = [
    {},
    {"top_k": 3},
    {"top_p": 0.9},
    {"top_k": 3, "top_p": 0.9},
    {"min_p": 0.1},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_logit_of_minus_infinity_is_never_drawn(cut: dict[str, Any]) -> None:
    logits = torch.full((20,), -INF)
    logits[[4, 11]] = torch.tensor([0.0, 0.5])
    assert drawn_of(logits, sampling(**cut)) == {4, 11}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 100.0])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_logit_of_infinity_is_always_drawn(temperature: float, cut: dict[str, Any]) -> None:
    logits = torch.tensor([0.0, INF, 3e38, -INF, -3e38, 7.0, 1e30, 0.0])
    assert drawn_of(logits, sampling(temperature, **cut)) == {1}


@pytest.mark.parametrize("scale", [1e30, 3e38])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_very_large_logits_draw_the_largest(scale: float, cut: dict[str, Any]) -> None:
    assert drawn_of(torch.tensor([-1.0, 0.5, 1.0, 0.999]) * scale, sampling(**cut)) == {2}


@pytest.mark.parametrize("value", [-INF, INF, float("nan"), 0.0])
@pytest.mark.parametrize("candidates", [1, 64])
def test_logits_that_say_nothing_still_give_a_token(
    value: float, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that overflowed must not take the ranks down, or apart."""
    monkeypatch.setattr(truncation, "CANDIDATES", candidates)
    rows = [Row(sampling(seed=seed, top_p=0.9, repetition_penalty=1.2)) for seed in range(20)]
    tokens = sample(torch.full((20, 12), value), rows, (5, 7))
    assert all(0 <= token < 12 for token in tokens)
    assert sample(torch.full((1, 12), value), [Row(GREEDY)], (5, 7)) == [0]


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 2), (1 - 2**-53, 5), (1.0, 5)])
@pytest.mark.parametrize("sizes", [(8,), (4, 4), (2, 1, 5), (6, 2)])
def test_a_draw_at_the_edge_is_a_token_that_is_possible(
    uniform: float, token: int, sizes: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 is never drawn, but is what rounding may make of a draw beside it."""
    monkeypatch.setattr("shard_worker.sampler.uniforms", lambda draws: [uniform])
    logits = torch.full((1, 8), -INF)
    logits[0, 2:6] = torch.tensor([0.1, 0.2, 0.3, -30.0])
    assert sample(logits, [Row(sampling())], sizes) == [token]


def test_one_rank_may_hold_all_that_is_kept() -> None:
    logits = torch.zeros(1, 12)
    logits[0, 8:] = 50.0
    for cut in (*CUTS, {"top_k": 11}):
        assert drawn_of(logits, sampling(**cut), 100) == {8, 9, 10, 11}


# Penalties


@given(
    prompt=st.lists(TOKENS, min_size=1, max_size=10),
    output=st.lists(TOKENS, min_size=1, max_size=10),
    sizes=splits(VOCAB),
)
@settings(max_examples=50, deadline=None)
def test_counting_token_by_token_is_counting_at_once(
    prompt: list[int], output: list[int], sizes: list[int]
) -> None:
    """A sequence that goes on and one that was preempted and came back sample the same."""
    settings = sampling(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.9, seed=5)
    logits = random_logits(1, VOCAB)

    def one(tp: TensorParallel) -> tuple[list[int], list[int]]:
        sampler = Sampler(tp, sizes, sum(sizes[: tp.rank]))
        piece = logits.split(sizes, dim=1)[tp.rank]
        grown = sampler.adjustment(settings, prompt, len(prompt))
        assert grown is not None
        for token in output:
            grown.append(token)
        anew = sampler.adjustment(settings, prompt + output, len(prompt))
        first, second = (
            sampler(piece.clone(), [Draw(settings, len(output), adjustment)]).tolist()
            for adjustment in (grown, anew)
        )
        return first, second

    expected = [expected_token(logits[0], Row(settings, 0, tuple(prompt), tuple(output)))]
    assert run_ranks(len(sizes), one) == [(expected, expected)] * len(sizes)


def test_what_changes_nothing_is_no_adjustment() -> None:
    sampler = Sampler(run_ranks(1, lambda tp: tp)[0], (10,), 0)
    for plain in (GREEDY, sampling(top_k=3), replace(GREEDY, stop_token_ids=(3,))):
        assert sampler.adjustment(plain, [1, 2], 1) is None


def test_stops_are_allowed_once_there_are_min_tokens() -> None:
    settings = replace(GREEDY, min_tokens=3, stop_token_ids=(7, 2))
    logits = torch.zeros(1, 10)
    logits[0, [7, 2, 5]] = torch.tensor([9.0, 8.0, 1.0])
    tokens = [sample(logits, [Row(settings, index)], (4, 6))[0] for index in range(5)]
    assert tokens == [5, 5, 5, 7, 7]


# Log-probabilities


def logprobs(
    logits: Tensor, tokens: Sequence[int], num_top: Sequence[int], sizes: Sequence[int] = ()
) -> list[TokenLogprobs]:
    sizes = tuple(sizes) or (logits.shape[1],)

    def one(tp: TensorParallel) -> list[TokenLogprobs]:
        piece = logits.split(sizes, dim=1)[tp.rank].contiguous()
        before = piece.clone()
        answer = Sampler(tp, sizes, sum(sizes[: tp.rank])).logprobs(piece, tokens, num_top)
        assert torch.equal(piece, before) or piece.isnan().any(), "logits are left alone"
        return answer

    answer, *others = run_ranks(len(sizes), one)
    assert all(other == [] for other in others), "rank 0 alone answers"
    return answer


@given(
    seed=st.integers(0, 2**32),
    sizes=splits(VOCAB),
    chosen=st.lists(st.tuples(TOKENS, st.integers(0, VOCAB)), min_size=1, max_size=5),
    coarse=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_logprobs_are_those_of_log_softmax(
    seed: int, sizes: list[int], chosen: list[tuple[int, int]], coarse: bool
) -> None:
    logits = random_logits(len(chosen), VOCAB, seed)
    if coarse:  # so that many are equal, among them zero and minus zero
        logits = logits.round()
    expected = logits.double().log_softmax(-1)
    tokens, counts = [token for token, _ in chosen], [count for _, count in chosen]
    answers = logprobs(logits, tokens, counts, sizes)
    for row, (answer, token, count) in enumerate(zip(answers, tokens, counts, strict=True)):
        assert answer.token_id == token
        assert answer.logprob == pytest.approx(float(expected[row, token]), abs=1e-6)
        assert answer.rank == 1 + int((logits[row] > logits[row, token]).sum())
        order = sorted(range(VOCAB), key=lambda id: (-float(logits[row, id]), id))[:count]
        assert list(answer.top_token_ids) == order
        assert list(answer.top_logprobs) == pytest.approx(expected[row, order].tolist(), abs=1e-6)
        if token in order:
            assert answer.logprob == answer.top_logprobs[order.index(token)], "the same bits"


def test_logprobs_do_not_depend_on_the_split() -> None:
    logits = random_logits(4, 1000)
    whole = logprobs(logits, [0, 5, 999, 400], [20, 0, 5, 1000])
    for sizes in ((500, 500), (1, 998, 1), (300, 300, 400)):
        split = logprobs(logits, [0, 5, 999, 400], [20, 0, 5, 1000], sizes)
        for a, b in zip(split, whole, strict=True):
            assert (a.token_id, a.rank, a.top_token_ids) == (b.token_id, b.rank, b.top_token_ids)
            assert a.top_logprobs == pytest.approx(b.top_logprobs, abs=1e-6)


def test_logprobs_of_logits_that_overflowed_are_numbers() -> None:
    rows = [[INF, 0.0, -INF], [-INF] * 3, [INF] * 3, [float("nan"), 1.0, 0.0], [3e38, -3e38, 0.0]]
    for answer in logprobs(torch.tensor(rows), [2, 0, 0, 0, 1], [3] * 5, (1, 2)):
        assert all(map(math.isfinite, (answer.logprob, *answer.top_logprobs)))


def test_ids_beyond_what_float32_holds_are_exact() -> None:
    start = 2**24 + 1
    sampler = Sampler(run_ranks(1, lambda tp: tp)[0], (8,), start)
    (answer,) = sampler.logprobs(torch.arange(8.0).unsqueeze(0), [start + 6], [3])
    assert answer.top_token_ids == [start + 7, start + 6, start + 5]
    assert (answer.rank, answer.logprob) == (2, answer.top_logprobs[1])


# What is refused


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("temperature", -0.1, "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("temperature", INF, "temperature"),
        ("top_p", 0.0, "top_p"),
        ("top_p", 1.01, "top_p"),
        ("top_p", float("nan"), "top_p"),
        ("min_p", -0.1, "min_p"),
        ("min_p", 1.5, "min_p"),
        ("repetition_penalty", 0.0, "repetition_penalty"),
        ("repetition_penalty", -1.0, "repetition_penalty"),
        ("repetition_penalty", float("nan"), "repetition_penalty"),
        ("presence_penalty", INF, "presence_penalty"),
        ("frequency_penalty", float("nan"), "frequency_penalty"),
        ("logit_bias", {3: float("nan")}, "logit_bias[3]"),
        ("logit_bias", {100: 1.0}, "logit_bias"),
        ("stop_token_ids", (5, 100), "stop_token_ids"),
        ("logprobs", 101, "logprobs"),
        ("prompt_logprobs", 101, "prompt_logprobs"),
    ],
)
def test_what_no_token_can_be_sampled_with_is_refused_by_name(
    field: str, value: Any, named: str
) -> None:
    good = sampling(
        logit_bias={99: 1.0}, stop_token_ids=(0, 99), logprobs=100, prompt_logprobs=0, min_p=1.0
    )
    good.check("sampling", 100)
    with pytest.raises(InvalidArgument) as caught:
        replace(good, **{field: value}).check("sampling", 100)
    assert caught.value.metadata["field"] == f"sampling.{named}"
