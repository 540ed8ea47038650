"""The Python client: what it puts on the wire, what it makes of answers, and how it ends calls."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

import client
from client.grpc_client import AsyncColrow, Colrow, Piece, Score, Settings, TokenLogprobs
from colrow.errors import ServiceError, Unavailable
from colrow.v1 import (
    control_service_pb2,
    control_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    sampling_pb2,
)

_pb = inference_service_pb2

TOP = sampling_pb2.TokenLogprobs(
    token_id=5, logprob=-0.5, rank=2, top_token_ids=[9, 5], top_logprobs=[-0.25, -0.5]
)


class Servicer(inference_service_pb2_grpc.InferenceServiceServicer):
    """Keeps what it was asked and gives what it was told to."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.responses = [_pb.GenerateResponse(finish_reason=_pb.FINISH_REASON_STOP)]
        self.endless = False
        self.error: tuple[grpc.StatusCode, str] | None = None
        self.cancelled = threading.Event()

    def Generate(  # type: ignore[override]
        self, request: _pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[_pb.GenerateResponse]:
        self.asked.append(request)
        context.add_callback(self.cancelled.set)
        yield from self.responses
        if self.error is not None:
            context.abort(*self.error)
        while self.endless and context.is_active():
            yield _pb.GenerateResponse(text="more")
            self.cancelled.wait(0.01)

    def Score(self, request: _pb.ScoreRequest, context: object) -> _pb.ScoreResponse:  # type: ignore[override]
        self.asked.append(request)
        scores = [
            _pb.TokenScores(tokens=[TOP] * (len(s.ids) - 1), logprob=-0.5 * (len(s.ids) - 1))
            for s in request.sequences
        ]
        return _pb.ScoreResponse(sequences=scores)

    def Tokenize(self, request: _pb.TokenizeRequest, context: object) -> _pb.TokenizeResponse:  # type: ignore[override]
        self.asked.append(request)
        return _pb.TokenizeResponse(token_ids=[1, 2])


class ControlServicer(control_service_pb2_grpc.ControlServiceServicer):
    def WatchCluster(self, request: object, context: object) -> Iterator[object]:  # type: ignore[override]
        for epoch in (1, 2):
            yield control_service_pb2.WatchClusterResponse(
                cluster=control_service_pb2.Cluster(epoch=epoch)
            )


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
def target(servicer: Servicer) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    control_service_pb2_grpc.add_ControlServiceServicer_to_server(ControlServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture
def colrow(target: str) -> Iterator[Colrow]:
    with Colrow(target) as made:
        yield made


ALL: Settings = {
    "max_tokens": 5,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.75,
    "min_p": 0.125,
    "seed": 2**63,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.25,
    "logit_bias": {3: -1.5, 4: 2.0},
    "stop": ["a", "b"],
    "stop_token_ids": (7, 8),
    "include_stop": True,
    "ignore_eos": True,
    "n": 2,
    "logprobs": 0,
    "prompt_logprobs": 1,
    "priority": -4,
    "request_id": "mine",
    "show_special_tokens": True,
}


def test_every_field_of_the_contract_can_be_set(colrow: Colrow, servicer: Servicer) -> None:
    list(colrow.generate([4, 5], **ALL))
    wanted = _pb.GenerateRequest(
        request_id="mine",
        token_ids=_pb.TokenIds(ids=[4, 5]),
        sampling=sampling_pb2.SamplingParams(
            temperature=0.5,
            top_k=3,
            top_p=0.75,
            seed=2**63,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.25,
            logit_bias={3: -1.5, 4: 2.0},
        ),
        max_tokens=5,
        min_tokens=2,
        ignore_eos=True,
        stop=["a", "b"],
        stop_token_ids=[7, 8],
        include_stop=True,
        n=2,
        logprobs=0,
        prompt_logprobs=1,
        priority=-4,
        show_special_tokens=True,
    )
    assert servicer.asked == [wanted]
    named = {field.name for field, _ in wanted.ListFields()} - {"sampling", "token_ids"}
    sampled = {field.name for field, _ in wanted.sampling.ListFields()}
    assert named | sampled == set(ALL), "the contract has a field that the client lacks"
    missing = set(_pb.GenerateRequest.DESCRIPTOR.fields_by_name) - named
    assert missing == {"model", "text", "token_ids", "chat", "sampling"}
    assert sampled == set(sampling_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


def test_what_is_not_given_or_none_is_left_to_the_server(
    colrow: Colrow, servicer: Servicer
) -> None:
    list(colrow.generate("hi"))
    list(colrow.generate("hi", temperature=None, stop=None, n=None, seed=None))
    assert servicer.asked == [_pb.GenerateRequest(text="hi")] * 2


def test_prompts_are_texts_token_ids_or_chats(colrow: Colrow, servicer: Servicer) -> None:
    chat = [{"role": "user", "content": "hi"}]
    for prompt in ("", [], chat):
        list(colrow.generate(prompt))
    assert [request.WhichOneof("prompt") for request in servicer.asked] == [  # type: ignore[attr-defined]
        *("text", "token_ids", "chat")
    ]
    colrow.tokenize("hi")
    colrow.tokenize(chat)
    messages = _pb.Chat(messages=[_pb.ChatMessage(role="user", content="hi")])
    assert servicer.asked[3:] == [
        _pb.TokenizeRequest(text="hi"),
        _pb.TokenizeRequest(chat=messages),
    ]


def test_one_stop_text_is_not_taken_for_its_characters(colrow: Colrow, servicer: Servicer) -> None:
    list(colrow.generate("hi", stop="END"))
    assert servicer.asked == [_pb.GenerateRequest(text="hi", stop=["END"])]


def test_a_setting_that_is_none_of_the_contract_is_named(colrow: Colrow) -> None:
    with pytest.raises(TypeError, match="no setting 'temprature'"):
        list(colrow.generate("hi", temprature=1))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="seed = -1"):
        list(colrow.generate("hi", seed=-1))


def test_pieces_have_all_that_a_response_has(colrow: Colrow, servicer: Servicer) -> None:
    servicer.responses = [
        _pb.GenerateResponse(
            request_id="r", text="a", token_ids=[5], index=1, logprobs=[TOP], prompt_logprobs=[TOP]
        ),
        _pb.GenerateResponse(
            index=1, finish_reason=_pb.FINISH_REASON_STOP, stop_text="END", request_id="r"
        ),
        _pb.GenerateResponse(
            finish_reason=_pb.FINISH_REASON_STOP,
            stop_token_id=0,
            usage=_pb.Usage(prompt_tokens=3, completion_tokens=4, cached_prompt_tokens=2),
        ),
    ]
    top = TokenLogprobs(5, -0.5, 2, ((9, -0.25), (5, -0.5)))
    assert list(colrow.generate("hi")) == [
        Piece("a", (5,), index=1, logprobs=(top,), prompt_logprobs=(top,), request_id="r"),
        Piece("", (), "stop", index=1, stop_reason="END", request_id="r"),
        Piece("", (), "stop", 3, 4, 2, stop_reason=0),
    ]


def test_score_gives_tokens_and_sums(colrow: Colrow, servicer: Servicer) -> None:
    top = TokenLogprobs(5, -0.5, 2, ((9, -0.25), (5, -0.5)))
    assert colrow.score([[1, 2, 3], (4,)], 2, priority=1) == [
        Score((top, top), -1.0),
        Score((), 0.0),
    ]
    assert servicer.asked == [
        _pb.ScoreRequest(
            sequences=[_pb.TokenIds(ids=[1, 2, 3]), _pb.TokenIds(ids=[4])],
            top_logprobs=2,
            priority=1,
        )
    ]


def test_leaving_the_iteration_cancels(colrow: Colrow, servicer: Servicer) -> None:
    servicer.endless = True
    pieces = colrow.generate("hi")
    next(pieces)
    pieces.close()
    assert servicer.cancelled.wait(5)


def test_errors_are_those_of_the_service(colrow: Colrow, servicer: Servicer) -> None:
    servicer.error = (grpc.StatusCode.UNAVAILABLE, "gone")
    pieces = colrow.generate("hi")
    assert next(pieces).finish_reason == "stop"
    with pytest.raises(Unavailable, match="gone"):
        next(pieces)


async def test_the_asynchronous_client_does_the_same(target: str, servicer: Servicer) -> None:
    async with AsyncColrow(target) as colrow:
        pieces = [piece async for piece in colrow.generate([4, 5], **ALL)]
        assert [piece.finish_reason for piece in pieces] == ["stop"]
        with Colrow(target) as other:
            list(other.generate([4, 5], **ALL))
        assert servicer.asked[0] == servicer.asked[1]
        assert (await colrow.cluster_as_known()).epoch == 1, "the first of what is watched"

        servicer.endless = True
        stream = colrow.generate("hi")
        assert await anext(stream)
        servicer.cancelled.clear()
        await stream.aclose()
        assert servicer.cancelled.wait(5)

        servicer.endless = False
        servicer.error = (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        with pytest.raises(ServiceError, match="full") as raised:
            [piece async for piece in colrow.generate("hi")]
        assert raised.value.code == "RESOURCE_EXHAUSTED"


def test_the_package_gives_the_client_and_nothing_else() -> None:
    assert client.Colrow is Colrow
    assert client.AsyncColrow is AsyncColrow
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        client.nothing  # noqa: B018


@pytest.mark.parametrize("slow", ["grpc", "numpy", "torch", "prompt_toolkit", "google.protobuf"])
def test_help_does_not_wait_for_what_it_does_not_need(slow: str) -> None:
    code = f"import client, client.cli, sys; sys.exit({slow!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_server_that_takes_half_a_second_to_accept_is_connected_to(target: str) -> None:
    """As on a busy machine, or far away."""
    host, _, port = target.partition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def forward(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):  # one side is closed in the end
                while data := source.recv(65536):
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)

        def relay() -> None:
            near, _ = listener.accept()
            time.sleep(0.5)
            with near, socket.create_connection((host, int(port))) as far:
                back = threading.Thread(target=forward, args=(far, near))
                back.start()
                forward(near, far)
                back.join()

        thread = threading.Thread(target=relay)
        thread.start()
        with Colrow(f"127.0.0.1:{listener.getsockname()[1]}") as slow:
            assert slow.tokenize("hi") == [1, 2]
        thread.join(10)
        assert not thread.is_alive()
