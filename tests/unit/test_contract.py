"""The contract: protos by buf's STANDARD rules, typed stubs, and errors that survive the wire.

The rules are those of https://buf.build/docs/lint/rules that are about descriptors.
"""

import ast
import asyncio
import importlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.resources import files
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import (
    Descriptor,
    EnumDescriptor,
    FileDescriptor,
    MethodDescriptor,
    ServiceDescriptor,
)
from google.protobuf.descriptor_pb2 import FileDescriptorProto

import colrow.errors
import colrow.v1
from colrow.errors import BY_CODE, InvalidArgument, NotFound, ServiceError
from colrow.rpc import CHANNEL_OPTIONS, SERVER_OPTIONS, Server, error_of
from colrow.v1 import (
    control_service_pb2,
    inference_service_pb2,
    inference_service_pb2_grpc,
    sampling_pb2,
    shard_plan_pb2,
    shard_worker_service_pb2,
    shard_worker_service_pb2_grpc,
    tensor_pb2,
)

pytestmark = pytest.mark.timeout(60)

PACKAGE = "colrow.v1"
FILES: list[FileDescriptor] = [
    module.DESCRIPTOR
    for module in (
        control_service_pb2,
        inference_service_pb2,
        sampling_pb2,
        shard_plan_pb2,
        shard_worker_service_pb2,
        tensor_pb2,
    )
]
SERVICES: dict[str, set[str]] = {
    "InferenceService": {"Generate", "Score", "Tokenize", "Detokenize", "GetModel"},
    "ControlService": {
        "GetCluster",
        "WatchCluster",
        "PlanShards",
        "RunLayer",
        "TimeCommunication",
        "Drain",
    },
    "ShardWorkerService": {
        *("Describe", "JoinGroup", "ConnectPeers", "LoadShard", "AllocateKvCache"),
        *("ExecuteSteps", "ComputePartial", "AbortGroup"),
    },
}

PASCAL_CASE = re.compile(r"([A-Z][a-z0-9]*)+")
LOWER_SNAKE_CASE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
UPPER_SNAKE_CASE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")


def proto(file: FileDescriptor) -> FileDescriptorProto:
    return FileDescriptorProto.FromString(file.serialized_pb)


def messages() -> Iterator[Descriptor]:
    def nested(message: Descriptor) -> Iterator[Descriptor]:
        yield message
        for inner in message.nested_types:
            yield from nested(inner)

    for file in FILES:
        for message in file.message_types_by_name.values():
            yield from nested(message)


def enums() -> Iterator[EnumDescriptor]:
    for file in FILES:
        yield from file.enum_types_by_name.values()
    for message in messages():
        yield from message.enum_types


def services() -> Iterator[ServiceDescriptor]:
    for file in FILES:
        yield from file.services_by_name.values()


def methods() -> Iterator[MethodDescriptor]:
    for service in services():
        yield from service.methods


def upper_snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()


def test_every_proto_of_the_package_is_looked_at() -> None:
    found = {file.name for file in files(colrow.v1).iterdir() if file.name.endswith(".proto")}
    assert {file.name for file in FILES} == {f"colrow/v1/{name}" for name in found}


def test_files_lie_where_their_package_says_in_lower_snake_case() -> None:
    for file in FILES:
        folder, _, name = file.name.rpartition("/")
        assert file.package == PACKAGE
        assert folder == PACKAGE.replace(".", "/")
        assert LOWER_SNAKE_CASE.fullmatch(name.removesuffix(".proto"))
        assert proto(file).syntax == "proto3"


def test_imports_are_plain_and_used() -> None:
    for file in FILES:
        assert not proto(file).public_dependency
        assert not proto(file).weak_dependency
        used = {
            of.file.name
            for message in messages()
            if message.file.name == file.name
            for field in message.fields
            if (of := field.message_type or field.enum_type)
        }
        assert {imported.name for imported in file.dependencies} == used - {file.name}


def test_services_and_their_rpcs_are_those_that_were_promised() -> None:
    assert {s.name: {m.name for m in s.methods} for s in services()} == SERVICES
    for service in services():
        assert PASCAL_CASE.fullmatch(service.name)
        assert service.name.endswith("Service")


def test_every_rpc_has_a_request_and_a_response_of_its_own_named_after_it() -> None:
    for method in methods():
        assert PASCAL_CASE.fullmatch(method.name)
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"
    names = [t.full_name for m in methods() for t in (m.input_type, m.output_type)]
    assert len(set(names)) == len(names)


def test_the_calls_that_stream_are_those_that_were_promised() -> None:
    streams = {
        method.name: (method.client_streaming, method.server_streaming)
        for method in methods()
        if method.client_streaming or method.server_streaming
    }
    assert streams == {
        "Generate": (False, True),
        "WatchCluster": (False, True),
        "LoadShard": (False, True),
        "ExecuteSteps": (True, True),
    }


def test_enums_begin_with_unspecified_and_values_with_the_enums_name() -> None:
    for enum in enums():
        assert PASCAL_CASE.fullmatch(enum.name)
        prefix = upper_snake(enum.name)
        first, *others = enum.values
        assert (first.name, first.number) == (f"{prefix}_UNSPECIFIED", 0)
        for value in others:
            assert UPPER_SNAKE_CASE.fullmatch(value.name)
            assert value.name.startswith(f"{prefix}_")
            assert not value.name.endswith("_UNSPECIFIED")
        assert len({value.number for value in enum.values}) == len(enum.values)  # no aliases


def test_messages_are_in_pascal_case_and_fields_in_lower_snake_case() -> None:
    for message in messages():
        assert PASCAL_CASE.fullmatch(message.name)
        for field in message.fields:
            assert LOWER_SNAKE_CASE.fullmatch(field.name), field.full_name
        for oneof in message.oneofs:
            # A field that may be unset is a oneof of its own, which protoc names.
            assert LOWER_SNAKE_CASE.fullmatch(oneof.name.removeprefix("_")), oneof.full_name


# Stubs


def test_stubs_are_typed() -> None:
    folder = files(colrow.v1)
    assert files(colrow).joinpath("py.typed").is_file()
    for file in FILES:
        name = file.name.rpartition("/")[2].removesuffix(".proto")
        defined = classes(folder.joinpath(f"{name}_pb2.pyi").read_text())
        assert defined >= {*file.message_types_by_name, *file.enum_types_by_name}
        if file.services_by_name:
            defined = classes(folder.joinpath(f"{name}_pb2_grpc.pyi").read_text())
            assert defined >= {
                f"{service}{kind}"
                for service in file.services_by_name
                for kind in ("Stub", "Servicer")
            }


def classes(source: str) -> set[str]:
    return {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("service", SERVICES)
def test_stubs_and_servicers_have_every_rpc(service: str) -> None:
    module = importlib.import_module(f"colrow.v1.{upper_snake(service).lower()}_pb2_grpc")
    servicer = getattr(module, f"{service}Servicer")
    stub = getattr(module, f"{service}Stub")(grpc.insecure_channel("localhost:1"))
    for method in SERVICES[service]:
        assert callable(getattr(servicer, method))
        assert callable(getattr(stub, method))


# Errors over a real server


class Failing(
    inference_service_pb2_grpc.InferenceServiceServicer,
    shard_worker_service_pb2_grpc.ShardWorkerServiceServicer,
):
    """Every kind of call there is, each raising what it is told to; streams after one response."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.closed = 0

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    async def GetModel(self, request: Any, context: Any) -> Any:
        self._fail()
        return inference_service_pb2.GetModelResponse(model="here")

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            yield inference_service_pb2.GenerateResponse(text="first")
            self._fail()
        finally:
            self.closed += 1

    async def ExecuteSteps(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for request in request_iterator:
            yield shard_worker_service_pb2.ExecuteStepsResponse(step_id=request.step_id)
            self._fail()


@pytest.fixture
async def failing() -> AsyncIterator[tuple[Failing, grpc.aio.Channel]]:
    server = Server(["colrow.v1.InferenceService", "colrow.v1.ShardWorkerService"])
    servicer = Failing()  # type: ignore[abstract]
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.grpc_server)
    shard_worker_service_pb2_grpc.add_ShardWorkerServiceServicer_to_server(
        servicer, server.grpc_server
    )
    port = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        yield servicer, channel
    await server.stop(0)


async def unary(channel: grpc.aio.Channel) -> None:
    stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
    await stub.GetModel(inference_service_pb2.GetModelRequest(), timeout=10)


async def stream(channel: grpc.aio.Channel) -> None:
    stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
    async for response in stub.Generate(inference_service_pb2.GenerateRequest(), timeout=10):
        assert response.text == "first"


async def both_ways(channel: grpc.aio.Channel) -> None:
    stub = shard_worker_service_pb2_grpc.ShardWorkerServiceStub(channel)
    call = stub.ExecuteSteps(timeout=10)
    await call.write(shard_worker_service_pb2.ExecuteStepsRequest(step_id=7))
    await call.done_writing()
    async for response in call:
        assert response.step_id == 7


CALLS = [unary, stream, both_ways]
Call = Callable[[grpc.aio.Channel], Any]

ERRORS = [
    *(
        kind("a message — in Unicode ✓", reason="OF_ITS_OWN", metadata={"field": "x", "value": "ü"})
        for kind in BY_CODE.values()
    ),
    NotFound("without more"),
    InvalidArgument("sampling.top_p", 1.5, "is not in (0, 1]"),
    colrow.errors.Unavailable("soon", retry_after_s=1.25),
    ServiceError("anything", retry_after_s=0.001),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_arrives_as_it_was_raised(
    error: ServiceError, call: Call, failing: tuple[Failing, grpc.aio.Channel]
) -> None:
    servicer, channel = failing
    servicer.error = error
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel)
    got = error_of(caught.value)
    assert str(got) == got.message == error.message
    assert (got.code, got.reason, got.metadata) == (error.code, error.reason, error.metadata)
    assert got.retry_after_s == error.retry_after_s
    if error.code in BY_CODE:
        assert type(got) is BY_CODE[error.code]


async def test_a_client_that_blocks_gets_the_same_errors(
    failing: tuple[Failing, grpc.aio.Channel],
) -> None:
    servicer, _ = failing
    server = Server(["colrow.v1.InferenceService"])
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.grpc_server)
    port = await server.start("127.0.0.1:0")

    def call() -> ServiceError:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.GetModel(inference_service_pb2.GetModelRequest(), timeout=10)
            return error_of(caught.value)

    servicer.error = colrow.errors.ResourceExhausted("full", metadata={"a": "b"}, retry_after_s=3)
    got = await asyncio.to_thread(call)
    await server.stop(0)
    assert (got.code, got.reason, got.metadata, got.retry_after_s, got.message) == (
        "RESOURCE_EXHAUSTED", "EXHAUSTED", {"a": "b"}, 3.0, "full",
    )  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
async def test_a_value_error_is_the_callers_fault_and_a_bug_is_not(
    call: Call, failing: tuple[Failing, grpc.aio.Channel]
) -> None:
    servicer, channel = failing
    for error, code, message in (
        (ValueError("tp_size = 7: too many"), "INVALID_ARGUMENT", "tp_size = 7: too many"),
        (KeyError("lost"), "INTERNAL", "KeyError: 'lost'"),
        (AssertionError("never"), "INTERNAL", "AssertionError: never"),
    ):
        servicer.error = error
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel)
        got = error_of(caught.value)
        assert (got.code, got.message) == (code, message)
    # The server has survived all of them.
    servicer.error = None
    await call(channel)


async def test_what_a_stream_holds_is_freed_when_its_client_leaves(
    failing: tuple[Failing, grpc.aio.Channel],
) -> None:
    servicer, channel = failing
    stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
    call = stub.Generate(inference_service_pb2.GenerateRequest())
    async for _ in call:
        call.cancel()
        break
    async with asyncio.timeout(5):
        while not servicer.closed:
            await asyncio.sleep(0.01)


def test_servers_allow_the_pings_that_clients_send() -> None:
    """A connection that pings more often than the server allows is ended ("too many pings")."""
    server, client = dict(SERVER_OPTIONS), dict(CHANNEL_OPTIONS)
    allowed_ms = server["grpc.http2.min_ping_interval_without_data_ms"]
    assert allowed_ms < client["grpc.keepalive_time_ms"]


async def test_a_port_in_use_is_refused_by_its_address() -> None:
    first, second = Server([]), Server([])
    port = await first.start("127.0.0.1:0")
    with pytest.raises(InvalidArgument, match=f"address = '127.0.0.1:{port}': .*in use"):
        await second.start(f"127.0.0.1:{port}")
    await first.stop(0)


def test_a_long_value_is_shown_in_part() -> None:
    error = InvalidArgument("config_json", "x" * 100_000, "is no JSON object")
    assert len(error.message) < 300
    assert error.metadata["field"] == "config_json"
    assert isinstance(error, ValueError)
