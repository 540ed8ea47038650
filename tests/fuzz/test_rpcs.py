"""Every RPC of every service, with fields of any value and bytes of any kind, against a live cluster."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import strategies as st

from colrow.errors import Unavailable
from colrow.v1 import (
    shard_worker_service_pb2,
    shard_worker_service_pb2_grpc,
    tensor_pb2,
)
from coordinator.convert import workers
from coordinator.families import model_spec
from coordinator.shard_plan import make_plan
from tests.clusters import start
from tests.fuzz.victim import (
    BUDGET,
    DEADLINE_S,
    LEAKED_MIB,
    NUM_TOKENS,
    PROMPT,
    Call,
    Cluster,
    Held,
    Tally,
    calls,
    examine,
    log_of,
    make,
)
from tests.fuzz.wire import EPOCH, STEP, Rpc, rpcs

pytestmark = pytest.mark.timeout(600 * max(1.0, BUDGET))

_worker = shard_worker_service_pb2

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
SMALL = st.integers(0, 8)
MODULES = (
    *("model.embed_tokens", "model.norm", "lm_head", "model", "model.layers", "model.layers.1"),
    *("model.layers.0.self_attn", "model.layers.0.mlp.down_proj", "mlp.up_proj", "self_attn", ""),
    *("model.layers.0.self_attn.q_proj.weight", "mlp.last", "__class__", "model.layers.99.mlp"),
)


def configs(folder: Path) -> st.SearchStrategy[str]:
    """config.json files that are nearly right."""
    config = json.loads((folder / "config.json").read_text())
    number = st.sampled_from((0, 1, 2, 3, 8, 4096, 2**31 - 1, 2**63, -1, 0.5, 1e308))
    changes = st.dictionaries(st.sampled_from(sorted(config)), number | JSON, max_size=3)
    return changes.map(lambda changed: json.dumps(config | changed))


def hints(folder: Path, **further: Any) -> dict[str, st.SearchStrategy[Any]]:
    """Values that lead deeper than random ones."""
    unit = st.floats(0, 1, width=32)
    return {
        "model": st.sampled_from(("", "tiny")),
        "ids": st.integers(0, 330),
        "token_ids": st.integers(0, 330),
        "role": st.sampled_from(("user", "assistant", "system")),
        "module": st.sampled_from(MODULES),
        "layer": SMALL,
        "num_tokens": SMALL,
        "num_steps": SMALL,
        "tokens_per_step": SMALL,
        "max_tokens": SMALL,
        "n": st.sampled_from((1, 2, 128)),
        "tp_size": st.sampled_from((1, 2, 3, 1024)),
        "config_json": configs(folder),
        "model_path": st.just(str(folder)),
        "temperature": unit,
        "top_p": unit,
        "shape": st.sampled_from((1, 2, 72, 104)),
        "data": st.sampled_from((bytes(4 * 72), bytes(8), b"\xff" * 288)),
        "service": st.sampled_from(("colrow.v1.InferenceService", "")),
        **further,
    }


@pytest.fixture
def channel(cluster: Cluster) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(cluster.coordinator.address) as opened:
        yield opened


# Drain is for good; it has a test of its own.
LASTING = {"Drain"}


def test_every_rpc_of_the_coordinator(
    cluster: Cluster, channel: grpc.Channel, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [rpc for rpc in rpcs(channel) if rpc.name not in LASTING]
    assert {rpc.service.rpartition(".")[2] for rpc in found} >= {
        *("InferenceService", "ControlService", "Health", "ServerReflection", "Channelz"),
    }
    deeper = hints(cluster.folder)
    tally = Tally()
    failures: list[Exception] = []
    with cluster.without_leaks():
        for rpc in found:

            def check(call: Call, rpc: Rpc = rpc) -> None:
                make(channel, rpc, call, tally)
                cluster.check()

            num_cases = 60 if rpc.service.startswith("colrow.") else 12
            try:
                examine(calls(rpc, deeper), num_cases, check)
            except Exception as error:
                failures.append(error)
        if failures:
            raise ExceptionGroup("RPCs", failures)
    with capsys.disabled():
        print(f"\n{tally.codes.total()} calls of {len(found)} RPCs of the coordinator: {tally}")


NEAR_EPOCH = st.integers(EPOCH - 1, EPOCH + 1)
NEAR_STEP = st.integers(STEP - 1, STEP + 1)

WORKERS_OWN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.DATA_LOSS)


def test_every_rpc_of_a_worker_that_serves(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calls that the coordinator alone should make: the cluster recovers from what they break."""
    tally, recoveries = Tally(), cluster.client.cluster().epoch
    failures: list[Exception] = []
    with (
        grpc.insecure_channel(cluster.workers[1].address) as channel,
        cluster.without_leaks(),
    ):
        found = rpcs(channel)
        deeper = hints(cluster.folder, epoch=NEAR_EPOCH, step_id=NEAR_STEP)
        for rpc in found:

            def check(call: Call, rpc: Rpc = rpc) -> None:
                state = cluster.client.cluster()
                step = state.workers[1].last_step_id + 1
                make(channel, rpc, call.at(state.epoch, step), tally, *WORKERS_OWN)
                cluster.check()

            num_cases = 30 if rpc.service.startswith("colrow.") else 5
            try:
                examine(calls(rpc, deeper), num_cases, check)
            except Exception as error:
                failures.append(error)
        if failures:
            raise ExceptionGroup("RPCs", failures)
    recoveries = cluster.client.cluster().epoch - recoveries
    with capsys.disabled():
        print(
            f"\n{tally.codes.total()} calls of {len(found)} RPCs of a worker that serves, "
            f"{recoveries} recoveries: {tally}"
        )


def test_a_group_that_is_aborted_from_outside_forms_anew_and_streams_go_on(
    cluster: Cluster,
) -> None:
    def tokens(num_aborts: int) -> list[int]:
        got: list[int] = []
        for piece in cluster.client.generate(PROMPT, max_tokens=40, temperature=0, timeout_s=60):
            got += piece.token_ids
            if len(got) in range(10, 10 + num_aborts):
                epoch = cluster.client.cluster().epoch
                for worker in cluster.workers:
                    with grpc.insecure_channel(worker.address) as channel:
                        stub = shard_worker_service_pb2_grpc.ShardWorkerServiceStub(channel)
                        with contextlib.suppress(grpc.RpcError):  # of the epoch after it already
                            stub.AbortGroup(_worker.AbortGroupRequest(epoch=epoch), timeout=5)
        return got

    undisturbed = tokens(0)
    epoch = cluster.client.cluster().epoch
    with cluster.without_leaks():
        assert tokens(1) == undisturbed
        assert cluster.client.cluster().epoch > epoch


def test_calls_that_are_left_as_they_are_refused_are_no_bugs(cluster: Cluster) -> None:
    with (
        cluster.without_leaks(),
        grpc.insecure_channel(cluster.workers[0].address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        worker = shard_worker_service_pb2_grpc.ShardWorkerServiceStub(channel)
        unknown = health_pb2.HealthCheckRequest(service="x")
        for turn in range(1000):
            timeout_s = 0.0002 + turn % 20 * 0.0001
            asked = (
                health.Check.future(unknown, timeout=timeout_s),
                worker.AllocateKvCache.future(_worker.AllocateKvCacheRequest(), timeout=timeout_s),
            )
            time.sleep(turn % 10 * 0.0001)
            for call in asked:
                call.cancel()


def test_drain_of_any_kind_and_the_coordinator_after_it(
    folder: Path, expected: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Draining is for good: a new coordinator takes the workers, and they answer as before."""
    drained = Cluster(folder, expected)
    tally = Tally()
    try:
        with grpc.insecure_channel(drained.coordinator.address) as channel:
            (rpc,) = (rpc for rpc in rpcs(channel) if rpc.name in LASTING)
            drained.check()
            examine(calls(rpc, {}), 30, lambda call: make(channel, rpc, call, tally))
        with pytest.raises(Unavailable) as refused:
            drained.check()
        assert refused.value.reason == "DRAINING"
        drained.client.close()
        assert drained.coordinator.stop() == 0
        drained.coordinator.log.unlink()
        drained.start()
        drained.check()
    finally:
        drained.stop()
    with capsys.disabled():
        print(f"\n{tally.codes.total()} calls of Drain: {tally}")


# How far a worker is led before a call that belongs there.
STAGES = {"JoinGroup": 0, "LoadShard": 1, "AllocateKvCache": 2}


class Led:
    """A worker alone, led by hand through what a coordinator does."""

    def __init__(self, channel: grpc.Channel, folder: Path) -> None:
        self.stub = shard_worker_service_pb2_grpc.ShardWorkerServiceStub(channel)
        config = (folder / "config.json").read_text()
        self._plan = make_plan(model_spec(json.loads(config)), 1)
        self._load = workers.load_request(0, folder, config, self._plan, "safetensors")
        self.epoch = 0

    def requests(self, epoch: int) -> dict[str, list[Any]]:
        """What leads to a worker that is ready, and makes it work, by RPC."""
        sampling = _worker.StepSampling(temperature=0, top_p=1, repetition_penalty=1)
        sequence = _worker.NewSequence(
            sequence_id=1, token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=sampling
        )
        first = _worker.ScheduledChunk(
            sequence_id=1, num_tokens=len(PROMPT), new_block_ids=range(8)
        )
        later = _worker.ScheduledChunk(sequence_id=1, num_tokens=1)
        load = _worker.LoadShardRequest()
        load.CopyFrom(self._load)
        load.epoch = epoch
        return {
            "JoinGroup": [
                _worker.JoinGroupRequest(
                    epoch=epoch, size=1, transport=_worker.TRANSPORT_SINGLE, timeout_s=1
                )
            ],
            "LoadShard": [load],
            "AllocateKvCache": [
                _worker.AllocateKvCacheRequest(epoch=epoch, num_blocks=128, block_size=4)
            ],
            "ExecuteSteps": [
                _worker.ExecuteStepsRequest(
                    epoch=epoch, step_id=1, new_sequences=[sequence], chunks=[first]
                ),
                *(
                    _worker.ExecuteStepsRequest(epoch=epoch, step_id=step_id, chunks=[later])
                    for step_id in range(2, NUM_TOKENS + 1)
                ),
            ],
            "ComputePartial": [
                _worker.ComputePartialRequest(
                    epoch=epoch,
                    module="model.norm",
                    activation=tensor_pb2.Tensor(
                        data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[1, 72], data=bytes(288)
                    ),
                )
            ],
            "AbortGroup": [_worker.AbortGroupRequest(epoch=epoch)],
        }

    def lead(self, stages: int = 4) -> list[int]:
        """A group of a new epoch, and so many stages of its life; the tokens of the last."""
        worker = self.stub.Describe(_worker.DescribeRequest(), timeout=5).worker
        if worker.size:
            abort = _worker.AbortGroupRequest(epoch=worker.epoch)
            self.stub.AbortGroup(abort, timeout=DEADLINE_S)
        self.epoch = worker.epoch + 1
        asked = self.requests(self.epoch)
        if stages > 0:
            self.stub.JoinGroup(asked["JoinGroup"][0], timeout=DEADLINE_S)
        if stages > 1:
            list(self.stub.LoadShard(asked["LoadShard"][0], timeout=DEADLINE_S))
        if stages > 2:
            self.stub.AllocateKvCache(asked["AllocateKvCache"][0], timeout=DEADLINE_S)
        if stages < 4:
            return []
        answers = self.stub.ExecuteSteps(iter(asked["ExecuteSteps"]), timeout=DEADLINE_S)
        return [token for answer in answers for token in answer.token_ids]


def test_every_rpc_of_a_worker_in_any_state(
    folder: Path, expected: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Requests that are nearly right, as no coordinator would make them, before and after joining."""
    service = start("worker", "shard_worker", "--port", "0")
    service.wait_for_port()
    tally = Tally()
    failures: list[Exception] = []
    try:
        with grpc.insecure_channel(service.address) as channel:
            led = Led(channel, folder)
            assert led.lead() == expected
            before = Held.of(service)
            found = [rpc for rpc in rpcs(channel) if rpc.service.startswith("colrow.")]
            timeout = st.sampled_from((0.0, 0.1, 0.5))
            deeper = hints(folder, epoch=NEAR_EPOCH, timeout_s=timeout, step_id=SMALL)
            asked = led.requests(EPOCH)
            for rpc in found:
                bases = [request.SerializeToString() for request in asked.get(rpc.name, ())]

                def check(case: tuple[int, Call], rpc: Rpc = rpc) -> None:
                    stages, call = case
                    led.lead(stages)
                    late = grpc.StatusCode.DEADLINE_EXCEEDED  # other ranks did not join
                    make(channel, rpc, call.at(led.epoch, 1), tally, *WORKERS_OWN, late)
                    assert service.process.poll() is None, log_of(service)
                    assert led.lead() == expected

                try:
                    stage = st.sampled_from((0, 1, 2, 3, *(STAGES.get(rpc.name, 3),) * 4))
                    examine(st.tuples(stage, calls(rpc, deeper, bases)), 60, check)
                except Exception as error:
                    failures.append(error)
            if failures:
                raise ExceptionGroup("RPCs", failures)
            assert led.lead() == expected
            after = Held.of(service)
            assert after.num_fds <= before.num_fds + 4, (before, after)
            assert after.num_threads <= before.num_threads + 4, (before, after)
            assert after.resident_mib <= before.resident_mib + LEAKED_MIB, (before, after)
            assert "Traceback" not in log_of(service), log_of(service)
    finally:
        assert service.stop() == 0
        service.log.unlink()
    with capsys.disabled():
        print(f"\n{tally.codes.total()} calls of {len(found)} RPCs of a worker alone: {tally}")
