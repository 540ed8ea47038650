"""Requests of any shape, drawn from the contract's own descriptors and written byte by byte.

A message object of protobuf can't hold what a careless or a hostile client may send: text that is no
UTF-8, two members of one `oneof`, a field twice, an end in the midst of a field. So payloads are encoded
here (https://protobuf.dev/programming-guides/encoding). A new field or a new RPC is drawn as any other.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

Hints = Mapping[str, SearchStrategy[Any]]
"""By the name of a field: values that lead deeper than random ones would. Half of all draws."""

EPOCH = 2**40  # stands for the epoch of the moment, and so do the numbers beside it for theirs
STEP = 2**41  # likewise for the step that comes next

MAX_DEPTH = 4
MANY = 20_000  # entries of a field that is repeated beyond reason
LONG = 100_000  # bytes of a text that is

NUMBERS = (
    *(0, 1, 2, 3, 7, 16, 255, 4096, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**53),
    *(2**63 - 1, 2**63, 2**64 - 1),
)
FLOATS = (0.0, -0.0, 1e-45, 0.5, 1.0, -1.0, 2.5, 3e38, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    *("", "a", " ", "0", "\0", "\n", "../../../etc/passwd", "%s%n{0}", "\u202e", "\ufffd", "{"),
    *("é" * 300, "😀", "x" * LONG, "[" * 5000, '{"a":' * 5000),
)
NO_TEXTS = (b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80" * 40)

_F = FieldDescriptor
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRE_TYPES = {
    _F.TYPE_FIXED64: _FIXED64,
    _F.TYPE_SFIXED64: _FIXED64,
    _F.TYPE_DOUBLE: _FIXED64,
    _F.TYPE_FIXED32: _FIXED32,
    _F.TYPE_SFIXED32: _FIXED32,
    _F.TYPE_FLOAT: _FIXED32,
    _F.TYPE_STRING: _BYTES,
    _F.TYPE_BYTES: _BYTES,
    _F.TYPE_MESSAGE: _BYTES,
}
"""Others are varints."""


@dataclass(frozen=True)
class Rpc:
    """A method that a server says it has."""

    service: str
    name: str
    request: Descriptor
    client_streaming: bool
    server_streaming: bool

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


def rpcs(channel: grpc.Channel) -> list[Rpc]:
    """All methods of all services of a server, as its reflection lists them."""
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    (answer,) = stub.ServerReflectionInfo(iter([asked]), timeout=10)
    pool = descriptor_pool.Default()
    found = []
    for service in answer.list_services_response.service:
        for method in pool.FindServiceByName(service.name).methods:
            streaming = (method.client_streaming, method.server_streaming)
            found.append(Rpc(service.name, method.name, method.input_type, *streaming))
    return found


def _varint(value: int) -> bytes:
    value %= 2**64
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def _tagged(number: int, wire_type: int, data: bytes) -> bytes:
    length = _varint(len(data)) if wire_type == _BYTES else b""
    return _varint(number << 3 | wire_type) + length + data


def _scalar(draw: DrawFn, field: FieldDescriptor, hints: Hints) -> bytes:
    """The bytes of one value, without tag and length."""
    hint = hints.get(field.name)
    if hint is not None and draw(st.booleans()):
        value = draw(hint)
    elif field.type == _F.TYPE_STRING:
        value = draw(st.sampled_from(TEXTS) | st.text(max_size=20) | st.sampled_from(NO_TEXTS))
    elif field.type == _F.TYPE_BYTES:
        value = draw(st.binary(max_size=64))
    elif field.type in (_F.TYPE_FLOAT, _F.TYPE_DOUBLE):
        value = draw(st.sampled_from(FLOATS) | st.floats(width=32))
    elif field.enum_type is not None:
        known = [value.number for value in field.enum_type.values]
        value = draw(st.sampled_from((*known, max(known) + 1, 99, 2**31 - 1, -1)))
    else:
        value = draw(st.sampled_from(NUMBERS) | st.integers(0, 400))
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return value
    match _WIRE_TYPES.get(field.type, _VARINT):
        case 1:
            return struct.pack("<d", value)
        case 5:
            return struct.pack("<f", value)
    return _varint(value)


def _field(draw: DrawFn, field: FieldDescriptor, hints: Hints, depth: int) -> bytes:
    wire_type = _WIRE_TYPES.get(field.type, _VARINT)
    if field.message_type is not None:
        return _tagged(field.number, _BYTES, _message(draw, field.message_type, hints, depth - 1))
    if not field.is_repeated:
        return _tagged(field.number, wire_type, _scalar(draw, field, hints))
    values = [_scalar(draw, field, hints) for _ in range(draw(st.integers(1, 4)))]
    if draw(st.integers(0, 15)) == 0:
        values *= 1 if len(values[0]) > 16 else MANY // len(values)
    if wire_type == _BYTES or draw(st.booleans()):
        return b"".join(_tagged(field.number, wire_type, value) for value in values)
    return _tagged(field.number, _BYTES, b"".join(values))  # packed


def _message(draw: DrawFn, descriptor: Descriptor, hints: Hints, depth: int) -> bytes:
    fields = [f for f in descriptor.fields if depth > 0 or f.message_type is None]
    if not fields:
        return b""
    chosen = draw(st.lists(st.sampled_from(fields), max_size=8))
    return b"".join(_field(draw, field, hints, depth) for field in chosen)


def _six_bytes(value: int) -> bytes:
    """A varint of the length that the stand-ins have."""
    groups = [value >> 7 * place & 0x7F for place in range(6)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def put_in(payload: bytes, *, epoch: int, step: int) -> bytes:
    """The payload with the numbers that were not known when it was drawn."""
    for place, value in ((EPOCH, epoch), (STEP, step)):
        for offset in (-1, 0, 1):
            actual = max(0, value + offset)
            payload = payload.replace(_six_bytes(place + offset), _six_bytes(actual))
    return payload


@st.composite
def payloads(
    draw: DrawFn, descriptor: Descriptor, hints: Hints, bases: Sequence[bytes] = ()
) -> bytes:
    """The bytes of one request: fields in any order, or one of `bases` with fields added to it.

    What is added to a valid request replaces its fields and lengthens its lists, as protobuf merges.
    Some are damaged beyond that.
    """
    data = draw(st.sampled_from((b"", *bases)))
    data += _message(draw, descriptor, hints, MAX_DEPTH)
    match draw(st.integers(0, 15)):
        case 0:
            data = data[: draw(st.integers(0, len(data)))]
        case 1 if data:
            place = draw(st.integers(0, len(data) - 1))
            data = data[:place] + draw(st.binary(min_size=1, max_size=2)) + data[place + 1 :]
        case 2:
            data += draw(st.binary(max_size=30))
        case 3:
            data += data
    return data
