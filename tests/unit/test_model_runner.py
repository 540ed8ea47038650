"""Steps on one shard: whatever the chunks, blocks and ranks, a sequence's numbers are its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colrow.errors import InvalidArgument
from colrow.v1 import shard_worker_service_pb2
from shard_worker import convert
from shard_worker.communicator import Link
from shard_worker.executor import Description, State
from shard_worker.forward_batch import ForwardBatch
from shard_worker.joining import Group
from shard_worker.kv_cache import KvCache
from shard_worker.layers.attention import Attention
from shard_worker.logprobs import TokenLogprobs
from shard_worker.model_runner import (
    Chunk,
    ModelRunner,
    NewSequence,
    SequenceLogprobs,
    Step,
    StepResult,
)
from shard_worker.sampler import Draw, Sampler
from shard_worker.sampling import Sampling
from shard_worker.tensor_parallel import OpStats, TensorParallel, TimedCollective
from tests.unit.thread_ranks import run_ranks

VOCAB = 61
HIDDEN = 16
BLOCK_SIZE = 4
NUM_BLOCKS = 160
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)
SPLITS = [(61,), (30, 31), (1, 20, 40)]


class ToyHead:
    """Logits of some of the token ids."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class ToyModel:
    """One attention layer over the paged cache, the same whole weights on all ranks but for the head.

    What it says of a token depends on all tokens before it and on where they stand.
    """

    num_layers, num_kv_heads, head_dim = 1, 1, HIDDEN
    max_positions = 700

    def __init__(self, start: int, stop: int) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.tokens, self.positions = normal(VOCAB, HIDDEN), normal(700, HIDDEN)
        self.q, self.k, self.v = normal(3, HIDDEN, HIDDEN) / HIDDEN**0.5
        self.lm_head = ToyHead(normal(VOCAB, HIDDEN)[start:stop])
        self.attention = Attention(layer=0, num_q_heads=1, num_kv_heads=1, head_dim=HIDDEN)
        self.num_tokens: list[int] = []

    def __call__(self, batch: ForwardBatch) -> Tensor:
        self.num_tokens.append(len(batch.token_ids))
        x = self.tokens[batch.token_ids] + self.positions[batch.positions]
        heads = torch.stack([x @ weight for weight in (self.q, self.k, self.v)], dim=1)
        return x + 2 * self.attention(heads, batch)


class RecordingSampler(Sampler):
    """Keeps this rank's logits, before anything changes them."""

    def __call__(self, logits: Tensor, draws: Sequence[Draw]) -> Tensor:
        self.seen = logits.clone()
        return super().__call__(logits, draws)


@dataclass
class Worker:
    """A runner and the blocks that a coordinator would count."""

    runner: Any
    model: ToyModel
    sampler: RecordingSampler
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[SequenceLogprobs]] = field(default_factory=dict)
    blocks: dict[int, list[int]] = field(default_factory=dict)
    computed: dict[int, int] = field(default_factory=dict)
    step_id: int = 0
    next_block: int = 0

    @classmethod
    def start(cls, tp: TensorParallel, sizes: Sequence[int]) -> Worker:
        start = sum(sizes[: tp.rank])
        model = ToyModel(start, start + sizes[tp.rank])
        sampler = RecordingSampler(tp, sizes, start)
        cache = KvCache.allocate(
            num_layers=1,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_kv_heads=1,
            head_dim=HIDDEN,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        runner: Any = ModelRunner(model, sampler, cache, VOCAB)  # type: ignore[arg-type]
        return cls(runner, model, sampler)

    def step(
        self,
        sizes: dict[int, int],
        new: Sequence[NewSequence] = (),
        finished: Sequence[int] = (),
        timed: bool = False,
    ) -> StepResult:
        """Runs so many tokens of each sequence, in blocks that it gives them by turns."""
        self.step_id += 1
        for sequence in new:
            self.blocks[sequence.sequence_id] = list(sequence.cached_block_ids)
            self.computed[sequence.sequence_id] = len(sequence.cached_block_ids) * BLOCK_SIZE
        chunks = []
        for id, num_tokens in sizes.items():
            self.computed[id] += num_tokens
            missing = -(-self.computed[id] // BLOCK_SIZE) - len(self.blocks[id])
            fresh = list(range(self.next_block, self.next_block + missing))
            self.next_block += missing
            self.blocks[id] += fresh
            chunks.append(Chunk(id, num_tokens, fresh))
        step = Step(self.step_id, finished, new, chunks, times_collectives=timed)
        result: StepResult = self.runner.launch(step).result()
        for id, token in zip(result.sequence_ids, result.token_ids, strict=True):
            self.tokens.setdefault(id, []).append(token)
        for entry in result.logprobs:
            self.logprobs.setdefault(entry.sequence_id, []).append(entry)
        return result

    def generate(self, new: NewSequence, count: int, chunk: int = 1000) -> list[int]:
        """One sequence alone, its prompt in chunks, until it has sampled so many tokens."""
        id = new.sequence_id
        left = len(new.token_ids) - len(new.cached_block_ids) * BLOCK_SIZE
        admit = [new]
        while left:
            size = min(chunk, left)
            self.step({id: size}, admit)
            left, admit = left - size, []
        for _ in range(count - 1):
            self.step({id: 1})
        return self.tokens[id]


def alone() -> Worker:
    return run_ranks(1, lambda tp: Worker.start(tp, (VOCAB,)))[0]


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def new(
    id: int, tokens: Sequence[int], sampling: Sampling = GREEDY, num_prompt: int = 0, **fields: Any
) -> NewSequence:
    return NewSequence(id, tokens, num_prompt or len(tokens), sampling, **fields)


def logits_of(text: Sequence[int]) -> Tensor:
    """float32 [length, vocab_size] of a whole text, without a cache."""
    model = ToyModel(0, VOCAB)
    ids, positions = torch.tensor(text), torch.arange(len(text))
    return model.lm_head(model(ForwardBatch(ids, positions, positions)))


SAMPLED = Sampling(
    temperature=1.3,
    top_k=20,
    top_p=0.95,
    seed=3,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={5: 2.0, 60: -3.0},
    min_tokens=4,
    stop_token_ids=(7, 8, 9),
    logprobs=3,
    prompt_logprobs=2,
)


# Chunks, batches and ranks


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk", [1, 3, 4, 7])
def test_a_prompt_in_chunks_samples_what_it_samples_whole(sampling: Sampling, chunk: int) -> None:
    whole = alone().generate(new(1, prompt(19), sampling), 8)
    assert alone().generate(new(1, prompt(19), sampling), 8, chunk) == whole


def test_a_sequence_in_a_batch_samples_what_it_samples_alone() -> None:
    worker = alone()
    sequences = [new(id, prompt(5 + 3 * id, id), s) for id, s in enumerate((GREEDY, SAMPLED) * 2)]
    worker.step({0: 5, 2: 4}, sequences)
    worker.step({0: 1, 2: 7, 1: 8})
    worker.step({3: 14, 0: 1, 1: 1, 2: 1})
    worker.step({3: 1, 0: 1, 1: 1, 2: 1})
    for sequence in sequences:
        id = sequence.sequence_id
        assert worker.tokens[id] == alone().generate(sequence, len(worker.tokens[id]))
    assert [len(worker.tokens[id]) for id in range(4)] == [4, 3, 3, 2]


def test_results_stand_in_the_order_of_the_chunks() -> None:
    worker = alone()
    worker.step({1: 3, 2: 5}, [new(1, prompt(3)), new(2, prompt(5))])
    # In the batch, 3 and 4 that prefill stand before 2 and 1.
    result = worker.step({2: 1, 3: 4, 1: 1, 4: 2}, [new(3, prompt(4)), new(4, prompt(3))])
    assert result.sequence_ids == [2, 3, 1]


@pytest.mark.parametrize("sizes", SPLITS[1:])
def test_all_ranks_sample_what_one_does_and_rank_0_has_the_logprobs(sizes: Sequence[int]) -> None:
    def run(tp: TensorParallel, sizes: Sequence[int]) -> Worker:
        worker = Worker.start(tp, sizes)
        worker.step({1: 6, 2: 4}, [new(1, prompt(6), SAMPLED), new(2, prompt(9), SAMPLED)])
        worker.step({1: 1, 2: 5})
        for _ in range(6):
            worker.step({1: 1, 2: 1})
        return worker

    (single,) = run_ranks(1, lambda tp: run(tp, (VOCAB,)))
    first, *others = run_ranks(len(sizes), lambda tp: run(tp, sizes))
    assert first.tokens == single.tokens
    assert all(other.tokens == first.tokens and not other.logprobs for other in others)
    for id in (1, 2):
        for mine, theirs in zip(first.logprobs[id], single.logprobs[id], strict=True):
            assert mine.start == theirs.start
            for a, b in zip(mine.tokens, theirs.tokens, strict=True):
                assert_same(a, b)


def assert_same(a: TokenLogprobs, b: TokenLogprobs) -> None:
    assert (a.token_id, a.rank, list(a.top_token_ids)) == (
        b.token_id,
        b.rank,
        list(b.top_token_ids),
    )
    assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
    assert list(a.top_logprobs) == pytest.approx(list(b.top_logprobs), abs=1e-5)


def test_a_preempted_sequence_goes_on_as_if_nothing_had_been() -> None:
    """Penalties, min_tokens and the draws' numbers take up where the output was."""
    text = prompt(9)
    expected = alone().generate(new(1, text, SAMPLED), 12)
    for kept in (1, 3, 8):
        worker = alone()
        output = worker.generate(new(1, text, SAMPLED), kept)
        again = new(1, text + output, SAMPLED, num_prompt=9)
        worker.step({1: 9 + kept}, [again], finished=[1])
        for _ in range(11 - kept):
            worker.step({1: 1})
        assert worker.tokens[1] == expected


# Cached blocks


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("length", "cached"), [(5, 1), (8, 1), (9, 2), (23, 5), (23, 2)])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_sequence_on_cached_blocks_computes_the_rest_alone(
    sampling: Sampling, length: int, cached: int, chunk: int
) -> None:
    worker, text = alone(), prompt(length)
    expected = worker.generate(new(1, text, sampling), 1)
    logits = worker.sampler.seen
    shared = worker.blocks[1][:cached]
    worker.model.num_tokens.clear()
    again = new(2, text, sampling, cached_block_ids=shared)
    assert worker.generate(again, 1, chunk) == expected
    assert sum(worker.model.num_tokens) == length - cached * BLOCK_SIZE
    torch.testing.assert_close(worker.sampler.seen, logits, rtol=1e-5, atol=1e-5)
    for _ in range(6):  # both go on, on blocks that they share and blocks of their own
        worker.step({1: 1, 2: 1})
    assert worker.tokens[1] == worker.tokens[2]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([0, 1], "of 8 tokens at least one is to be computed"),
        ([0, 1, 2], "of 8 tokens at least one is to be computed"),
        ([NUM_BLOCKS], f"the cache has {NUM_BLOCKS} blocks"),
        ([-1], f"the cache has {NUM_BLOCKS} blocks"),
    ],
)
def test_cached_blocks_that_do_not_fit_are_refused(blocks: list[int], message: str) -> None:
    worker = alone()
    with pytest.raises(InvalidArgument, match=message) as caught:
        worker.step({}, [new(7, prompt(8), cached_block_ids=blocks)])
    assert caught.value.metadata["field"] == "new_sequences[7].cached_block_ids"


def test_chunks_are_checked_from_the_cached_tokens_on() -> None:
    runner = alone().runner
    cached = new(1, prompt(8), cached_block_ids=[3])
    with pytest.raises(InvalidArgument, match="4 tokens are left to compute"):
        runner.launch(Step(1, (), [cached], [Chunk(1, 5, [4])]))
    with pytest.raises(InvalidArgument, match="8 tokens need more blocks"):
        runner.launch(Step(1, (), [cached], [Chunk(1, 4, [])]))
    # Refused steps have left nothing behind.
    result = runner.launch(Step(1, (), [cached], [Chunk(1, 4, [4])])).result()
    assert result.sequence_ids == [1]


# What a step is refused for


@pytest.mark.parametrize(
    ("news", "chunks", "field"),
    [
        ([new(1, prompt(3))], [], "new_sequences[1]"),
        ([new(3, prompt(3)), new(3, prompt(3))], [], "new_sequences[3]"),
        ([NewSequence(3, [1, 2], 3, GREEDY)], [], "new_sequences[3].num_prompt_tokens"),
        ([NewSequence(3, [1, 2], 0, GREEDY)], [], "new_sequences[3].num_prompt_tokens"),
        ([new(3, [1, VOCAB])], [], "new_sequences[3].token_ids"),
        ([new(3, [1, -1, 2])], [], "new_sequences[3].token_ids"),
        (
            [new(3, [1], replace(GREEDY, repetition_penalty=0.0))],
            [],
            "new_sequences[3].sampling.repetition_penalty",
        ),
        ([], [Chunk(2, 1, [])], "chunks[2]"),
        ([], [Chunk(1, 1, []), Chunk(1, 1, [])], "chunks[1]"),
        ([], [Chunk(1, 2, [])], "chunks[1].num_tokens"),
        ([], [Chunk(1, 0, [])], "chunks[1].num_tokens"),
        ([], [Chunk(1, 1, [NUM_BLOCKS])], "chunks[1].new_block_ids"),
    ],
)
def test_a_step_that_does_not_fit_changes_nothing(
    news: list[NewSequence], chunks: list[Chunk], field: str
) -> None:
    worker = alone()
    worker.step({1: 5}, [new(1, prompt(5))])
    with pytest.raises(InvalidArgument) as caught:
        worker.runner.launch(Step(2, (), news, chunks))
    assert caught.value.metadata["field"] == field
    worker.step({1: 1})
    assert worker.tokens[1] == alone().generate(new(1, prompt(5)), 2)


def test_a_sequence_longer_than_the_models_positions_is_refused() -> None:
    runner = alone().runner
    longer = ToyModel.max_positions + 1
    blocks = [0] * longer  # one may stand in a table more than once, so the cache sets no limit
    with pytest.raises(InvalidArgument, match="the model has 700 positions"):
        runner.launch(Step(1, (), [new(1, prompt(longer))], [Chunk(1, longer, blocks)]))


# Log-probabilities


def expected_logprobs(text: Sequence[int]) -> Tensor:
    return logits_of(text).double().log_softmax(-1)


@given(
    length=st.integers(1, 40),
    chunks=st.lists(st.integers(1, 12), min_size=1, max_size=40),
    count=st.integers(0, 5),
    split=st.sampled_from(SPLITS),
)
@settings(max_examples=60, deadline=None)
def test_prompt_logprobs_are_those_of_the_whole_prompt_in_chunks_of_any_size(
    length: int, chunks: list[int], count: int, split: Sequence[int]
) -> None:
    text = prompt(length, length)
    asked = new(1, text, replace(GREEDY, prompt_logprobs=count))

    def run(tp: TensorParallel) -> Worker:
        worker, left, admit = Worker.start(tp, split), length, [asked]
        for chunk in [*chunks, 1000]:
            if left:
                worker.step({1: min(chunk, left)}, admit)
                left, admit = left - min(chunk, left), []
        worker.step({1: 1})  # beyond the prompt there is nothing to tell
        return worker

    entries = run_ranks(len(split), run)[0].logprobs.get(1, [])
    expected = expected_logprobs(text)
    position = 1
    for entry in entries:
        assert entry.start == position
        for answer in entry.tokens:
            row = expected[position - 1]
            assert answer.token_id == text[position]
            assert answer.logprob == pytest.approx(float(row[text[position]]), abs=1e-4)
            assert list(answer.top_logprobs) == pytest.approx(row.topk(count)[0].tolist(), abs=1e-4)
            position += 1
    assert position == length


def test_prompt_logprobs_of_a_long_prompt_come_in_pieces_of_the_head() -> None:
    """So that logits of all its tokens are never in memory at once."""
    worker, text = alone(), prompt(600)
    rows: list[int] = []
    head = worker.model.lm_head

    def counting(x: Tensor) -> Tensor:
        rows.append(len(x))
        return head(x)

    worker.model.lm_head = counting  # type: ignore[assignment]
    worker.generate(new(1, text, replace(GREEDY, prompt_logprobs=0)), 1)
    assert max(rows) <= 128 and sum(rows) == 600
    (entry,) = worker.logprobs[1]
    expected = expected_logprobs(text)[torch.arange(599), torch.tensor(text[1:])]
    assert [t.logprob for t in entry.tokens] == pytest.approx(expected.tolist(), abs=1e-4)
    assert all(t.top_token_ids == [] for t in entry.tokens)


def test_sampled_tokens_logprobs_are_the_models_own_whatever_changes_the_sampling() -> None:
    worker, text = alone(), prompt(6)
    tokens = worker.generate(new(1, text, replace(SAMPLED, prompt_logprobs=None)), 5)
    whole = text + tokens
    expected = expected_logprobs(whole)
    for number, entry in enumerate(worker.logprobs[1]):
        assert entry.start == 6 + number
        (answer,) = entry.tokens
        row = expected[entry.start - 1]
        assert answer.token_id == whole[entry.start]
        assert answer.logprob == pytest.approx(float(row[answer.token_id]), abs=1e-4)
        assert answer.rank == 1 + int((row > row[answer.token_id]).sum())
        assert list(answer.top_token_ids) == row.topk(3)[1].tolist()
    assert len(worker.logprobs[1]) == 5


def test_a_step_tells_prompt_and_sampled_logprobs_of_those_who_asked() -> None:
    worker = alone()
    both = replace(GREEDY, logprobs=1, prompt_logprobs=0)
    result = worker.step(
        {1: 5, 2: 4, 3: 3},
        [new(1, prompt(5)), new(2, prompt(4), both), new(3, prompt(7), both)],
    )
    places = [(entry.sequence_id, entry.start, len(entry.tokens)) for entry in result.logprobs]
    assert places == [(2, 1, 3), (3, 1, 3), (2, 4, 1)]
    assert worker.step({1: 1}).logprobs == []


def test_after_a_preemption_the_output_is_no_prompt() -> None:
    worker = alone()
    asked = replace(GREEDY, logprobs=0, prompt_logprobs=0)
    again = new(1, prompt(9), asked, num_prompt=4)
    places = [(e.start, len(e.tokens)) for e in worker.step({1: 9}, [again]).logprobs]
    assert places == [(1, 3), (9, 1)]


# The wire

_pb = shard_worker_service_pb2


def test_a_step_is_read_from_its_message() -> None:
    message = _pb.ExecuteStepsRequest(
        step_id=4,
        finished_sequence_ids=[9],
        new_sequences=[
            _pb.NewSequence(
                sequence_id=1,
                token_ids=[1, 2, 3],
                num_prompt_tokens=2,
                cached_block_ids=[5],
                sampling=_pb.StepSampling(
                    temperature=0.5,
                    top_k=3,
                    top_p=0.25,
                    seed=2**64 - 1,
                    min_p=0.125,
                    repetition_penalty=1.5,
                    presence_penalty=-0.5,
                    frequency_penalty=0.75,
                    logit_bias={4: -2.0},
                    min_tokens=6,
                    stop_token_ids=[2, 3],
                    logprobs=0,
                ),
            )
        ],
        chunks=[_pb.ScheduledChunk(sequence_id=1, num_tokens=2, new_block_ids=[7, 8])],
    )
    assert convert.step(message) == Step(
        4,
        (9,),
        (
            NewSequence(
                1,
                (1, 2, 3),
                2,
                Sampling(0.5, 3, 0.25, 2**64 - 1, 0.125, 1.5, -0.5, 0.75, {4: -2.0}, 6, (2, 3), 0),
                (5,),
            ),
        ),
        (Chunk(1, 2, (7, 8)),),
    )


def test_sampling_that_nobody_resolved_is_refused() -> None:
    """What a message does not say is zero, and zero is no repetition penalty and no top-p."""
    message = _pb.NewSequence(sequence_id=1, token_ids=[1], num_prompt_tokens=1)
    step = convert.step(_pb.ExecuteStepsRequest(step_id=1, new_sequences=[message]))
    with pytest.raises(InvalidArgument, match=r"sampling\.top_p = 0"):
        alone().runner.launch(step)


def test_logprobs_arrive_as_they_were() -> None:
    worker = alone()
    result = worker.step({1: 4}, [new(1, prompt(4), replace(GREEDY, logprobs=2))])
    message = convert.step_response(7, result)
    assert (message.epoch, message.step_id) == (7, 1)
    ((entry,), (told,)) = message.logprobs, result.logprobs
    assert (entry.sequence_id, entry.start) == (1, 4)
    (token,), (own,) = entry.tokens, told.tokens
    assert (token.token_id, token.rank) == (own.token_id, own.rank) == (result.token_ids[0], 1)
    assert token.logprob == own.logprob == token.top_logprobs[0]
    assert list(token.top_token_ids) == list(own.top_token_ids)
    assert list(token.top_logprobs) == list(own.top_logprobs)


@pytest.mark.parametrize("sizes", SPLITS)
def test_a_step_that_is_timed_gives_the_same_tokens_and_says_how_long_collectives_took(
    sizes: Sequence[int],
) -> None:
    sequences = [new(1, prompt(9)), new(2, prompt(5, 1), SAMPLED)]

    def generate(tp: TensorParallel, timed: bool) -> list[StepResult]:
        worker = Worker.start(tp, sizes)
        results = [worker.step({1: 9, 2: 5}, sequences, timed=timed)]
        results += [worker.step({1: 1, 2: 1}, timed=timed and step % 2 == 0) for step in range(6)]
        return results

    plain = run_ranks(len(sizes), lambda tp: generate(tp, False))
    timed = run_ranks(len(sizes), lambda tp: generate(tp, True))
    for without, results in zip(plain, timed, strict=True):
        assert [r.token_ids for r in results] == [r.token_ids for r in without]
        assert [r.logprobs for r in results] == [r.logprobs for r in without]
        assert not any(r.collectives for r in without)
        for result, is_timed in zip(results, (True, *(True, False) * 3), strict=True):
            assert bool(result.collectives) == (is_timed and len(sizes) > 1)
            took_ns = sum(call.duration_ns for call in result.collectives)
            assert all(call.duration_ns > 0 for call in result.collectives)
            assert took_ns <= (result.duration_us + 1) * 1000
    # The same calls in the same order on every rank.
    for by_rank in zip(*timed, strict=True):
        calls = [[(c.stats.operation, c.stats.path) for c in r.collectives] for r in by_rank]
        assert calls == [calls[0]] * len(sizes)


def test_the_times_of_a_step_are_told_in_order() -> None:
    asked = shard_worker_service_pb2.ExecuteStepsRequest(step_id=3, times_collectives=True)
    assert convert.step(asked).times_collectives
    layer = OpStats("model.layers.3", "all_reduce", "shm")
    sampler = OpStats("sampler", "all_gather", "aside")
    calls = [TimedCollective(layer, 64, 1500), TimedCollective(sampler, 8, 700)]
    told = convert.step_response(1, StepResult(3, (), (), 5, collectives=calls)).collectives
    assert [(c.module, c.operation, c.path, c.payload_bytes, c.duration_ns) for c in told] == [
        ("model.layers.3", "all_reduce", "shm", 64, 1500),
        ("sampler", "all_gather", "aside", 8, 700),
    ]


def test_communication_is_told_by_operation_and_module() -> None:
    worker = Description(
        host_id="host",
        pid=os.getpid(),
        device="cpu",
        memory_total=1,
        memory_available=1,
        state=State.READY,
        epoch=1,
        group=Group(1, 0, 2, "shm"),
        weight_bytes=0,
        kv_cache_bytes=0,
        resident_bytes=0,
        file_bytes_read=0,
        communication=[
            OpStats("model.layers.3", "all_reduce", "shm", 2, 64, 1, 32, 1_999),
            OpStats("sampler", "all_gather", "shm"),
        ],
        links=[Link(1, "nccl", "it can't be opened")],
    )
    (link,) = convert.description(worker).links
    assert (link.rank, link.path, link.note) == (1, "nccl", "it can't be opened")
    told = [
        (s.module, s.operation, s.path, s.calls, s.payload_bytes)
        for s in convert.description(worker).communication
    ]
    assert told == [
        ("model.layers.3", "all_reduce", "shm", 2, 64),
        ("sampler", "all_gather", "shm", 0, 0),
    ]
    layer = convert.description(worker).communication[0]
    assert (layer.timed_calls, layer.timed_bytes, layer.timed_us) == (1, 32, 1)
