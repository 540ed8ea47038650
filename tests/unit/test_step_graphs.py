"""Steps as CUDA graphs give what operations launched one by one give, to the bit, cache and all.

The graphs are recorded on the CPU (`recorded_graphs`), so all that the host says to them is as on a GPU.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from colrow.memory import MemoryUse
from coordinator.cost_model import H200_NVLINK
from shard_worker.communicator.single import SingleCommunicator
from shard_worker.draw_graphs import MAX_DRAWS
from shard_worker.forward_batch import ForwardBatch, PackedSpan
from shard_worker.graph_capture import GraphCapture
from shard_worker.kv_cache import KvCache
from shard_worker.memory_meter import MemoryMeter
from shard_worker.model_runner import Chunk, ModelRunner, NewSequence, Step, StepResult
from shard_worker.sampler import Sampler
from shard_worker.sampling import Sampling
from shard_worker.staging import Staging
from shard_worker.step_graphs import GRAPH_SIZES, GraphChunk, StepGraphs
from shard_worker.tensor_parallel import TensorParallel
from shard_worker.truncation import Truncation
from tests.unit.recorded_graphs import RecordingCuda
from tests.unit.test_memory_ledger import Allocator

VOCAB = 61
BLOCK_SIZE = 4
NUM_BLOCKS = 600
MAX_BLOCKS = 12
GREEDY = Sampling(temperature=0, top_k=0, top_p=1, seed=0)
CPU = torch.device("cpu")

# A model whose numbers are integers, so that no order of adding changes them. What it says of a token is
# a hash of that token and of all before it, with where they stand.
_PRIME = 2**31 - 1


@torch.library.custom_op("colrow_test::packed_rows", mutates_args=())
def packed_rows(tiles: Tensor, sequences: Tensor, num_tokens: int) -> Tensor:
    """Of each token the sequence, or -1 where no tile has it, and how many tokens it sees: [2, n]"""
    rows = torch.full((2, num_tokens), -1, dtype=torch.int64)
    for sequence, first in tiles.t().tolist():
        if sequence >= 0:
            at, count, context = sequences[:3, sequence].tolist()
            for token in range(first, min(first + PackedSpan.TILE, count)):
                assert rows[0, at + token] == -1, "a token is computed once"
                rows[0, at + token], rows[1, at + token] = sequence, context - count + token + 1
    return rows


@torch.library.custom_op("colrow_test::attend", mutates_args=("cache",))
def attend(x: Tensor, cache: Tensor, slots: Tensor, rows: Tensor, tables: Tensor) -> Tensor:
    """Stores x [n] at its slots; the sum of what each token sees, by its sequence's table: [n]"""
    flat, size = cache.view(-1), cache.shape[1]
    for slot, value in zip(slots.tolist(), x, strict=True):
        if slot >= 0:
            flat[slot] = value
    out = torch.full_like(x, -1)  # of a token in no tile it is undefined
    for token, (row, context) in enumerate(rows.t().tolist()):
        if row >= 0:
            blocks = tables[row, : -(-context // size)].long()
            out[token] = cache[blocks].flatten()[:context].sum()
    return out


class HashHead:
    rank_sizes, start = (VOCAB,), 0

    def __init__(self, tp: TensorParallel) -> None:
        self.collectives = tp.collectives("lm_head")
        generator = torch.Generator().manual_seed(5)
        self.factors = torch.randint(1, _PRIME, (VOCAB,), generator=generator)

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        logits = ((hidden.unsqueeze(1) % 10007) * self.factors % 10009).float() / 1000
        logits = logits if out is None else out.copy_(logits)
        return self.collectives.all_reduce(logits)


class HashModel:
    num_layers, num_kv_heads, head_dim = 1, 1, 1
    max_positions = 4096

    def __init__(self, tp: TensorParallel) -> None:
        self.lm_head = HashHead(tp)
        self.num_tokens: list[int] = []

    def __call__(self, batch: ForwardBatch) -> Tensor:
        self.num_tokens.append(len(batch.token_ids))
        assert batch.kv_cache is not None
        x = ((batch.token_ids + 7) * 48271 + (batch.positions + 1) * 69621) * 16807 % _PRIME
        attended = torch.empty_like(x)
        cache = batch.kv_cache.layers[0].keys.view(-1, batch.kv_cache.block_size)
        if batch.packed is not None:
            packed = batch.packed
            rows = packed_rows(packed.tiles, packed.sequences, len(x))
            attended = attend(x, cache, batch.slot_mapping, rows, packed.block_ids)
        for span in batch.prefills:
            tokens = slice(span.start, span.stop)
            seen = torch.arange(span.num_computed + 1, span.context_len + 1)
            rows = torch.stack((torch.zeros_like(seen), seen))
            attended[tokens] = attend(
                x[tokens], cache, batch.slot_mapping[tokens], rows, span.block_ids[None]
            )
        if batch.decode is not None:
            tokens = slice(batch.decode.start, None)
            lens = batch.decode.context_lens.long()
            rows = torch.stack((torch.arange(len(lens)), lens))
            attended[tokens] = attend(
                x[tokens], cache, batch.slot_mapping[tokens], rows, batch.decode.block_ids
            )
        return (x + 3 * attended) % _PRIME


def started(
    max_blocks: int | None, meter: MemoryMeter, block_size: int = BLOCK_SIZE
) -> tuple[ModelRunner, HashModel]:
    tp = TensorParallel(0, 1, SingleCommunicator())
    model: Any = HashModel(tp)
    cache = KvCache.allocate(
        num_layers=1,
        num_blocks=NUM_BLOCKS,
        block_size=block_size,
        num_kv_heads=1,
        head_dim=1,
        dtype=torch.int64,
        device=CPU,
    )
    cache.layers[0].keys.fill_(10**12)  # what nobody has written shows where it is read
    sampler = Sampler(tp, (VOCAB,), 0)
    sampler.truncation = Truncation(sampler.vocabulary, looks=False)  # as on a GPU
    runner = ModelRunner(model, sampler, cache, VOCAB, max_blocks=max_blocks, meter=meter)
    return runner, model


class Pair:
    """The same steps by graphs and without. AssertionError where a token, a log-probability or the cache
    differs."""

    def __init__(self, cuda: RecordingCuda, seed: int = 0, block_size: int = BLOCK_SIZE) -> None:
        self.cuda, self.size = cuda, block_size
        meter = MemoryMeter(torch.device("cuda:0"))
        self.by_graphs, self.model = started(MAX_BLOCKS, meter, block_size)
        self.by_operations, _ = started(None, meter, block_size)
        self.random = random.Random(seed)
        self.free = list(range(NUM_BLOCKS))
        self.random.shuffle(self.free)
        self.lengths: dict[int, int] = {}
        """Of the sequences that run: their tokens, those that were sampled among them."""
        self.computed: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}
        self.step_id = 0

    def sequence(self, id: int, length: int, sampling: Sampling = GREEDY) -> NewSequence:
        tokens = [self.random.randrange(VOCAB) for _ in range(length)]
        return NewSequence(id, tokens, length, sampling)

    def step(
        self,
        sizes: dict[int, int],
        new: Sequence[NewSequence] = (),
        finished: Sequence[int] = (),
        timed: bool = False,
    ) -> StepResult:
        """Runs so many tokens of each sequence, in blocks from anywhere."""
        for id in finished:
            self.free += self.blocks.pop(id)
            del self.lengths[id], self.computed[id]
            self.random.shuffle(self.free)
        for sequence in new:
            id = sequence.sequence_id
            self.lengths[id], self.computed[id] = len(sequence.token_ids), 0
            self.blocks[id] = []
        chunks = []
        for id, num_tokens in sizes.items():
            self.computed[id] += num_tokens
            missing = -(-self.computed[id] // self.size) - len(self.blocks[id])
            fresh = [self.free.pop() for _ in range(missing)]
            self.blocks[id] += fresh
            chunks.append(Chunk(id, num_tokens, fresh))
        self.step_id += 1
        step = Step(self.step_id, finished, new, chunks, timed)
        result = self.by_graphs.launch(step).result()
        wanted = self.by_operations.launch(step).result()
        assert (result.sequence_ids, result.token_ids) == (wanted.sequence_ids, wanted.token_ids)
        assert result.logprobs == wanted.logprobs
        by_graphs, by_operations = (
            runner.kv_cache.layers[0].keys for runner in (self.by_graphs, self.by_operations)
        )
        assert torch.equal(by_graphs, by_operations), "the same slots are written, and no others"
        for id in result.sequence_ids:
            self.lengths[id] += 1
        return result

    def left(self, id: int) -> int:
        """Tokens of a sequence that are to be computed."""
        return self.lengths[id] - self.computed[id]

    def is_graph(self, *arguments: Any, **more: Any) -> bool:
        """Whether such a step is one graph. The model is called for it only where it is captured."""
        self.step(*arguments, **more)
        before = len(self.model.num_tokens)
        captured = self.cuda.num_captured
        self.step(*arguments, **more)
        assert self.cuda.num_captured == captured, "a graph is captured once"
        return len(self.model.num_tokens) == before


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, allocator: Allocator) -> RecordingCuda:
    return RecordingCuda(monkeypatch)


# Steps


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 256])
def test_any_number_of_sequences_decodes(cuda: RecordingCuda, count: int) -> None:
    pair = Pair(cuda)
    news = [pair.sequence(id, 1 + id % 3) for id in range(count)]
    for start in range(0, count, 100):  # prompts
        some = news[start : start + 100]
        pair.step({new.sequence_id: len(new.token_ids) for new in some}, some)
    captured = cuda.num_captured
    ids = list(range(count))
    for _ in range(3):
        pair.random.shuffle(ids)  # a sequence stands elsewhere in each step
        pair.step(dict.fromkeys(ids, 1))
    assert cuda.num_captured == captured + 1


def test_more_sequences_than_the_largest_graph_has_are_launched_without(
    cuda: RecordingCuda,
) -> None:
    pair = Pair(cuda)
    for start in (0, 128, 256):
        some = [pair.sequence(id, 1) for id in range(start, min(start + 128, 257))]
        pair.step({new.sequence_id: 1 for new in some}, some)
    assert not pair.is_graph(dict.fromkeys(range(257), 1))
    assert pair.is_graph(dict.fromkeys(range(256), 1))


@pytest.mark.parametrize(
    "lengths", [(1,), (15,), (16,), (7, 10), (20, 12), (31, 33, 1), (40,) * 12]
)
def test_prompts_are_a_graph_beside_sequences_that_decode(
    cuda: RecordingCuda, lengths: Sequence[int]
) -> None:
    pair = Pair(cuda)
    first = [pair.sequence(id, 2 + id) for id in range(3)]
    pair.step({0: 2, 1: 3, 2: 4}, first)
    captured = cuda.num_captured
    news = [pair.sequence(10 + id, length) for id, length in enumerate(lengths)]
    # In the schedule's order a decoding sequence may stand between two prompts.
    sizes = {0: 1} | {new.sequence_id: len(new.token_ids) for new in news} | {2: 1, 1: 1}
    pair.step(sizes, news)
    assert cuda.num_captured <= captured + 1
    for _ in range(3):
        pair.step(dict.fromkeys(sizes, 1))


def test_more_tokens_than_the_largest_graph_has_are_launched_without(cuda: RecordingCuda) -> None:
    pair = Pair(cuda)
    for num_tokens in (512, 513):
        news = [pair.sequence(id, 40) for id in range(12)]
        news.append(pair.sequence(12, num_tokens - 480))
        before = cuda.num_captured
        pair.step({new.sequence_id: len(new.token_ids) for new in news}, news)
        assert cuda.num_captured == before + (num_tokens == 512)
        pair.step({}, finished=range(13))


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 16, 17])
@pytest.mark.parametrize("length", [3, 4, 5, 8, 9, 33])
def test_contexts_end_before_at_and_behind_the_edge_of_a_block(
    cuda: RecordingCuda, length: int, chunk: int
) -> None:
    pair = Pair(cuda)
    news = [pair.sequence(1, length), pair.sequence(2, 2)]
    pair.step({1: min(chunk, length), 2: 2}, news)
    while pair.left(1):
        pair.step({2: 1, 1: min(chunk, pair.left(1))})
        if pair.lengths[1] > length + 2 * BLOCK_SIZE:
            break


def test_a_context_fills_the_longest_table(cuda: RecordingCuda) -> None:
    pair = Pair(cuda)
    longest = MAX_BLOCKS * BLOCK_SIZE
    pair.step({1: longest - 3, 2: 1}, [pair.sequence(1, longest - 3), pair.sequence(2, 1)])
    for _ in range(3):
        pair.step({1: 1, 2: 1})
    assert pair.computed[1] == longest


@pytest.mark.parametrize("seed", range(6))
def test_sequences_come_and_go(cuda: RecordingCuda, seed: int) -> None:
    """Prompts in chunks of any size, drawn and greedy, preempted too; rows and blocks are used again."""
    pair = Pair(cuda, seed)
    rng = pair.random
    ways = [
        GREEDY,
        GREEDY,
        Sampling(0.8, 0, 1.0, seed=3),
        Sampling(1.1, 9, 0.9, seed=4, min_p=0.01),
        Sampling(0, 0, 1.0, seed=0, logprobs=2),
        Sampling(0.9, 0, 1.0, seed=5, repetition_penalty=1.2),
        Sampling(0, 0, 1.0, seed=0, prompt_logprobs=1),
    ]
    ids = itertools.count()
    for number in range(80):
        most = (24, 3, 12, 6)[number // 10 % 4]  # so that steps are of several sizes
        ends = 0.05 if len(pair.lengths) <= most else 0.3
        finished = [
            id
            for id, computed in pair.computed.items()
            if rng.random() < ends or computed >= (MAX_BLOCKS - 1) * BLOCK_SIZE
        ]
        new = []
        if len(pair.lengths) < most:
            for _ in range(rng.randrange(5)):
                # In some phases all of a step are drawn by a graph.
                way = ways[2 + number // 10 % 2] if number // 20 % 2 else rng.choice(ways)
                new.append(pair.sequence(next(ids), rng.choice((1, 3, 4, 5, 8, 21, 30)), way))
        left = {id: pair.left(id) for id in pair.lengths if id not in finished}
        left |= {sequence.sequence_id: len(sequence.token_ids) for sequence in new}
        sizes = {id: rng.randint(1, count) for id, count in left.items() if rng.random() < 0.9}
        pair.step(sizes, new, finished)
    assert cuda.num_captured >= 9


def test_a_row_that_is_used_again_has_the_table_of_its_new_sequence(cuda: RecordingCuda) -> None:
    pair = Pair(cuda)
    pair.step({1: 9}, [pair.sequence(1, 9)])
    pair.step({1: 1})
    pair.step({2: 9}, [pair.sequence(2, 9)], finished=[1])
    pair.step({2: 1})
    pair.step({2: 1})


def test_a_step_that_is_timed_is_no_graph(cuda: RecordingCuda) -> None:
    pair = Pair(cuda)
    pair.step({1: 5}, [pair.sequence(1, 5)])
    pair.step({1: 1})
    captured = cuda.num_captured
    for timed in (True, False, True):
        called = len(pair.model.num_tokens)
        pair.step({1: 1}, timed=timed)
        assert len(pair.model.num_tokens) == called + timed
    assert cuda.num_captured == captured


def test_what_replays_communicate_is_counted_and_a_capture_is_not(cuda: RecordingCuda) -> None:
    pair = Pair(cuda)
    pair.step({1: 5, 2: 3, 3: 2}, [pair.sequence(id, 7 - 2 * (id - 1) or 1) for id in (1, 2, 3)])
    tp = pair.by_graphs.sampler.tp

    def counted(num_steps: int) -> list[tuple[str, int, int]]:
        before = {stats.module: stats for stats in tp.all_stats()}
        for _ in range(num_steps):
            pair.step({1: 1, 2: 1, 3: 1})
        return [
            (now.module, now.calls - old.calls, now.payload_bytes - old.payload_bytes)
            for now in tp.all_stats()
            for old in (before[now.module],)
        ]

    # Three sequences are a step of four. One more happens to set up what is captured.
    head, sampler = 4 * VOCAB * 4, 4 * 2 * 4
    assert counted(1) == [("lm_head", 2, 2 * head), ("sampler", 2, 2 * sampler)]
    assert counted(5) == [("lm_head", 5, 5 * head), ("sampler", 5, 5 * sampler)]


# Draws


@pytest.mark.parametrize("count", [1, 2, 3, MAX_DRAWS, MAX_DRAWS + 1])
def test_draws_are_those_of_the_sampler(cuda: RecordingCuda, count: int) -> None:
    pair = Pair(cuda)
    ways = [
        Sampling(1.3, 0, 1.0, seed=1),
        Sampling(0.0, 0, 1.0, seed=2),
        Sampling(0.7, 5, 1.0, seed=3),
        Sampling(0.9, 0, 0.7, seed=4),
        Sampling(1.2, 0, 1.0, seed=5, min_p=0.2),
        Sampling(1.0, VOCAB, 0.9, seed=2**64 - 1, min_p=0.01),
    ]
    news = [pair.sequence(id, 2, ways[id % len(ways)]) for id in range(count)]
    pair.step(dict.fromkeys(range(count), 2), news)
    before = cuda.num_captured
    for _ in range(4):
        pair.step(dict.fromkeys(range(count), 1))
    drawn = 0 if count > MAX_DRAWS else 1
    assert cuda.num_captured == before + 1, "those who decode; the prompts' draws were the same"
    assert before == 1 + drawn


@pytest.mark.parametrize(
    "cut",
    [
        Sampling(2.0, 3, 1.0, seed=1),
        Sampling(2.0, 0, 0.2, seed=1),
        Sampling(2.0, 0, 1.0, seed=1, min_p=0.7),
    ],
    ids=["top_k", "top_p", "min_p"],
)
def test_draws_with_any_cut_are_not_the_graph_of_those_without(
    cuda: RecordingCuda, cut: Sampling
) -> None:
    pair = Pair(cuda)
    plain = Sampling(2.0, 0, 1.0, seed=1)
    pair.step({1: 2, 2: 2}, [pair.sequence(1, 2, plain), pair.sequence(2, 2, plain)])
    for _ in range(3):
        pair.step({1: 1, 2: 1})
    captured = cuda.num_captured
    news = [pair.sequence(3, 2, cut), pair.sequence(4, 2, plain)]
    pair.step({3: 2, 4: 2}, news, finished=[1, 2])
    for _ in range(12):
        pair.step({3: 1, 4: 1})
    assert cuda.num_captured == captured + 1


@pytest.mark.parametrize(
    "way",
    [
        Sampling(1.0, 0, 1.0, seed=1, logprobs=1),
        Sampling(1.0, 0, 1.0, seed=1, presence_penalty=0.5),
    ],
    ids=["logprobs", "penalty"],
)
def test_what_the_host_has_to_know_is_drawn_without_a_graph(
    cuda: RecordingCuda, way: Sampling
) -> None:
    pair = Pair(cuda)
    pair.step({1: 2}, [pair.sequence(1, 2, way)])
    for _ in range(4):
        pair.step({1: 1})
    assert cuda.num_captured == 2, "the steps alone"


# What there is a graph for


def graphs(block_size: int, max_blocks: int) -> StepGraphs:
    meter = MemoryMeter(torch.device("cuda:0"))
    found = started(max_blocks, meter, block_size)[0].graphs
    assert found is not None
    return found


def decoding(count: int, context: int = 1) -> list[GraphChunk]:
    return [GraphChunk(row, context - 1, context, None, ()) for row in range(count)]


def prompt(start: int, stop: int) -> GraphChunk:
    return GraphChunk(0, start, stop, range(stop), ())


@pytest.mark.parametrize(
    ("chunks", "fits"),
    [
        (decoding(256, 8192), True),
        (decoding(257), False),
        ([prompt(0, 512)], True),
        ([prompt(0, 513)], False),
        ([prompt(0, 500), *decoding(12)], True),
        ([prompt(0, 500), *decoding(13)], False),
        ([prompt(0, 1), *decoding(255)], True),
        ([prompt(0, 1), *decoding(256)], False),
        ([prompt(1536, 2048)], True),
        ([prompt(1537, 2049)], False),
        ([prompt(0, 1), *decoding(1, 2048)], True),
        ([prompt(0, 1), *decoding(1, 2049)], False),
    ],
)
def test_which_steps_there_is_a_graph_for(
    cuda: RecordingCuda, chunks: list[GraphChunk], fits: bool
) -> None:
    assert graphs(block_size=16, max_blocks=512).fit(chunks) == fits


def test_prompts_of_a_short_cache_are_held_to_its_length(cuda: RecordingCuda) -> None:
    short = graphs(block_size=16, max_blocks=3)
    assert short.fit([prompt(0, 48)])
    assert not short.fit([prompt(0, 49)])


def test_the_cost_model_reckons_with_graphs_of_as_many_tokens_as_there_are() -> None:
    largest = GRAPH_SIZES.prefill[-1].tokens
    assert H200_NVLINK.device.max_graph_tokens == largest
    assert largest == max(size.tokens for size in GRAPH_SIZES.prefill)


# Capturing


class LoggingMeter(MemoryMeter):
    def __init__(self, calls: list[str]) -> None:
        super().__init__(CPU)
        self.calls = calls

    def look(self) -> None:
        self.calls.append("look")

    def captured(self, pool: Any) -> None:
        self.calls.append(f"measure {pool}")


def test_a_capture_is_warmed_up_aside_and_measured_before_and_after(cuda: RecordingCuda) -> None:
    tp = TensorParallel(0, 1, SingleCommunicator())
    capture = GraphCapture(CPU, tp, LoggingMeter(cuda.calls))
    x, result = torch.ones(3), torch.zeros(3)

    def launch() -> Tensor:
        cuda.calls.append("launch")
        return torch.add(x, 1, out=result)

    graph = capture.capture("an addition", launch)
    assert cuda.calls == [
        "side waits for main",
        "on side",
        "launch",
        "main waits for side",
        "synchronize",
        "look",
        "capture, thread_local",
        "launch",
        "captured",
        "measure (0, 1)",
    ]
    x.fill_(5)
    assert graph.replay() is result
    assert result.tolist() == [6, 6, 6]
    capture.capture("another", launch)
    assert cuda.calls[-1] == "measure (0, 1)", "graphs share a pool"


def test_a_ledger_has_graphs_when_they_are_captured(
    cuda: RecordingCuda, allocator: Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool_bytes = {16: 300, 1: 20}  # what a step of so many tokens makes the pool grow by
    call = HashModel.__call__

    def metered(model: HashModel, batch: ForwardBatch) -> Tensor:
        # A step is launched twice, of which the second is the capture.
        num_bytes = pool_bytes[len(batch.token_ids)]
        allocator.take(num_bytes, giving_back=num_bytes)
        if model.num_tokens.count(len(batch.token_ids)) == 1:
            allocator.segments.append(
                {"segment_pool_id": (0, 1), "total_size": num_bytes, "allocated_size": 0}
            )
        return call(model, batch)

    monkeypatch.setattr(HashModel, "__call__", metered)
    meter = MemoryMeter(torch.device("cuda:0"))
    meter.allocated(0, graphs=None, workspace=None)
    runner, _ = started(MAX_BLOCKS, meter)
    allocator.take(1000)  # where all of them read from and write to
    meter.prepared()
    assert meter.ledger.graphs == MemoryUse(actual=1000)
    sequence = NewSequence(1, (1, 2, 3), 3, GREEDY)
    runner.launch(Step(1, (), [sequence], [Chunk(1, 3, [7])])).result()
    assert meter.ledger.graphs == MemoryUse(actual=1300)
    for step_id in (2, 3):
        runner.launch(Step(step_id, (), (), [Chunk(1, 1, [8] if step_id == 3 else [])])).result()
        assert meter.ledger.graphs == MemoryUse(actual=1320)
    meter.look()
    assert meter.ledger.workspace == MemoryUse(actual=300), "the peak of what is launched aside"


# Staging


def test_memory_is_written_to_once_its_last_copy_is_made(cuda: RecordingCuda) -> None:
    staging = Staging(8, torch.int32)
    places, events = [], []
    for number in range(9):
        cuda.calls.clear()
        with staging.take(3) as memory:
            (waited,) = cuda.calls
            assert memory.shape == (3,) and memory.dtype == torch.int32
            memory.fill_(number)
        recorded = cuda.calls[-1]
        assert recorded == waited.replace("wait", "record"), "the copy's own event"
        places.append(memory.data_ptr())
        events.append(recorded)
    assert len(set(places)) == len(set(events)) == 4
    assert places[4:] == places[:5] and events[4:] == events[:5]
