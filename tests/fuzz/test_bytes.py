"""Bytes of any kind on every port: neither protocol nor sense, halves of both, and very many at once."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import time
from collections import Counter

import httpx2
import pytest

from tests.fuzz.victim import BUDGET, NUM_TOKENS, PROMPT, Cluster

pytestmark = pytest.mark.timeout(600 * max(1.0, BUDGET))

BATCH = 10  # blobs between two good requests
PATIENCE_S = 0.05  # for an answer to a blob; there need not be one
NUM_CROWD = 300

GOOD_BODY = b'{"prompt": [5, 17, 200], "max_tokens": 2, "temperature": 0}'
GOOD_HTTP = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(GOOD_BODY), GOOD_BODY)
)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PATH = b"/colrow.v1.InferenceService/GetModel"
# HPACK: POST, http, the path and the content type as literals.
HEADERS = b"\x83\x86\x44" + bytes([len(PATH)]) + PATH + b"\x5f\x10application/grpc"
WORDS = (
    *(b"\r\n", b"\r\n\r\n", b"\0", b"Transfer-Encoding: chunked\r\n", b"Content-Length: -1\r\n"),
    *(b"Content-Length: 99999999999999999999\r\n", b"Expect: 100-continue\r\n", b"GET ", b" "),
    *(b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"ffffffffffffffff\r\n", b"HTTP/9.9"),
    *(b"\xff" * 8, b"A" * 70_000, b"X: " + b"y" * 9000 + b"\r\n", b"%00%ff%zz", b"//../.."),
)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


GOOD_HTTP2 = (
    PREFACE
    + frame(4, 0, 0, b"")  # SETTINGS
    + frame(1, 4, 1, HEADERS)
    + frame(0, 1, 1, b"\0\0\0\0\0")
)


def mutated(data: bytes, choose: random.Random) -> bytes:
    """The bytes with some of them changed, moved, doubled, or left out."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 6)):
        place = choose.randrange(len(changed) + 1)
        match choose.randrange(5):
            case 0:
                changed[place : place + 1] = choose.randbytes(choose.randint(1, 4))
            case 1:
                del changed[place : place + choose.randint(1, 20)]
            case 2:
                changed[place:place] = choose.choice(WORDS)
            case 3:
                changed[place:place] = changed[: choose.randint(1, 40)]
            case 4:
                del changed[place:]
    return bytes(changed)


def frames(choose: random.Random) -> bytes:
    """HTTP/2 as it should begin, then frames of any kind."""
    data = PREFACE + frame(4, 0, 0, b"")
    for _ in range(choose.randint(1, 12)):
        payload = choose.choice((HEADERS, choose.randbytes(choose.randint(0, 64)), b"\0" * 6))
        kind, flags = choose.randrange(16), choose.choice((0, 1, 4, 5, 8, 32, 255))
        stream = choose.choice((0, 1, 3, 2, 2**31 - 1, 2**32 - 1))
        made = frame(kind, flags, stream, payload)
        if choose.random() < 0.2:  # says that it is longer, or shorter, than it is
            made = choose.randbytes(3) + made[3:]
        data += made
    return data


def blob(choose: random.Random) -> bytes:
    match choose.randrange(5):
        case 0:
            return choose.randbytes(choose.choice((1, 8, 100, 5000, 100_000)))
        case 1:
            return mutated(GOOD_HTTP, choose)
        case 2:
            return mutated(GOOD_HTTP2, choose)
        case 3:
            return frames(choose)
    good = choose.choice((GOOD_HTTP, GOOD_HTTP2))
    return good[: choose.randrange(len(good))]


def send(port: int, data: bytes) -> bytes:
    """Sends bytes on a connection of their own; what comes back within a moment."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as connection,
        contextlib.suppress(OSError),  # it may hang up in the midst
    ):
        connection.sendall(data)
        if select.select([connection], [], [], PATIENCE_S)[0]:
            return connection.recv(65536)
    return b""


def check_http(cluster: Cluster) -> None:
    """A good request over HTTP gets its tokens, and gRPC's does."""
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True}
    url = f"http://127.0.0.1:{cluster.coordinator.http_port}/v1/completions"
    answer = httpx2.post(url, json=body, timeout=20)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["token_ids"] == cluster.expected
    cluster.check()


def ports(cluster: Cluster) -> dict[str, int]:
    coordinator, worker = cluster.coordinator, cluster.workers[0]
    return {"HTTP": coordinator.http_port, "gRPC": coordinator.port, "worker": worker.port}


def test_bytes_of_any_kind_on_every_port(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    choose = random.Random(0 if BUDGET <= 1 else None)
    statuses: Counter[str] = Counter()
    num_blobs = 0
    with cluster.without_leaks():
        for _ in range(round(12 * BUDGET)):
            for name, port in ports(cluster).items():
                for _ in range(BATCH):
                    data = blob(choose)
                    answer = send(port, data)
                    num_blobs += 1
                    if name == "HTTP" and answer:
                        status = answer.split(b" ", 2)[1].decode()
                        statuses[status] += 1
                        assert status < "500", (data[:2000], answer)
                check_http(cluster)
    with capsys.disabled():
        ends = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
        print(f"\n{num_blobs} byte blobs on 3 ports: 0 crashed, 0 hung; HTTP said {ends}")


def test_half_requests_of_a_crowd_keep_nobody_out(cluster: Cluster) -> None:
    """Connections that say a little and then nothing, hundreds of them, on every port."""
    with cluster.without_leaks(), contextlib.ExitStack() as crowd:
        for port in ports(cluster).values():
            for index in range(NUM_CROWD):
                connection = socket.create_connection(("127.0.0.1", port), timeout=5)
                crowd.enter_context(connection)
                half = GOOD_HTTP if index % 2 else GOOD_HTTP2
                connection.sendall(half[: index % len(half)])
        began = time.monotonic()
        check_http(cluster)
        assert time.monotonic() - began < 10
        crowd.close()
