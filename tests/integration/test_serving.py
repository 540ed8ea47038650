"""The demo model through a real cluster: right answers, streams, cancellation, and how it all ends."""

import contextlib
import json
import random
import signal
import socket
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from client import Colrow, Piece
from colrow.errors import ServiceError, Unavailable
from colrow.v1 import (
    control_service_pb2,
    inference_service_pb2,
    shard_plan_pb2,
    tensor_pb2,
)
from coordinator.cost_model import predicted_step
from coordinator.families import model_spec
from coordinator.model_spec import Axis
from coordinator.shard_plan import ShardPlan, make_plan
from coordinator.tokenizer import ChatMessage, Tokenizer
from tests import checkpoints
from tests.clusters import (
    RunningCluster,
    Service,
    WorkerPool,
    cluster,
    start_coordinator,
    wait_until_serving,
)
from tests.pulse import LONGEST_PAUSE_S, Pulse

pytestmark = pytest.mark.timeout(120)

NUM_TOKENS = 64
TIMEOUT_S = 60.0
SOON_S = 5.0
"""For what should take a step, when the machine has other things to do."""

END_OF_TURN = 2  # <|im_end|>

STORY = [{"role": "user", "content": "Tell me a long story about a lighthouse keeper and the sea."}]
SKY = [{"role": "user", "content": "Explain in detail why the sky is blue."}]
CAPITAL = [{"role": "user", "content": "Name the capital of France."}]

COORDINATOR_SERVICES = ("colrow.v1.InferenceService", "colrow.v1.ControlService")
WORKER_SERVICES = ("colrow.v1.ShardWorkerService",)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

Chat = list[dict[str, str]]


def tokens(pieces: Iterator[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


def text(pieces: Iterator[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def leave(stream: Iterator[object]) -> None:
    """Ends an iteration before its end, which cancels the call."""
    assert isinstance(stream, Generator)
    stream.close()


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = SOON_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


def is_idle(running: RunningCluster) -> bool:
    """Whether no request is left and no block is lost."""
    state = running.client.cluster().scheduler
    return (state.kv_blocks_used, state.running, state.waiting) == (0, 0, 0)


@pytest.fixture(scope="module")
def tokenizer(demo_model_folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(demo_model_folder)
    assert tokenizer is not None
    return tokenizer


def chat_ids(tokenizer: Tokenizer, chat: Chat) -> list[int]:
    return tokenizer.encode_chat(ChatMessage(m["role"], m["content"]) for m in chat)


# Right answers


@pytest.fixture(scope="module")
def expected(demo_model_folder: Path, tokenizer: Tokenizer) -> list[tuple[Chat, list[int]]]:
    """What transformers continues two chats with, in float32."""
    model = checkpoints.oracle(demo_model_folder)
    return [
        (chat, checkpoints.greedy(model, chat_ids(tokenizer, chat), NUM_TOKENS))
        for chat in (STORY, SKY)
    ]


def float32(
    pool: WorkerPool, model: Path, tp: int
) -> contextlib.AbstractContextManager[RunningCluster]:
    """A cluster whose arithmetic hardly depends on the split and on who else is in the batch."""
    return cluster(pool, model, tp, "--dtype", "float32")


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_greedy_tokens_in_float32_are_those_of_transformers_alone_and_batched(
    tp: int,
    expected: list[tuple[Chat, list[int]]],
    demo_model_folder: Path,
    worker_pool: WorkerPool,
) -> None:
    with float32(worker_pool, demo_model_folder, tp) as served:

        def generate(chat: Chat) -> list[int]:
            return tokens(served.client.generate(chat, max_tokens=NUM_TOKENS, temperature=0))

        (story, of_story), (sky, of_sky) = expected
        assert generate(story) == of_story
        with ThreadPoolExecutor(3) as threads:
            # One more, which ends earlier, so that the batch is not made of these two alone.
            assert list(threads.map(generate, (story, CAPITAL, sky)))[::2] == [of_story, of_sky]


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd_and_another_seed_another(
    demo_model_folder: Path, worker_pool: WorkerPool
) -> None:
    with float32(worker_pool, demo_model_folder, 2) as served:

        def generate(seed: int) -> str:
            return text(
                served.client.generate(
                    STORY, max_tokens=24, temperature=0.9, top_k=50, top_p=0.95, seed=seed
                )
            )

        alone = generate(7)
        with ThreadPoolExecutor(6) as threads:
            crowd = list(threads.map(generate, (1, 2, 7, 3, 7, 4)))
        assert crowd[2] == crowd[4] == alone
        assert len(set(crowd)) == 5


# Serving


@pytest.fixture(scope="class")
def running(demo_model_folder: Path, worker_pool: WorkerPool) -> Iterator[RunningCluster]:
    with cluster(worker_pool, demo_model_folder, 2) as running:
        yield running


class TestGenerate:
    def test_a_real_question_gets_its_answer(self, running: RunningCluster) -> None:
        assert "Paris" in text(running.client.generate(CAPITAL, max_tokens=32, temperature=0))

    def test_a_prompt_may_be_text_or_token_ids(
        self, running: RunningCluster, tokenizer: Tokenizer
    ) -> None:
        prompt = "The capital of France is"
        answers = [
            text(running.client.generate(given, max_tokens=8, temperature=0))
            for given in (prompt, tokenizer.encode(prompt))
        ]
        assert answers[0] == answers[1]
        assert answers[0].startswith(" ")  # it goes on from the prompt
        assert "Paris" in answers[0]

    def test_text_comes_piece_by_piece_while_it_is_generated(self, running: RunningCluster) -> None:
        arrived, pieces = [], []
        began = time.monotonic()
        for piece in running.client.generate(STORY, max_tokens=40, temperature=0):
            arrived.append(time.monotonic() - began)
            pieces.append(piece)
        assert len(pieces) > 20  # a slow reader may find a few tokens together
        assert sum(len(piece.token_ids) for piece in pieces) == 40
        assert arrived[0] < arrived[-1] / 2
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]

    def test_the_end_of_a_turn_ends_with_stop_and_the_counts_are_right(
        self, running: RunningCluster, tokenizer: Tokenizer
    ) -> None:
        pieces = list(running.client.generate(CAPITAL, max_tokens=64, temperature=0))
        got = tokens(iter(pieces))
        assert pieces[-1].finish_reason == "stop"
        assert got[-1] == END_OF_TURN
        assert END_OF_TURN not in got[:-1]
        assert pieces[-1].prompt_tokens == len(chat_ids(tokenizer, CAPITAL))
        assert pieces[-1].completion_tokens == len(got)
        assert {piece.completion_tokens for piece in pieces[:-1]} == {0}
        answer = text(iter(pieces))
        assert answer == tokenizer.decode(got, skip_special_tokens=True)
        assert "<|im_end|>" not in answer

    def test_a_request_id_is_said_back_and_drawn_where_there_is_none(
        self, running: RunningCluster
    ) -> None:
        def ids(request_id: str) -> set[str]:
            request = inference_service_pb2.GenerateRequest(
                request_id=request_id, text="Once", max_tokens=3
            )
            return {r.request_id for r in running.client.inference.Generate(request, timeout=10)}

        assert ids("mine") == {"mine"}
        (first,), (second,) = ids(""), ids("")
        assert first
        assert second
        assert first != second

    def test_other_calls_are_answered_while_a_stream_runs_and_do_not_disturb_it(
        self, running: RunningCluster
    ) -> None:
        alone = text(running.client.generate(STORY, max_tokens=48, temperature=0))
        stream = running.client.generate(STORY, max_tokens=48, temperature=0)
        beside = next(stream).text
        for layer in range(3):
            assert len(running.client.run_layer(layer=layer, module="mlp").runs) == 1
        running.client.tokenize("beside it")
        assert running.client.cluster().scheduler.running == 1  # it is not over yet
        assert beside + text(stream) == alone

    def test_cancelling_frees_the_blocks_within_a_step(self, running: RunningCluster) -> None:
        stream = running.client.generate(STORY, temperature=0)
        for _ in range(3):
            next(stream)
        assert running.client.cluster().scheduler.kv_blocks_used > 0
        leave(stream)
        eventually(lambda: is_idle(running), "no blocks in use")
        steps = running.client.cluster().scheduler.steps
        time.sleep(0.2)
        assert running.client.cluster().scheduler.steps == steps

    def test_a_deadline_of_the_client_frees_the_blocks_too(self, running: RunningCluster) -> None:
        with pytest.raises(ServiceError) as caught:
            for _ in running.client.generate(STORY, temperature=0, timeout_s=0.5):
                pass
        assert caught.value.code == "DEADLINE_EXCEEDED"
        eventually(lambda: is_idle(running), "no blocks in use")

    def test_many_streams_of_mixed_lengths_all_finish_and_leave_nothing(
        self, running: RunningCluster
    ) -> None:
        generator = random.Random(5)
        requests = [
            (
                [generator.randrange(3, 49152) for _ in range(generator.randint(1, 120))],
                generator.randint(1, 24),
            )
            for _ in range(32)
        ]

        def generate(request: tuple[list[int], int]) -> list[Piece]:
            prompt, max_tokens = request
            return list(
                running.client.generate(
                    prompt, max_tokens=max_tokens, temperature=0.7, seed=1, timeout_s=TIMEOUT_S
                )
            )

        before = running.client.cluster().scheduler
        with ThreadPoolExecutor(len(requests)) as threads:
            results = list(threads.map(generate, requests))
        for (prompt, max_tokens), pieces in zip(requests, results, strict=True):
            got = tokens(iter(pieces))
            stopped = got[-1] == END_OF_TURN
            assert pieces[-1].finish_reason == ("stop" if stopped else "length")
            assert stopped or len(got) == max_tokens
            assert pieces[-1].prompt_tokens == len(prompt)
            assert pieces[-1].completion_tokens == len(got)
        after = running.client.cluster().scheduler
        assert is_idle(running)
        assert after.prompt_tokens - before.prompt_tokens == sum(len(p) for p, _ in requests)
        assert after.generated_tokens - before.generated_tokens == sum(
            pieces[-1].completion_tokens for pieces in results
        )
        # They ran together: one after the other would have taken a step a token.
        assert after.steps - before.steps < (after.generated_tokens - before.generated_tokens) / 4

    def test_streams_that_are_cancelled_at_any_moment_leave_nothing(
        self, running: RunningCluster
    ) -> None:
        def generate(seed: int) -> None:
            stream = running.client.generate(STORY, temperature=1, seed=seed)
            for _ in range(seed % 5):
                next(stream)
            leave(stream)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(generate, range(24)))
        eventually(lambda: is_idle(running), "no blocks in use")
        assert "Paris" in text(running.client.generate(CAPITAL, max_tokens=32, temperature=0))

    @pytest.mark.parametrize("num_tokens", [150, 512, 4096])
    def test_an_answer_that_no_message_could_carry_is_refused_and_harms_nobody(
        self, num_tokens: int, running: RunningCluster
    ) -> None:
        """Of 150 tokens each rank could send its logits, of 4096 none."""
        before = running.client.cluster()
        with (
            Pulse(running.target) as pulse,
            pytest.raises(ServiceError, match="send fewer tokens") as refused,
        ):
            running.client.run_layer(module="lm_head", num_tokens=num_tokens)
        assert pulse.longest_s < LONGEST_PAUSE_S
        assert (refused.value.code, refused.value.reason) == (
            "RESOURCE_EXHAUSTED",
            "ANSWER_TOO_LARGE",
        )
        assert running.client.run_layer(module="lm_head", num_tokens=1).runs
        now = running.client.cluster()
        assert now.recoveries == before.recoveries
        assert [w.error for w in now.workers] == [w.error for w in before.workers]


# The other calls


def expected_plan(plan: ShardPlan) -> shard_plan_pb2.ShardPlan:
    """The message of a plan, spelled out."""
    spec = plan.spec
    axes = {
        Axis.Q_HEADS: shard_plan_pb2.AXIS_Q_HEADS,
        Axis.KV_HEADS: shard_plan_pb2.AXIS_KV_HEADS,
        Axis.MLP: shard_plan_pb2.AXIS_MLP,
        Axis.VOCAB: shard_plan_pb2.AXIS_VOCAB,
    }
    return shard_plan_pb2.ShardPlan(
        family=spec.family,
        architecture=spec.architecture,
        tp_size=plan.tp_size,
        data_type=f"DATA_TYPE_{plan.dtype.upper()}",
        ranks=[
            shard_plan_pb2.RankShard(
                rank=rank,
                ranges=[
                    shard_plan_pb2.AxisRange(axis=number, start=span.start, stop=span.stop)
                    for axis, number in axes.items()
                    for span in [plan.range(axis, rank)]
                ],
                weight_bytes=plan.ranks[rank].weight_bytes,
                kv_bytes_per_token=plan.ranks[rank].kv_bytes_per_token,
            )
            for rank in range(plan.tp_size)
        ],
        checkpoint_bytes=plan.checkpoint_bytes,
        replicated_bytes=plan.replicated_bytes,
        all_reduce_bytes_per_token=plan.all_reduce_bytes_per_token,
        all_reduce_bytes_per_token_per_layer=plan.all_reduce_bytes_per_token_per_layer,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_q_heads=spec.num_q_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
    )


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}


class TestOtherCalls:
    @pytest.mark.parametrize(
        "given", ["Hello, world!", "  two  spaces ", "Grüße 🇨🇭 日本語", "<|im_start|>user\nhi"]
    )
    def test_tokenize_and_detokenize_are_inverse(
        self, running: RunningCluster, tokenizer: Tokenizer, given: str
    ) -> None:
        request = inference_service_pb2.TokenizeRequest(text=given)
        response = running.client.inference.Tokenize(request, timeout=10)
        assert list(response.token_ids) == tokenizer.encode(given)
        assert len(response.tokens) == len(response.token_ids)
        if given.isascii():
            assert "".join(response.tokens) == given
        assert running.client.detokenize(response.token_ids) == given

    def test_a_chat_is_tokenized_as_it_is_generated_from(
        self, running: RunningCluster, tokenizer: Tokenizer
    ) -> None:
        request = inference_service_pb2.TokenizeRequest()
        request.chat.messages.add(role="user", content=CAPITAL[0]["content"])
        response = running.client.inference.Tokenize(request, timeout=10)
        assert list(response.token_ids) == chat_ids(tokenizer, CAPITAL)

    def test_special_tokens_are_left_out_on_request(self, running: RunningCluster) -> None:
        ids = running.client.tokenize("<|im_start|>hi<|im_end|>")
        assert running.client.detokenize(ids) == "<|im_start|>hi<|im_end|>"
        assert running.client.detokenize(ids, skip_special_tokens=True) == "hi"

    def test_the_model_says_what_it_is(
        self, running: RunningCluster, demo_model_folder: Path
    ) -> None:
        config = json.loads((demo_model_folder / "config.json").read_text())
        assert running.client.model() == inference_service_pb2.GetModelResponse(
            model=demo_model_folder.name,
            family="llama",
            architecture="LlamaForCausalLM",
            data_type=tensor_pb2.DATA_TYPE_BFLOAT16,
            context_length=config["max_position_embeddings"],
            vocab_size=config["vocab_size"],
            tp_size=2,
            eos_token_ids=[END_OF_TURN],
            has_chat_template=True,
            num_parameters=134_515_008,
        )

    def test_another_model_is_not_found(self, running: RunningCluster) -> None:
        request = inference_service_pb2.GetModelRequest(model="gpt-5")
        with pytest.raises(grpc.RpcError) as caught:
            running.client.inference.GetModel(request, timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]

    @pytest.mark.parametrize("tp", [1, 2, 5])
    def test_a_dry_run_of_the_served_model_is_the_plan(
        self, running: RunningCluster, demo_model_folder: Path, tp: int
    ) -> None:
        spec = model_spec(json.loads((demo_model_folder / "config.json").read_text()))
        request = control_service_pb2.PlanShardsRequest(tp_size=tp)
        response = running.client.control.PlanShards(request, timeout=10)
        assert response.plan == expected_plan(make_plan(spec, tp))
        if tp == 2:
            assert response.plan == running.client.cluster().plan
        predicted = predicted_step(make_plan(spec, tp))
        assert predicted is not None
        assert response.prediction.hardware == "NVIDIA H200, NVLink"
        assert response.prediction.context_tokens == 128
        assert response.prediction.step_s == predicted.seconds
        assert response.prediction.communication_s == predicted.communication_s
        assert response.prediction.num_all_reduces == (0 if tp == 1 else 61)
        assert response.prediction.all_reduce_s == predicted.all_reduce.seconds
        assert response.prediction.all_reduce_algorithm == ("" if tp == 1 else "one_shot")

    def test_a_dry_run_of_another_model_takes_its_config_type_and_weights(
        self, running: RunningCluster
    ) -> None:
        request = control_service_pb2.PlanShardsRequest(
            config_json=json.dumps(LLAMA_8B),
            tp_size=3,
            data_type=tensor_pb2.DATA_TYPE_FLOAT32,
            memory_weights=[24, 80, 80],
        )
        plan = make_plan(
            model_spec(LLAMA_8B), 3, dtype="float32", memory_weights=[24.0, 80.0, 80.0]
        )
        response = running.client.control.PlanShards(request, timeout=10)
        assert response.plan == expected_plan(plan)
        assert not response.HasField("prediction"), "there are no figures of float32"

    def test_a_watch_repeats_itself_at_its_interval(self, running: RunningCluster) -> None:
        began = time.monotonic()
        watch = running.client.watch(interval_s=0.1)
        states = [next(watch) for _ in range(5)]
        leave(watch)
        assert 0.3 < time.monotonic() - began < SOON_S
        assert {state.state for state in states} == {control_service_pb2.CLUSTER_STATE_SERVING}
        assert {len(state.workers) for state in states} == {2}


@dataclass(frozen=True)
class Endpoint:
    """A server of the cluster and its own services."""

    address: str
    services: tuple[str, ...]


@pytest.fixture(params=["coordinator", "worker 0", "worker 1"])
def endpoint(request: pytest.FixtureRequest, running: RunningCluster) -> Endpoint:
    if request.param == "coordinator":
        return Endpoint(running.target, COORDINATOR_SERVICES)
    worker = running.client.cluster().workers[int(request.param[-1])]
    return Endpoint(worker.address, WORKER_SERVICES)


@pytest.fixture
def channel(endpoint: Endpoint) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(endpoint.address) as channel:
        yield channel


class TestStandardServices:
    def test_health_is_serving_for_the_server_and_each_service(
        self, endpoint: Endpoint, channel: grpc.Channel
    ) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", *endpoint.services):
            request = health_pb2.HealthCheckRequest(service=service)
            assert stub.Check(request, timeout=10).status == SERVING
            watch = stub.Watch(request, timeout=10)
            assert next(watch).status == SERVING
            watch.cancel()

    def test_reflection_lists_the_services_and_describes_them(
        self, endpoint: Endpoint, channel: grpc.Channel
    ) -> None:
        database = ProtoReflectionDescriptorDatabase(channel)
        listed = set(database.get_services())
        assert listed == {
            *endpoint.services,
            "grpc.health.v1.Health",
            "grpc.channelz.v1.Channelz",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        # A client that has no protos finds the methods, and the messages that they take.
        pool = DescriptorPool(database)
        for service in endpoint.services:
            methods = pool.FindServiceByName(service).methods
            assert len(methods) >= 5
            for method in methods:
                assert method.input_type.full_name == f"colrow.v1.{method.name}Request"

    def test_channelz_knows_the_server_and_its_calls(self, channel: grpc.Channel) -> None:
        stub = channelz_pb2_grpc.ChannelzStub(channel)
        response = stub.GetServers(channelz_pb2.GetServersRequest(), timeout=10)
        assert len(response.server) == 1
        assert response.server[0].data.calls_started > 0


# Coming up and ending


@contextlib.contextmanager
def suspended(service: Service) -> Iterator[None]:
    """A process that does not run for a while."""
    service.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        service.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def coordinator(pool: WorkerPool, model: Path) -> Iterator[tuple[Service, Colrow]]:
    """A coordinator that need not serve yet, and may end in any way."""
    service = start_coordinator(model, pool.addresses(2))
    try:
        with Colrow(service.address) as client:
            yield service, client
    finally:
        service.process.kill()
        service.process.wait()
    service.log.unlink()


class TestComingUp:
    def test_it_is_not_serving_until_every_rank_is_ready_and_says_how_far_it_is(
        self, demo_model_folder: Path, worker_pool: WorkerPool
    ) -> None:
        worker_pool.addresses(2)
        with contextlib.ExitStack() as stack:
            with suspended(worker_pool.services[1]):
                service, client = stack.enter_context(coordinator(worker_pool, demo_model_folder))
                channel = stack.enter_context(grpc.insecure_channel(service.address))
                stub = health_pb2_grpc.HealthStub(channel)
                watches = [
                    stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S)
                    for name in ("", *COORDINATOR_SERVICES)
                ]
                assert [next(watch).status for watch in watches] == [NOT_SERVING] * 3
                states = client.watch()
                assert next(states).state == control_service_pb2.CLUSTER_STATE_CONNECTING
                with pytest.raises(Unavailable, match="the cluster is connecting") as caught:
                    next(client.generate("Too early", max_tokens=1))
                assert caught.value.retry_after_s
                assert client.model().tp_size == 2  # known before
                assert client.tokenize("so are tokens")
            assert [next(watch).status for watch in watches] == [SERVING] * 3
            seen = []
            for state in states:
                if state.state not in seen:
                    seen.append(state.state)
                if state.state == control_service_pb2.CLUSTER_STATE_SERVING:
                    break
            progress = {(w.bytes_read, w.bytes_to_read) for w in state.workers}
        assert seen == [
            control_service_pb2.CLUSTER_STATE_JOINING,
            control_service_pb2.CLUSTER_STATE_LOADING,
            control_service_pb2.CLUSTER_STATE_SERVING,
        ]
        assert all(read == to_read for read, to_read in progress)


def read_until_error(stream: Iterator[Piece]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        for _ in stream:
            pass
    return caught.value


class TestEnding:
    @pytest.mark.parametrize(
        "numbers",
        [(signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM)],
        ids=("SIGINT", "SIGTERM twice"),
    )
    def test_a_signal_ends_it_in_seconds_and_a_new_one_takes_the_workers_at_once(
        self,
        numbers: tuple[signal.Signals, ...],
        demo_model_folder: Path,
        worker_pool: WorkerPool,
    ) -> None:
        with coordinator(worker_pool, demo_model_folder) as (service, client):
            wait_until_serving(service, client)
            watch = client.watch()
            next(watch)
            stream = client.generate(STORY, temperature=0)
            next(stream)
            began = time.monotonic()
            for number in numbers:
                service.process.send_signal(number)
                time.sleep(0.2)
            assert read_until_error(stream).code == "UNAVAILABLE"
            assert service.process.wait(10) == 0, service.log.read_text()
            assert time.monotonic() - began < 8
            log = service.log.read_text()
            assert "Traceback" not in log, log
        with cluster(worker_pool, demo_model_folder, 2) as running:
            assert "Paris" in text(running.client.generate(CAPITAL, max_tokens=32, temperature=0))

    def test_sigterm_lets_what_runs_finish_and_refuses_what_is_new(
        self, demo_model_folder: Path, worker_pool: WorkerPool
    ) -> None:
        with coordinator(worker_pool, demo_model_folder) as (service, client):
            wait_until_serving(service, client)
            stream = client.generate(STORY, max_tokens=60, ignore_eos=True, temperature=0)
            got = [*next(stream).token_ids]
            service.process.send_signal(signal.SIGTERM)
            states = client.watch()
            while next(states).state != control_service_pb2.CLUSTER_STATE_DRAINING:
                pass
            states.close()
            with pytest.raises(Unavailable) as caught:
                list(client.generate(STORY, max_tokens=5))
            assert caught.value.reason == "DRAINING"
            assert caught.value.retry_after_s
            assert len(got + tokens(stream)) == 60
            assert service.process.wait(10) == 0, service.log.read_text()

    def test_a_drain_answers_when_nothing_runs_any_more(
        self, demo_model_folder: Path, worker_pool: WorkerPool
    ) -> None:
        with coordinator(worker_pool, demo_model_folder) as (service, client):
            wait_until_serving(service, client)
            stream = client.generate(STORY, max_tokens=40, ignore_eos=True, temperature=0)
            got = [*next(stream).token_ids]
            drained = client.control.Drain.future(control_service_pb2.DrainRequest(), timeout=60)
            got += tokens(stream)
            assert len(got) == 40
            drained.result()
            with pytest.raises(Unavailable):
                list(client.generate(STORY, max_tokens=5))
            assert service.process.poll() is None  # it is told to stop apart from that

    def test_after_a_kill_a_new_one_takes_the_workers_at_once(
        self, demo_model_folder: Path, worker_pool: WorkerPool
    ) -> None:
        with coordinator(worker_pool, demo_model_folder) as (service, client):
            wait_until_serving(service, client)
            stream = client.generate(STORY, temperature=0)
            next(stream)
            service.process.kill()
            assert read_until_error(stream).code == "UNAVAILABLE"
        began = time.monotonic()
        with cluster(worker_pool, demo_model_folder, 2) as running:
            assert time.monotonic() - began < 15
            assert "Paris" in text(running.client.generate(CAPITAL, max_tokens=32, temperature=0))

    def test_after_a_kill_while_it_loads_a_new_one_loads_anew(
        self, demo_model_folder: Path, worker_pool: WorkerPool
    ) -> None:
        with float32(worker_pool, demo_model_folder, 2):
            pass  # what the workers hold now is of another type
        with coordinator(worker_pool, demo_model_folder) as (service, client):
            loading = control_service_pb2.CLUSTER_STATE_LOADING
            assert any(state.state == loading for state in client.watch())
            service.process.kill()
        with cluster(worker_pool, demo_model_folder, 2) as running:
            assert "Paris" in text(running.client.generate(CAPITAL, max_tokens=32, temperature=0))

    def test_one_that_is_told_to_stop_before_it_serves_stops(
        self, demo_model_folder: Path, worker_pool: WorkerPool
    ) -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            addresses = [*worker_pool.addresses(1), f"127.0.0.1:{nobody.getsockname()[1]}"]
            service = start_coordinator(demo_model_folder, addresses)
            assert service.stop() == 0
        service.log.unlink()
