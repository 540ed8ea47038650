"""A worker led by hand: what is out of order or out of range is refused, and the worker works on."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import pytest
import torch

from client import Colrow
from colrow.errors import ServiceError
from colrow.rpc import error_of
from colrow.v1 import shard_worker_service_pb2, shard_worker_service_pb2_grpc, tensor_pb2
from coordinator.convert import workers
from coordinator.families import model_spec
from coordinator.shard_plan import make_plan
from tests.clusters import WorkerPool
from tests.refusals import FAMILIES, PROMPT, VOCAB_SIZE, Model, check_health, floats, refusal

pytestmark = pytest.mark.timeout(60)

_worker = shard_worker_service_pb2

UNKNOWN_TRANSPORT: Any = 9


@dataclass
class Worker:
    """A worker that is led by hand."""

    address: str
    stub: Any
    model: Model
    epoch: int = 0

    def join(self, **fields: Any) -> Any:
        """A group of one, of the next epoch."""
        request = {
            "epoch": self.epoch + 1,
            "rank": 0,
            "size": 1,
            "transport": _worker.TRANSPORT_SINGLE,
            "timeout_s": 5.0,
        } | fields
        self.epoch = max(self.epoch, request["epoch"])
        return self.stub.JoinGroup(_worker.JoinGroupRequest(**request), timeout=20)

    def load(self, epoch: int | None = None, **fields: Any) -> Any:
        config = (self.model.folder / "config.json").read_text()
        shards = make_plan(model_spec(json.loads(config)), 1)
        request = workers.load_request(
            self.epoch if epoch is None else epoch,
            self.model.folder,
            config,
            shards,
            "safetensors",
        )
        for name, value in fields.items():
            if isinstance(value, list):
                request.ClearField(name)  # type: ignore[arg-type]
                getattr(request, name).extend(value)
            else:
                setattr(request, name, value)
        return list(self.stub.LoadShard(request, timeout=20))[-1]

    def allocate(self, num_blocks: int = 8, block_size: int = 4, epoch: int | None = None) -> Any:
        request = _worker.AllocateKvCacheRequest(
            epoch=self.epoch if epoch is None else epoch,
            num_blocks=num_blocks,
            block_size=block_size,
        )
        return self.stub.AllocateKvCache(request, timeout=20)

    def abort(self, epoch: int | None = None) -> Any:
        request = _worker.AbortGroupRequest(epoch=self.epoch if epoch is None else epoch)
        return self.stub.AbortGroup(request, timeout=20)

    def compute(self, epoch: int | None = None, **fields: Any) -> Any:
        given: dict[str, Any] = {"module": "model.norm", "activation": floats(1, 72)} | fields
        request = _worker.ComputePartialRequest(
            epoch=self.epoch if epoch is None else epoch, **given
        )
        return self.stub.ComputePartial(request, timeout=20)

    def execute(self, *steps: _worker.ExecuteStepsRequest) -> list[Any]:
        for step in steps:
            if not step.epoch:
                step.epoch = self.epoch
        return list(self.stub.ExecuteSteps(iter(steps), timeout=20))

    @property
    def state(self) -> str:
        worker = self.stub.Describe(_worker.DescribeRequest(), timeout=5).worker
        return _worker.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_")

    def leave(self) -> None:
        """Back to idle, whatever was."""
        worker = self.stub.Describe(_worker.DescribeRequest(), timeout=5).worker
        self.epoch = worker.epoch
        if worker.size:
            self.abort()
        assert self.state == "IDLE"

    def make_ready(self) -> None:
        self.leave()
        self.join()
        self.load()
        self.allocate()
        assert self.state == "READY"


@pytest.fixture(scope="module")
def own_pool() -> Iterator[WorkerPool]:
    """Workers that no coordinator has met."""
    pool = WorkerPool()
    pool.addresses(1)
    yield pool
    pool.stop()


@pytest.fixture
def worker(own_pool: WorkerPool, model: Model) -> Iterator[Worker]:
    """An idle worker; afterwards it must be in health and do its work."""
    (address,) = own_pool.addresses(1)
    with grpc.insecure_channel(address) as channel:
        led = Worker(address, shard_worker_service_pb2_grpc.ShardWorkerServiceStub(channel), model)
        led.leave()
        yield led
        check_health(address)
        led.make_ready()
        first, second = led.execute(
            step(1, new=[sequence(1, PROMPT)], chunks=[chunk(1, 3, [7])]),
            step(2, chunks=[chunk(1, 1)]),
        )
        assert [*first.token_ids, *second.token_ids] == model.expected[:2]
        led.leave()


def step(
    step_id: int,
    *,
    epoch: int = 0,
    new: Sequence[_worker.NewSequence] = (),
    chunks: Sequence[_worker.ScheduledChunk] = (),
) -> _worker.ExecuteStepsRequest:
    return _worker.ExecuteStepsRequest(
        epoch=epoch, step_id=step_id, new_sequences=new, chunks=chunks
    )


def sequence(
    sequence_id: int, token_ids: Sequence[int], num_prompt_tokens: int | None = None
) -> _worker.NewSequence:
    return _worker.NewSequence(
        sequence_id=sequence_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        sampling=_worker.StepSampling(temperature=0, top_p=1, repetition_penalty=1),
    )


def chunk(
    sequence_id: int, num_tokens: int, new_block_ids: Sequence[int] = ()
) -> _worker.ScheduledChunk:
    return _worker.ScheduledChunk(
        sequence_id=sequence_id, num_tokens=num_tokens, new_block_ids=new_block_ids
    )


class TestAWorkerOutOfOrder:
    def test_nothing_goes_before_joining(self, worker: Worker) -> None:
        for call in (worker.load, worker.allocate, worker.compute):
            for epoch in (0, worker.epoch, worker.epoch + 1):
                info = refusal(
                    partial(call, epoch=epoch),
                    "FAILED_PRECONDITION",
                    f"epoch = {epoch}",
                    "there is no group",
                )
                assert info.reason == "STALE_EPOCH"
        refusal(lambda: worker.execute(step(1)), "FAILED_PRECONDITION", "there is no group")
        assert worker.state == "IDLE"

    def test_nothing_goes_before_loading(self, worker: Worker) -> None:
        worker.join()
        for call in (worker.allocate, worker.compute, lambda: worker.execute(step(1))):
            refusal(call, "FAILED_PRECONDITION", "the worker is joined")
        assert worker.state == "JOINED"

    def test_no_step_goes_before_the_cache(self, worker: Worker) -> None:
        worker.join()
        worker.load()
        refusal(lambda: worker.execute(step(1)), "FAILED_PRECONDITION", "is loaded", "it ready")
        assert worker.state == "LOADED"

    def test_a_second_load_is_refused(self, worker: Worker) -> None:
        worker.join()
        held = worker.load().weight_bytes
        refusal(worker.load, "FAILED_PRECONDITION", "the worker is loaded", "needs it joined")
        worker.allocate()
        refusal(worker.load, "FAILED_PRECONDITION", "the worker is ready", "needs it joined")
        described = worker.stub.Describe(_worker.DescribeRequest(), timeout=5).worker
        assert (worker.state, described.weight_bytes) == ("READY", held)

    def test_every_call_of_another_epoch_is_refused(self, worker: Worker) -> None:
        worker.make_ready()
        worker.make_ready()  # so that there was an epoch before: 0 is none
        for epoch in (worker.epoch - 1, worker.epoch + 1):
            for call in (
                partial(worker.load, epoch=epoch),
                partial(worker.allocate, epoch=epoch),
                partial(worker.compute, epoch=epoch),
                partial(worker.abort, epoch=epoch),
                partial(worker.execute, step(1, epoch=epoch)),
            ):
                info = refusal(
                    call, "FAILED_PRECONDITION", f"epoch = {epoch}", f"is {worker.epoch}"
                )
                assert info.reason == "STALE_EPOCH"
        assert worker.state == "READY"

    def test_leaving_no_group_is_no_error(self, worker: Worker) -> None:
        worker.abort(epoch=12345)
        assert worker.state == "IDLE"


class TestJoining:
    def test_an_epoch_that_nothing_could_follow(self, worker: Worker) -> None:
        request = _worker.JoinGroupRequest(
            epoch=2**64 - 1, size=1, transport=_worker.TRANSPORT_SINGLE
        )
        refusal(lambda: worker.stub.JoinGroup(request, timeout=5), "INVALID_ARGUMENT", "epoch")

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"rank": 1}, ("rank = 1", "size is 1")),
            ({"rank": 7, "size": 2}, ("rank = 7", "size is 2")),
            ({"size": 0}, ("rank = 0", "size is 0")),
            ({"size": 2}, ("transport = 'single'", "size is 2")),
            ({"transport": 0}, ("transport = 0",)),
            ({"transport": UNKNOWN_TRANSPORT}, ("transport = 9",)),
            ({"timeout_s": math.nan}, ("timeout_s = nan",)),
            ({"timeout_s": math.inf}, ("timeout_s = inf",)),
            ({"timeout_s": -1.0}, ("timeout_s = -1.0",)),
            (
                {"size": 2, "transport": 2, "communicator_id": b"colrow-../../etc"},
                ("communicator_id",),
            ),
            ({"size": 2, "transport": 2, "communicator_id": b"\xff\x00"}, ("communicator_id",)),
            (
                {"size": 2, "rank": 1, "transport": 3, "communicator_id": b"nowhere"},
                ("communicator_id",),
            ),
            (
                {"size": 2, "rank": 1, "transport": 3, "communicator_id": b"127.0.0.1:99999"},
                ("communicator_id",),
            ),
        ],
        ids=str,
    )
    def test_a_group_that_can_not_be(
        self, fields: dict[str, Any], words: Sequence[str], worker: Worker
    ) -> None:
        refusal(lambda: worker.join(**fields), "INVALID_ARGUMENT", *words)
        assert worker.state == "IDLE"

    def test_an_epoch_that_has_been(self, worker: Worker) -> None:
        worker.join()
        worker.abort()
        for epoch in (worker.epoch, worker.epoch - 1, 0):
            info = refusal(
                partial(worker.join, epoch=epoch),
                "FAILED_PRECONDITION",
                f"epoch = {epoch}",
                f"seen epoch {worker.epoch}",
            )
            assert info.reason == "STALE_EPOCH"

    def test_a_group_beside_another(self, worker: Worker) -> None:
        worker.join()
        now = worker.epoch
        refusal(
            lambda: worker.join(), "FAILED_PRECONDITION", f"the group of epoch {now}", "abort it"
        )
        assert worker.state == "JOINED"

    def test_peers_of_a_group_that_has_none(self, worker: Worker) -> None:
        request = _worker.ConnectPeersRequest(peer_memories=[b""], timeout_s=1.0)
        refusal(
            lambda: worker.stub.ConnectPeers(request, timeout=5), "FAILED_PRECONDITION", "epoch = 0"
        )
        worker.join()
        request.epoch = worker.epoch
        refusal(
            lambda: worker.stub.ConnectPeers(request, timeout=5),
            "FAILED_PRECONDITION",
            "transport is single, not peer",
        )

    @pytest.mark.parametrize("transport", [4, 5], ids=["nccl", "peer"])
    def test_a_transport_of_gpus_on_a_cpu(self, transport: int, worker: Worker) -> None:
        refusal(
            lambda: worker.join(transport=transport, size=2, communicator_id=b"0" * 140),
            "INVALID_ARGUMENT",
            "worker is on cpu",
        )

    @pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
    @pytest.mark.parametrize("transport", [4, 5], ids=["nccl", "peer"])
    def test_an_id_of_gpus_from_a_cpu(self, transport: int, worker: Worker) -> None:
        info = refusal(
            lambda: worker.join(transport=transport, size=2), "UNAVAILABLE", "without CUDA; install"
        )
        assert info.reason == "COMMUNICATOR_FAILED"
        assert worker.state == "IDLE"

    @pytest.mark.parametrize("transport", [2, 3], ids=["shm", "gloo"])
    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_peer_that_never_comes_is_named_in_time(
        self, rank: int, transport: int, worker: Worker
    ) -> None:
        """Meanwhile the worker answers; afterwards it joins another group."""
        group = {"rank": rank, "size": 3, "transport": transport, "timeout_s": 1.0}
        if transport == 2 or rank == 0:
            communicator_id = worker.join(**group).communicator_id
        else:
            with socket.socket() as unused:
                unused.bind(("127.0.0.1", 0))
                communicator_id = f"127.0.0.1:{unused.getsockname()[1]}".encode()
        missing = "ranks 1, 2" if rank == 0 else "rank 0"
        began = time.monotonic()
        with ThreadPoolExecutor(1) as threads:
            joining = threads.submit(
                refusal,
                lambda: worker.join(communicator_id=communicator_id, **group),
                "DEADLINE_EXCEEDED",
                f"join: {missing} not there within 1 s",
            )
            while not joining.done():
                check_health(worker.address)
                assert worker.state == "IDLE"
                time.sleep(0.1)
        assert joining.result().reason == "PEER_TIMEOUT"
        assert 1.0 <= time.monotonic() - began < 6.0


class TestLoading:
    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"model_path": "/nowhere"}, ("model_path = '/nowhere'", "no folder")),
            ({"model_path": "/" + "x" * 5000}, ("model_path = '/xxx", "no folder")),
            (
                {"config_json": '{"architectures": ["LlamaForCausalLM"]}'},
                ("config_json", "no model can be built of it", "KeyError"),
            ),
            (
                {
                    "config_json": '{"architectures": ["LlamaForCausalLM"], "hidden_size": 0.5, '
                    '"num_hidden_layers": "x", "num_attention_heads": 1}'
                },
                ("config_json", "no model can be built of it", "TypeError"),
            ),
            ({"config_json": "{"}, ("config_json = '{'",)),
            ({"config_json": "[" * 100_000}, ("config_json",)),
            ({"config_json": "[]"}, ("config_json = '[]'", "no JSON object")),
            (
                {"config_json": '{"architectures": ["BertModel"]}'},
                ("config.architectures = 'BertModel'", *FAMILIES),
            ),
            ({"config_json": '{"architectures": []}'}, ("config.architectures = None",)),
            ({"data_type": tensor_pb2.DATA_TYPE_INT64}, ("data_type = 4",)),
            ({"data_type": 0}, ("data_type = 0",)),
            ({"ranks": []}, ("ranks = 0", "1 ranks")),
            ({"parameters": []}, ("checkpoint", "unexpected")),
        ],
        ids=lambda value: str(value)[:60],
    )
    def test_a_shard_that_can_not_be(
        self, fields: dict[str, Any], words: Sequence[str], worker: Worker
    ) -> None:
        worker.join()
        refusal(lambda: worker.load(**fields), "INVALID_ARGUMENT", *words)
        assert worker.state == "JOINED"
        worker.load()
        assert worker.state == "LOADED"

    def test_a_cache_of_nothing(self, worker: Worker) -> None:
        worker.join()
        worker.load()
        refusal(lambda: worker.allocate(num_blocks=0), "INVALID_ARGUMENT", "num_blocks = 0")
        refusal(lambda: worker.allocate(block_size=0), "INVALID_ARGUMENT", "block_size = 0")
        assert worker.state == "LOADED"

    @pytest.mark.parametrize("block_size", [2**20, 2**32 - 1])
    def test_a_cache_beyond_all_memory(self, block_size: int, worker: Worker) -> None:
        worker.join()
        worker.load()
        refusal(
            lambda: worker.allocate(num_blocks=2**32 - 1, block_size=block_size),
            "RESOURCE_EXHAUSTED",
            "num_blocks = 4294967295",
            "bytes",
            "cpu is out of memory (weights ",
        )
        assert worker.state == "LOADED"
        worker.allocate()


class TestSteps:
    @pytest.mark.parametrize("step_ids", [(0,), (2,), (1, 1), (1, 3), (1, 2, 1)])
    def test_a_gap_in_step_ids_is_refused(self, step_ids: Sequence[int], worker: Worker) -> None:
        worker.make_ready()
        answered: list[int] = []

        def run() -> None:
            requests = [step(number, epoch=worker.epoch) for number in step_ids]
            for response in worker.stub.ExecuteSteps(iter(requests), timeout=20):
                answered.append(response.step_id)

        wanted = len(step_ids)
        info = refusal(
            run, "FAILED_PRECONDITION", f"step_id = {step_ids[-1]}", f"the next step is {wanted}"
        )
        assert info.reason == "STEP_GAP"
        assert answered == list(step_ids[:-1]), "steps before the gap are answered"

    @pytest.mark.parametrize(
        ("new", "chunks", "words"),
        [
            ([], [chunk(9, 1, [0])], ("chunks[9]", "is not known")),
            (
                [sequence(2, PROMPT)],
                [chunk(2, 4, [0])],
                ("chunks[2].num_tokens = 4", "3 tokens are left"),
            ),
            ([sequence(2, PROMPT)], [chunk(2, 0, [0])], ("chunks[2].num_tokens = 0",)),
            (
                [sequence(2, PROMPT)],
                [chunk(2, 3, [8])],
                ("chunks[2].new_block_ids = 8", "8 blocks"),
            ),
            (
                [sequence(2, PROMPT)],
                [chunk(2, 3)],
                ("chunks[2].new_block_ids = []", "3 tokens need more blocks"),
            ),
            (
                [sequence(2, PROMPT)],
                [chunk(2, 1, [0]), chunk(2, 2)],
                ("chunks[2]", "two chunks in one step"),
            ),
            (
                [sequence(2, [5, VOCAB_SIZE])],
                [chunk(2, 2, [0])],
                ("new_sequences[2].token_ids = 331", "331 ids"),
            ),
            ([sequence(1, PROMPT)], [], ("new_sequences[1]", "is known already")),
            ([sequence(2, PROMPT), sequence(2, PROMPT)], [], ("new_sequences[2]", "known already")),
            ([sequence(2, [])], [], ("new_sequences[2].num_prompt_tokens = 0", "0 tokens")),
            ([sequence(2, PROMPT, 4)], [], ("new_sequences[2].num_prompt_tokens = 4", "3 tokens")),
        ],
        ids=[
            "unknown sequence",
            "chunk too long",
            "empty chunk",
            "block outside the cache",
            "too few blocks",
            "two chunks",
            "token outside the vocabulary",
            "known sequence",
            "new twice",
            "no tokens",
            "more prompt than tokens",
        ],
    )
    def test_a_step_that_does_not_fit_is_refused_before_it_runs(
        self,
        new: Sequence[_worker.NewSequence],
        chunks: Sequence[_worker.ScheduledChunk],
        words: Sequence[str],
        worker: Worker,
    ) -> None:
        worker.make_ready()
        tokens = worker.execute(
            step(1, new=[sequence(1, PROMPT)], chunks=[chunk(1, 3, [7])]),
        )[0].token_ids
        refusal(lambda: worker.execute(step(2, new=new, chunks=chunks)), "INVALID_ARGUMENT", *words)
        assert worker.state == "READY"
        # The sequence that was there is none the worse for it.
        (after,) = worker.execute(step(3, chunks=[chunk(1, 1)]))
        assert [*tokens, *after.token_ids] == worker.model.expected[:2]


@pytest.mark.parametrize(
    ("module", "num_inputs", "num_outputs"),
    [
        ("model.norm", 72, 72),
        ("model.layers.0.self_attn.q_proj", 72, 72),
        ("model.layers.0.mlp.gate_proj", 72, 104),
        ("model.layers.0.mlp.down_proj", 104, 72),
        ("model.layers.0.mlp", 72, 72),
        ("lm_head", 72, VOCAB_SIZE),
    ],
)
def test_an_output_that_the_caller_does_not_take_is_not_computed(
    module: str, num_inputs: int, num_outputs: int, worker: Worker
) -> None:
    worker.make_ready()
    fields: dict[str, Any] = {"module": module, "activation": floats(3, num_inputs)}
    size = 3 * num_outputs * 4
    answer = worker.compute(**fields, max_output_bytes=size)
    assert len(answer.output.data) == size
    for limit in (size - 1, 0):
        info = refusal(
            partial(worker.compute, **fields, max_output_bytes=limit),
            "RESOURCE_EXHAUSTED",
            f"over {limit} bytes",
        )
        assert info.reason == "ANSWER_TOO_LARGE"
    assert len(worker.compute(**fields).output.data) == size


def test_errors_of_the_small_client_are_the_contracts(own_pool: WorkerPool) -> None:
    """A code, a reason and what it is about, free of gRPC."""
    (address,) = own_pool.addresses(1)
    with Colrow(address) as client, pytest.raises(ServiceError) as raised:
        client.model()  # a worker serves no InferenceService
    assert raised.value.code == "UNIMPLEMENTED"
    with grpc.insecure_channel(address) as channel:
        stub = shard_worker_service_pb2_grpc.ShardWorkerServiceStub(channel)
        with pytest.raises(grpc.RpcError) as failed:
            stub.JoinGroup(_worker.JoinGroupRequest(transport=UNKNOWN_TRANSPORT), timeout=5)
    error = error_of(failed.value)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert error.metadata == {"field": "transport", "value": "9"}
