"""10,000 calls whose clients leave, over gRPC and HTTP and at every moment, leave nothing behind."""

import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc

from client import AsyncColrow
from colrow.errors import DeadlineExceeded
from tests import checkpoints
from tests.clusters import RunningCluster, WorkerPool, cluster

NUM_CALLS = int(os.environ.get("COLROW_CANCELS", "10000"))
# What is allocated once, and kept: pools of gRPC and of malloc, prefixes in the cache. Memory rises by
# some 8 MiB up to about so many calls and stays there.
NUM_WARM_UP = 8000
AT_ONCE = 64
NUM_TOKENS = 240  # more than any client stays for
VOCAB_SIZE = 331
MAX_GROWTH_BYTES = 8 * 2**20 + 100 * NUM_CALLS
"""What allocators keep. Whatever a call leaves behind, it is more than 100 bytes."""

pytestmark = pytest.mark.timeout(180 + NUM_CALLS // 50)


@dataclass(frozen=True)
class Held:
    """What a process holds of the system."""

    fds: int
    threads: int
    children: int
    resident_bytes: int

    @classmethod
    def by(cls, pid: int) -> "Held":
        process = psutil.Process(pid)
        return cls(
            process.num_fds(),
            process.num_threads(),
            len(process.children(recursive=True)),
            process.memory_info().rss,
        )


class Leavers:
    """Clients that leave, each in one of several ways; `left` counts them by way."""

    def __init__(self, running: RunningCluster, seed: int) -> None:
        self.left: dict[str, int] = {}
        self._target = running.target
        self._http_port = running.coordinator.http_port
        self._random = random.Random(seed)
        self._ways: list[tuple[str, Callable[[AsyncColrow], Awaitable[None]]]] = [
            ("gRPC, before the first token", self._before_the_first_token),
            ("gRPC, in the midst of it", self._in_the_midst),
            ("gRPC, with a deadline", self._deadline),
            ("gRPC, several continuations", self._several),
            ("HTTP, a stream", self._http_stream),
            ("HTTP, no stream", self._http_whole),
        ]

    async def run(self, count: int) -> None:
        numbers = iter(range(count))

        async def client() -> None:
            # A connection each would hide what is left on one; one for all would be the limit.
            async with AsyncColrow(self._target) as colrow:
                for _ in numbers:
                    name, leave = self._random.choice(self._ways)
                    await leave(colrow)
                    self.left[name] = self.left.get(name, 0) + 1

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(client())

    def _prompt(self) -> list[int]:
        length = self._random.choice((1, 3, 17, 60))
        return [self._random.randrange(VOCAB_SIZE) for _ in range(length)]

    async def _read(self, colrow: AsyncColrow, num_pieces: int, n: int = 1) -> None:
        pieces = colrow.generate(
            self._prompt(), max_tokens=NUM_TOKENS - 60, temperature=1, ignore_eos=True, n=n
        )
        async with contextlib.aclosing(pieces):
            for _ in range(num_pieces):
                piece = await anext(pieces)
                assert piece.finish_reason is None, "it was to leave before the end"

    async def _before_the_first_token(self, colrow: AsyncColrow) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._random.uniform(0, 0.004)):
                await self._read(colrow, 1)

    async def _in_the_midst(self, colrow: AsyncColrow) -> None:
        await self._read(colrow, self._random.randint(1, 6))

    async def _several(self, colrow: AsyncColrow) -> None:
        await self._read(colrow, self._random.randint(1, 6), n=3)

    async def _deadline(self, colrow: AsyncColrow) -> None:
        pieces = colrow.generate(
            self._prompt(),
            timeout_s=self._random.uniform(0.001, 0.03),
            max_tokens=NUM_TOKENS - 60,
            ignore_eos=True,
        )
        with pytest.raises(DeadlineExceeded):
            async for _ in pieces:
                pass

    async def _http_stream(self, colrow: AsyncColrow) -> None:
        await self._post(stream=True, reads=self._random.randint(0, 3))

    async def _http_whole(self, colrow: AsyncColrow) -> None:
        await self._post(stream=False, reads=0)

    async def _post(self, *, stream: bool, reads: int) -> None:
        body = json.dumps(
            {
                "prompt": self._prompt(),
                "max_tokens": NUM_TOKENS - 60,
                "ignore_eos": True,
                "stream": stream,
            }
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self._http_port)
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n{body}".encode()
        )
        await writer.drain()
        for _ in range(reads):
            assert b"[DONE]" not in await reader.read(512), "it was to leave before the end"
        if not reads:
            await asyncio.sleep(self._random.uniform(0, 0.02))
        if self._random.random() < 0.5:
            writer.transport.abort()  # a reset
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def calls_under_way(target: str) -> int:
    """Calls that the coordinator's gRPC server has not ended, the one that asks left out."""
    with grpc.insecure_channel(target) as channel:
        stub = channelz_pb2_grpc.ChannelzStub(channel)
        (server,) = stub.GetServers(channelz_pb2.GetServersRequest(), timeout=10).server
    data = server.data
    return data.calls_started - data.calls_succeeded - data.calls_failed - 1


def wait_until_idle(running: RunningCluster) -> None:
    deadline = time.monotonic() + 10
    while True:
        state = running.client.cluster().scheduler
        left = state.running, state.waiting, state.kv_blocks_used, calls_under_way(running.target)
        if left == (0, 0, 0, 0):
            return
        assert time.monotonic() < deadline, f"running, waiting, blocks, calls: {left}"
        time.sleep(0.05)


def test_cancelled_calls_leave_nothing(
    tmp_path: Path, worker_pool: WorkerPool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints.build("smollm2", tmp_path)
    # Few blocks, so that prefixes fill the cache in the warm-up.
    with cluster(worker_pool, folder, 2, "--num-blocks", "1500") as running:
        question: dict[str, Any] = {"max_tokens": 30, "temperature": 0}
        expected = [p.token_ids for p in running.client.generate([5, 17], **question)]
        asyncio.run(Leavers(running, seed=1).run(min(NUM_WARM_UP, NUM_CALLS)))
        wait_until_idle(running)
        workers = running.client.cluster().workers
        pids = {
            "coordinator": running.coordinator.process.pid,
            **{f"worker {worker.rank}": worker.description.pid for worker in workers},
        }
        before = {name: Held.by(pid) for name, pid in pids.items()}

        leavers = Leavers(running, seed=2)
        began = time.monotonic()
        asyncio.run(leavers.run(NUM_CALLS))
        took_s = time.monotonic() - began
        wait_until_idle(running)
        time.sleep(1)  # for connections that were closed to be gone

        after = {name: Held.by(pid) for name, pid in pids.items()}
        growth = {name: after[name].resident_bytes - before[name].resident_bytes for name in pids}
        with capsys.disabled():
            print(f"\n{NUM_CALLS} calls cancelled in {took_s:.0f} s: {leavers.left}")
            for name in pids:
                print(f"{name}: {before[name]} -> {after[name]}: {growth[name] / 2**10:+.0f} KiB")
        assert sum(leavers.left.values()) == NUM_CALLS
        for name in pids:
            assert after[name].fds <= before[name].fds, name
            assert after[name].threads <= before[name].threads, name
            assert after[name].children == before[name].children == 0
            assert growth[name] <= MAX_GROWTH_BYTES, name
        assert all(worker.losses == 0 for worker in running.client.cluster().workers)
        again = [p.token_ids for p in running.client.generate([5, 17], **question)]
        assert sum(again, ()) == sum(expected, ())
