"""Logits of tp_size ranks are those of one: the serving path's own modules, in a process a rank."""

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coordinator.families import model_spec
from coordinator.shard_plan import make_plan
from shard_worker import checkpoint, models
from shard_worker.communicator.shm import ShmCommunicator
from shard_worker.communicator.single import SingleCommunicator
from shard_worker.forward_batch import ForwardBatch
from shard_worker.kv_cache import KvCache
from shard_worker.memory_meter import MemoryMeter
from shard_worker.model_runner import Chunk, ModelRunner, NewSequence, Step
from shard_worker.sampler import Draw, Sampler
from shard_worker.sampling import Sampling
from shard_worker.sharding import Parameter, Section, ShardLayout, ShardTensors
from shard_worker.step_graphs import GraphChunk, StepGraphs
from shard_worker.tensor_parallel import TensorParallel

pytestmark = pytest.mark.timeout(120)

TOLERANCE = 1e-4
"""Of the largest logit."""

TIMEOUT_S = 60.0
BLOCK_SIZE = 4
NUM_BLOCKS = 32
GREEDY = Sampling(temperature=0, top_k=0, top_p=1, seed=0)

PROMPT_LENGTHS = {1: 1, 2: 18, 3: 45}
NUM_DECODED = 5


def steps(vocab_size: int) -> list[Step]:
    """Prompts, one of them in chunks beside sequences that decode, then decoding of all three.

    The sequences take turns in taking blocks, so that the blocks of none lie side by side.
    """
    generator = np.random.default_rng(3)
    news = {
        id: NewSequence(id, generator.integers(0, vocab_size, length).tolist(), length, GREEDY)
        for id, length in PROMPT_LENGTHS.items()
    }
    schedule = [{1: 1, 2: 18, 3: 20}, {1: 1, 2: 1, 3: 13}, {3: 12, 1: 1, 2: 1}]
    schedule += [{1: 1, 2: 1, 3: 1}] * NUM_DECODED
    computed, blocks = dict.fromkeys(news, 0), dict.fromkeys(news, 0)
    result, next_block = [], 0
    for step_id, sizes in enumerate(schedule, 1):
        chunks = []
        for id, num_tokens in sizes.items():
            computed[id] += num_tokens
            missing = -(-computed[id] // BLOCK_SIZE) - blocks[id]
            blocks[id] += missing
            chunks.append(Chunk(id, num_tokens, range(next_block, next_block + missing)))
            next_block += missing
        new = tuple(news.values()) if step_id == 1 else ()
        result.append(Step(step_id, (), new, tuple(chunks)))
    return result


@dataclass(frozen=True)
class Seen:
    """What a rank saw in one step: hidden states, the logits of every sampled row, the tokens."""

    hidden: np.ndarray
    logits: np.ndarray
    tokens: dict[int, int]


class RecordingSampler(Sampler):
    """Keeps the logits of the whole vocabulary."""

    def __call__(self, logits: Tensor, draws: Sequence[Draw]) -> Tensor:
        self.logits = self.tp.comm.all_gather(logits.contiguous(), self.rank_sizes).clone()
        return super().__call__(logits, draws)


class RecordingGraphs:
    """Keeps the logits of sampled rows in the sampler, which graphs do not call."""

    def __init__(self, graphs: StepGraphs, sampler: RecordingSampler) -> None:
        self.graphs, self.sampler = graphs, sampler
        self.fit = graphs.fit

    def run(self, chunks: Sequence[GraphChunk]) -> tuple[Tensor, Tensor]:
        logits, tokens = self.graphs.run(chunks)
        rows = [
            row
            for row, chunk in enumerate(chunks)
            if chunk.token_ids is None or chunk.stop == len(chunk.token_ids)
        ]
        gather = self.sampler.tp.comm.all_gather
        self.sampler.logits = gather(logits[rows], self.sampler.rank_sizes).clone()
        return logits, tokens


class RecordingModel:
    """Keeps the hidden states that the LM head takes."""

    def __init__(self, model: models.Model) -> None:
        self.model = model
        self.lm_head = model.lm_head
        self.num_layers, self.num_kv_heads = model.num_layers, model.num_kv_heads
        self.head_dim, self.max_positions = model.head_dim, model.max_positions

    def __call__(self, batch: ForwardBatch) -> Tensor:
        self.hidden = self.model(batch)
        return self.hidden


def run_rank(folder: Path, size: int, rank: int, communicator_id: bytes) -> list[Seen]:
    """Loads one rank's shard and runs the steps on it, together with the other ranks."""
    comm = (
        SingleCommunicator()
        if size == 1
        else ShmCommunicator.join(communicator_id, rank, size, timeout_s=TIMEOUT_S)
    )
    try:
        return run_steps(folder, TensorParallel(rank, size, comm), torch.device("cpu"))
    finally:
        comm.close()


def run_steps(
    folder: Path, tp: TensorParallel, device: torch.device, *, graphs: bool = False
) -> list[Seen]:
    """The steps in float32 on this rank's shard; with `graphs`, which take a GPU, as CUDA graphs."""
    config = json.loads((folder / "config.json").read_text())
    spec = model_spec(config)
    plan = make_plan(spec, tp.size)
    layout = ShardLayout(
        {
            p.name: Parameter(
                p.name,
                p.shape,
                p.split_dim,
                tuple(Section(str(s.axis), s.units, s.unit_size) for s in p.sections),
                str(p.combine),
            )
            for p in spec.parameters
        },
        tp.rank,
        tuple(
            {str(axis): (r.start, r.stop) for axis, r in shard.ranges.items()}
            for shard in plan.ranks
        ),
    )
    stored = checkpoint.match_keys(
        layout, checkpoint.Checkpoint.open(folder), spec.ignored, spec.optional_prefix
    )
    tensors = ShardTensors(layout, tp, torch.float32, device)
    model = RecordingModel(models.build(config, tensors))
    checkpoint.load(layout, stored, tensors.destinations, lambda progress: None)
    tensors.finish()
    cache = KvCache.allocate(
        num_layers=model.num_layers,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=torch.float32,
        device=device,
    )
    sampler = RecordingSampler(tp, model.lm_head.rank_sizes, model.lm_head.start, device)
    runner = ModelRunner(
        model,
        sampler,
        cache,
        spec.vocab_size,
        device=device,
        max_blocks=NUM_BLOCKS if graphs else None,
        meter=MemoryMeter(device),
    )
    if runner.graphs is not None:
        runner.graphs = RecordingGraphs(runner.graphs, sampler)  # type: ignore[assignment]
    seen = []
    for step in steps(spec.vocab_size):
        result = runner.launch(step).result()
        tokens = dict(zip(result.sequence_ids, result.token_ids, strict=True))
        seen.append(Seen(model.hidden.cpu().numpy(), sampler.logits.cpu().numpy(), tokens))
    runner.close()
    return seen


def serve(tasks: Connection) -> None:
    """A process that is one rank after another, of groups of any size."""
    torch.set_num_threads(1)
    while (task := tasks.recv()) is not None:
        try:
            tasks.send(run_rank(*task))
        except Exception as error:
            tasks.send(error)


class Ranks:
    """Four processes, each with a device thread of its own, as workers are."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for _ in range(4):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, folder: Path, size: int) -> list[list[Seen]]:
        """What each of `size` ranks saw, step by step."""
        communicator_id = ShmCommunicator.create_id()
        for rank in range(size):
            self.pipes[rank].send((folder, size, rank, communicator_id))
        results = []
        for rank in range(size):
            assert self.pipes[rank].poll(TIMEOUT_S), f"rank {rank} of {size} hangs"
            results.append(self.pipes[rank].recv())
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(5)
            process.kill()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.stop()


@dataclass(frozen=True)
class Model:
    folder: Path
    vocab_size: int
    alone: list[Seen]
    """What one rank sees that has the whole model."""


# Llama 3's two KV heads are replicated at tp 3 and 4, Mistral's window slides over the prompts, and
# GPT-2 has q, k and v in one tensor.
@pytest.fixture(scope="module", params=["llama3", "mistral", "qwen3", "gpt2"])
def model(
    request: pytest.FixtureRequest, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> Model:
    from tests import checkpoints  # the ranks import this module, and transformers takes seconds

    folder = checkpoints.build(request.param, tmp_path_factory.mktemp(request.param))
    vocab_size = checkpoints.VARIATIONS[request.param].settings["vocab_size"]
    (alone,) = ranks.run(folder, 1)
    return Model(folder, vocab_size, alone)


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest one, relative to the largest value."""
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_logits_of_many_ranks_are_those_of_one(model: Model, ranks: Ranks, size: int) -> None:
    for together, alone in zip(ranks.run(model.folder, size)[0], model.alone, strict=True):
        assert difference(together.logits, alone.logits) <= TOLERANCE
        assert difference(together.hidden, alone.hidden) <= TOLERANCE
        assert together.tokens == alone.tokens


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_hold_the_same_bits(model: Model, ranks: Ranks, size: int) -> None:
    first, *others = ranks.run(model.folder, size)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert np.array_equal(mine.hidden, theirs.hidden)
            assert np.array_equal(mine.logits, theirs.logits)
            assert mine.tokens == theirs.tokens


def check_logits(seen: Sequence[Seen], oracle: Any, vocab_size: int) -> None:
    """Those of every sampled row are what transformers, the oracle, says of the whole text before it."""
    texts = {new.sequence_id: [*new.token_ids] for new in steps(vocab_size)[0].new_sequences}
    for step, now in zip(steps(vocab_size), seen, strict=True):
        # Rows are prompts first, then decoding sequences, each in the order of the chunks.
        sampled = [id for chunk in step.chunks if (id := chunk.sequence_id) in now.tokens]
        sampled.sort(key=lambda id: len(texts[id]) > PROMPT_LENGTHS[id])
        for id, logits in zip(sampled, now.logits, strict=True):
            with torch.inference_mode():
                text = torch.tensor([texts[id]], device=oracle.device)
                expected = oracle(text).logits[0, -1].cpu().numpy()
            assert difference(logits, expected) <= TOLERANCE
        for id, token in now.tokens.items():
            texts[id].append(token)
    assert [len(texts[id]) - PROMPT_LENGTHS[id] for id in (1, 2, 3)] == [8, 8, 6]


def test_logits_over_the_paged_cache_are_those_of_transformers_on_the_whole_text(
    model: Model,
) -> None:
    from tests import checkpoints

    check_logits(model.alone, checkpoints.oracle(model.folder), model.vocab_size)
