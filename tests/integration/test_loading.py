"""What ranks read, hold and communicate is what the plan says, to the byte, in a real cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from client import Colrow
from colrow.v1 import (
    control_service_pb2,
    shard_worker_service_pb2,
    shard_worker_service_pb2_grpc,
)
from coordinator.families import model_spec
from coordinator.shard_plan import make_plan
from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster, start_coordinator

pytestmark = pytest.mark.timeout(60)

MIB = 2**20
# What a worker holds beside weights and KV cache: Python, torch, gRPC, buffers, and for a bfloat16
# model with tied embeddings the LM head in its own layout. The README states it.
FIXED_OVERHEAD_BYTES = 384 * MIB

GREEDY_GATHER_BYTES = 8  # a float32 value and a float32 token id
DRAWN_GATHER_BYTES = 20  # the largest logit (float32), the probability mass (float64), a token id

PROMPTS = [[5, 17, 200], [250, 3, 9, 31, 7, 7, 90, 120, 44, 2, 61], list(range(40, 90))]


def describe(address: str) -> shard_worker_service_pb2.WorkerDescription:
    """What a worker says of itself, without a coordinator."""
    with grpc.insecure_channel(address) as channel:
        stub = shard_worker_service_pb2_grpc.ShardWorkerServiceStub(channel)
        response = stub.Describe(shard_worker_service_pb2.DescribeRequest(), timeout=10)
    return response.worker


def generate(
    running: RunningCluster, prompt: list[int], num_tokens: int = 24, temperature: float = 0.0
) -> list[int]:
    pieces = running.client.generate(
        prompt, max_tokens=num_tokens, temperature=temperature, seed=1, timeout_s=30
    )
    return [token for piece in pieces for token in piece.token_ids]


def payload(running: RunningCluster, operation: str) -> list[int]:
    """The bytes that each rank has put into a collective so far."""
    return [
        sum(s.payload_bytes for s in worker.description.communication if s.operation == operation)
        for worker in running.client.cluster().workers
    ]


def tensor_bytes(folder: Path) -> int:
    """All of a checkpoint's files but their headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        total += file.stat().st_size - 8 - header
    return total


def header_bytes(folder: Path) -> int:
    """What opening a checkpoint reads: headers, and the index of several files."""
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    return files - tensor_bytes(folder) + (index.stat().st_size if index.exists() else 0)


@dataclass
class Served:
    """A model on freshly loaded workers, and what they had read before."""

    folder: Path
    tp: int
    running: RunningCluster
    read_before: list[int]


@pytest.fixture(scope="class")
def served(
    request: pytest.FixtureRequest,
    worker_pool: WorkerPool,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    variation, tp = request.param
    folder = checkpoints.build(variation, tmp_path_factory.mktemp(variation))
    read_before = [describe(a).file_bytes_read for a in worker_pool.addresses(tp)]
    # Steps of 16 tokens, so that prompts are computed in chunks.
    with cluster(worker_pool, folder, tp, "--max-batched-tokens", "16") as running:
        yield Served(folder, tp, running, read_before)


@pytest.mark.parametrize(
    "served",
    [*(("qwen2", tp) for tp in (1, 2, 3, 4)), ("gpt2", 3)],
    ids=lambda param: f"{param[0]}-{param[1]}",
    indirect=True,
)
class TestThePlanIsKept:
    def test_every_rank_reads_its_slices_and_hardly_more(self, served: Served) -> None:
        state = served.running.client.cluster()
        for worker, shard, before in zip(
            state.workers, state.plan.ranks, served.read_before, strict=True
        ):
            read = worker.description.file_bytes_read - before
            assert read == shard.weight_bytes + header_bytes(served.folder)
            assert read <= shard.weight_bytes * 1.1

    def test_every_rank_holds_what_the_plan_says(self, served: Served) -> None:
        state = served.running.client.cluster()
        spec = model_spec(json.loads((served.folder / "config.json").read_text()))
        planned = [shard.weight_bytes for shard in make_plan(spec, served.tp).ranks]
        assert [shard.weight_bytes for shard in state.plan.ranks] == planned
        assert [worker.description.weight_bytes for worker in state.workers] == planned
        assert [worker.bytes_read for worker in state.workers] == planned
        assert [worker.bytes_to_read for worker in state.workers] == planned

    def test_the_ranks_hold_the_checkpoint_and_what_is_replicated(self, served: Served) -> None:
        state = served.running.client.cluster()
        assert state.plan.checkpoint_bytes == tensor_bytes(served.folder)
        held = sum(worker.description.weight_bytes for worker in state.workers)
        assert held == state.plan.checkpoint_bytes + state.plan.replicated_bytes

    def test_the_cache_takes_what_the_plan_says(self, served: Served) -> None:
        state = served.running.client.cluster()
        tokens = state.scheduler.kv_blocks_total * state.scheduler.block_size
        for worker, shard in zip(state.workers, state.plan.ranks, strict=True):
            assert worker.description.kv_cache_bytes == tokens * shard.kv_bytes_per_token > 0

    def test_the_ledger_has_what_was_planned_and_what_is_held(self, served: Served) -> None:
        state = served.running.client.cluster()
        tokens = state.scheduler.kv_blocks_total * state.scheduler.block_size
        for worker, shard in zip(state.workers, state.plan.ranks, strict=True):
            ledger = worker.description.memory
            assert ledger.weights.planned_bytes == shard.weight_bytes
            assert ledger.weights.actual_bytes == shard.weight_bytes, "in float32 nothing is packed"
            assert ledger.kv_cache.planned_bytes == tokens * shard.kv_bytes_per_token
            assert (ledger.graphs.planned_bytes, ledger.graphs.actual_bytes) == (0, 0)
            # A CPU gives the cache memory as it is written, and nobody counts what a step takes.
            for use, name in (
                (ledger.kv_cache, "actual_bytes"),
                (ledger.workspace, "planned_bytes"),
                (ledger.workspace, "actual_bytes"),
            ):
                assert not use.HasField(name), name

    def test_every_token_costs_the_bytes_of_the_plan(self, served: Served) -> None:
        """A token is computed once: those of the prompt, and all that were generated but the last,
        which nothing follows."""
        plan = served.running.client.cluster().plan
        reduced, gathered = (payload(served.running, op) for op in ("all_reduce", "all_gather"))
        num_tokens = 10
        for prompt in PROMPTS:
            assert len(generate(served.running, prompt, num_tokens)) == num_tokens
        computed = sum(len(prompt) + num_tokens - 1 for prompt in PROMPTS)
        sampled = num_tokens * len(PROMPTS)
        per_token = plan.all_reduce_bytes_per_token
        assert (per_token > 0) == (served.tp > 1)
        assert payload(served.running, "all_reduce") == [
            before + computed * per_token for before in reduced
        ]
        gather = GREEDY_GATHER_BYTES if served.tp > 1 else 0
        assert payload(served.running, "all_gather") == [
            before + sampled * gather for before in gathered
        ]

    def test_a_token_that_is_drawn_costs_a_few_numbers_not_its_logits(self, served: Served) -> None:
        gather = DRAWN_GATHER_BYTES if served.tp > 1 else 0
        before = payload(served.running, "all_gather")
        generate(served.running, PROMPTS[0], 7, temperature=1.0)
        assert payload(served.running, "all_gather") == [
            bytes_before + 7 * gather for bytes_before in before
        ]


# The same model from other files


@dataclass
class Model:
    folder: Path
    expected: list[list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A float32 model, and what transformers makes of it."""
    folder = checkpoints.build("smollm2", tmp_path_factory.mktemp("model"))
    reference = checkpoints.oracle(folder)
    return Model(folder, [checkpoints.greedy(reference, prompt, 24) for prompt in PROMPTS])


def tokens(running: RunningCluster) -> list[list[int]]:
    return [generate(running, prompt) for prompt in PROMPTS]


def test_a_checkpoint_of_several_files_gives_the_same_tokens(
    model: Model, worker_pool: WorkerPool, tmp_path: Path
) -> None:
    folder = checkpoints.build("smollm2", tmp_path, max_shard_size="150KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    before = describe(worker_pool.addresses(2)[1]).file_bytes_read
    with cluster(worker_pool, folder, 2) as running:
        assert tokens(running) == model.expected
        rank = running.client.cluster().workers[1].description
        assert rank.file_bytes_read - before == rank.weight_bytes + header_bytes(folder)


@pytest.mark.parametrize("tp", [1, 3])
def test_a_bfloat16_checkpoint_served_in_float32(
    tp: int, worker_pool: WorkerPool, tmp_path: Path
) -> None:
    halved = AutoModelForCausalLM.from_pretrained(
        checkpoints.build("smollm2", tmp_path / "float32"), dtype=torch.bfloat16
    )
    halved.save_pretrained(tmp_path / "bfloat16")
    reference = checkpoints.oracle(tmp_path / "bfloat16")
    with cluster(worker_pool, tmp_path / "bfloat16", tp, "--dtype", "float32") as running:
        state = running.client.cluster()
        for worker, shard in zip(state.workers, state.plan.ranks, strict=True):
            assert worker.description.weight_bytes == shard.weight_bytes
            assert worker.bytes_to_read * 2 == shard.weight_bytes, "read as bfloat16"
        assert tokens(running) == [checkpoints.greedy(reference, p, 24) for p in PROMPTS]


def test_a_float32_checkpoint_served_in_bfloat16(
    model: Model, worker_pool: WorkerPool, tmp_path: Path
) -> None:
    """It is converted as torch converts it: no difference to a checkpoint that torch converted."""
    halved = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.bfloat16)
    halved.save_pretrained(tmp_path)
    with cluster(worker_pool, model.folder, 2, "--dtype", "bfloat16") as running:
        state = running.client.cluster()
        assert running.client.model().data_type == state.plan.data_type == 2
        for worker, shard in zip(state.workers, state.plan.ranks, strict=True):
            assert worker.description.weight_bytes == shard.weight_bytes
            assert worker.bytes_to_read == shard.weight_bytes * 2, "read as float32"
        converted = tokens(running)
    with cluster(worker_pool, tmp_path, 2) as running:
        assert running.client.cluster().workers[0].bytes_to_read * 2 == state.workers[0].bytes_read
        assert tokens(running) == converted


@pytest.mark.parametrize("weights", ["3,1", "0.2,1", "auto"])
def test_ranks_of_unequal_memory_give_the_same_tokens(
    weights: str, model: Model, worker_pool: WorkerPool
) -> None:
    with cluster(worker_pool, model.folder, 2, "--memory-weights", weights) as running:
        state = running.client.cluster()
        first, second = (worker.description.weight_bytes for worker in state.workers)
        assert [first, second] == [shard.weight_bytes for shard in state.plan.ranks]
        if weights == "3,1":
            assert 2.5 < first / second < 3.5
        elif weights == "0.2,1":
            assert 3.5 < second / first < 6.5
        else:  # one host, so nearly the same memory is available to both
            assert 0.8 < first / second < 1.25
        assert tokens(running) == model.expected


# Weights that the workers still hold


def test_a_second_coordinator_finds_the_weights_loaded(
    model: Model, worker_pool: WorkerPool, tmp_path: Path
) -> None:
    folder = shutil.copytree(model.folder, tmp_path / "model")
    addresses = worker_pool.addresses(2)

    def serve(*arguments: str, tp: int = 2) -> list[int]:
        """What each rank reads until the cluster serves, and gives the right tokens."""
        before = [describe(address).file_bytes_read for address in addresses[:tp]]
        with cluster(worker_pool, folder, tp, *arguments) as running:
            state = running.client.cluster()
            assert tokens(running) == model.expected
            held = [worker.description.weight_bytes for worker in state.workers]
            assert held == [shard.weight_bytes for shard in state.plan.ranks]
        after = [describe(address).file_bytes_read for address in addresses[:tp]]
        return [b - a for a, b in zip(before, after, strict=True)]

    headers = header_bytes(folder)
    first = serve()
    assert min(first) > headers
    assert serve() == [headers, headers], "headers only: they tell that nothing has changed"
    # Another context length or block size is no reason to load anew; another plan or file is.
    assert serve("--max-model-len", "100", "--block-size", "8") == [headers, headers]
    assert serve("--memory-weights", "3,1") != [headers, headers]
    assert serve() == first
    os.utime(folder / "model.safetensors", (1, 1))
    assert serve() == first
    assert serve(tp=1) > [headers]
    assert serve() == [first[0], headers], "rank 0 held another shard meanwhile"


# The demo model


def test_loading_is_watched_as_it_proceeds(
    demo_model_folder: Path, worker_pool: WorkerPool, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in demo_model_folder.iterdir():
        (folder / file.name).symlink_to(file)
    addresses = worker_pool.addresses(2)
    pids = [service.process.pid for service in worker_pool.services[:2]]
    for pid in pids:  # until somebody watches
        os.kill(pid, signal.SIGSTOP)
    service = start_coordinator(folder, addresses)
    seen: list[control_service_pb2.Cluster] = []
    try:
        with Colrow(service.address) as client:
            for state in client.watch():
                if not seen:
                    for pid in pids:
                        os.kill(pid, signal.SIGCONT)
                seen.append(state)
                if state.state in (
                    control_service_pb2.CLUSTER_STATE_SERVING,
                    control_service_pb2.CLUSTER_STATE_FAILED,
                ):
                    break
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        service.stop()
    states = [state.state for state in seen]
    assert states == sorted(states), "never backwards"
    assert states[0] == control_service_pb2.CLUSTER_STATE_CONNECTING
    assert states[-1] == control_service_pb2.CLUSTER_STATE_SERVING, seen[-1].error
    loading = [s for s in seen if s.state == control_service_pb2.CLUSTER_STATE_LOADING]
    for rank in range(2):
        read = [state.workers[rank].bytes_read for state in loading]
        assert read == sorted(read)
        planned = seen[-1].plan.ranks[rank].weight_bytes
        assert len({bytes_read for bytes_read in read if 0 < bytes_read < planned}) >= 5
        assert seen[-1].workers[rank].bytes_read == planned
    service.log.unlink()


def test_a_worker_holds_its_weights_and_little_more(demo_model_folder: Path) -> None:
    """The KV cache of half a GiB takes memory as it is written."""
    pool = WorkerPool()  # of its own: what other models left behind is not to be counted
    try:
        with cluster(pool, demo_model_folder, 2) as running:
            state = running.client.cluster()
            assert state.workers[0].description.kv_cache_bytes > FIXED_OVERHEAD_BYTES
            for worker in state.workers:
                held = worker.description
                assert held.resident_bytes < held.weight_bytes + FIXED_OVERHEAD_BYTES
                # In bfloat16 the tied LM head is held in a layout of its own too.
                weights = held.memory.weights
                assert weights.planned_bytes == held.weight_bytes < weights.actual_bytes
                assert held.resident_bytes > weights.actual_bytes
            plan = state.plan
            generate(running, PROMPTS[2], 50)
            written = len(PROMPTS[2]) + 50
            for worker, shard in zip(running.client.cluster().workers, plan.ranks, strict=True):
                held = worker.description
                assert held.resident_bytes < (
                    held.weight_bytes + written * shard.kv_bytes_per_token + FIXED_OVERHEAD_BYTES
                )
                assert payload(running, "all_reduce")[shard.rank] == (
                    (written - 1) * plan.all_reduce_bytes_per_token
                )
    finally:
        pool.stop()
