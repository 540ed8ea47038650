"""Minutes of mixed load with a worker killed again and again: nothing fails, and memory is steady.

    python benchmarks/soak.py --minutes 10

Clients ask the demo model all the time, over gRPC and HTTP: greedy and seeded, short and long prompts,
one continuation and several, streams and whole answers, and some leave before the end. Every
`--kill-every` seconds the last rank is killed; the supervisor of the cluster starts it again. A line an
`--interval` shows every process's memory.

Targets: no call fails, and no process grows. A process has peaks, one for each time between two kills,
since the KV cache is given back and filled anew in between. A straight line through those after the
warm-up must not rise by more than `--max-growth-percent` of their mean from its beginning to its end;
it is Theil and Sen's, which a leak tilts and one moment's peak does not. For the rank that is killed
the peaks are those of its lives. In the end no block of KV cache is in use, and the coordinator has no
more threads and file descriptors than after the warm-up. The exit code is 1 when a target is missed.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import psutil

from client import AsyncColrow, Colrow
from client.local_cluster import LocalCluster
from client.model_source import resolve_model
from colrow.v1 import inference_service_pb2

START_TIMEOUT_S = 120.0
SETTLE_TIMEOUT_S = 60.0
POLL_S = 0.2
CALL_TIMEOUT_S = 180.0  # a call may wait for a worker to be back
# Blocks of 16 tokens. So few that prefixes fill the cache in the warm-up, and some sequences give way.
NUM_BLOCKS = 256
LONG_PROMPT = 400
MIB = 2**20


class Load:
    """Clients that ask until told to stop; `counts` are of calls by kind, `failures` say what."""

    def __init__(
        self,
        local: LocalCluster,
        model: inference_service_pb2.GetModelResponse,
        clients: int,
        seed: int,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._target, self._url = local.target, local.http_url
        self._model = model
        self._clients = clients
        self._random = random.Random(seed)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when the calls that run have ended."""
        self._stopping.set()
        self._thread.join()

    async def _run(self) -> None:
        long_prompt = min(LONG_PROMPT, self._model.context_length // 2)
        async with AsyncColrow(self._target) as colrow:
            kinds: dict[str, Callable[[AsyncColrow], Awaitable[None]]] = {
                "greedy": lambda c: self._grpc(c, temperature=0.0),
                "seeded": lambda c: self._grpc(c, temperature=1.0, seed=7),
                "several": lambda c: self._grpc(c, temperature=1.0, n=3),
                "long": lambda c: self._grpc(c, length=long_prompt, temperature=0.0),
                "left": lambda c: self._grpc(c, leaves=True, temperature=1.0),
                "HTTP": lambda c: asyncio.to_thread(self._http, stream=False, leaves=False),
                "HTTP stream": lambda c: asyncio.to_thread(self._http, stream=True, leaves=False),
                "HTTP left": lambda c: asyncio.to_thread(self._http, stream=True, leaves=True),
            }

            async def client() -> None:
                while not self._stopping.is_set():
                    kind = self._random.choice(list(kinds))
                    try:
                        await kinds[kind](colrow)
                        self.counts[kind] += 1
                    except Exception as error:  # a client counts what it meets, whatever that is
                        self.failures.append(f"{kind}: {error!r}")
                        await asyncio.sleep(1.0)

            await asyncio.gather(*(client() for _ in range(self._clients)))

    def _prompt(self, length: int | None = None) -> list[int]:
        length = length or self._random.choice((4, 20, 60))
        return [self._random.randrange(100, self._model.vocab_size) for _ in range(length)]

    async def _grpc(
        self,
        colrow: AsyncColrow,
        *,
        length: int | None = None,
        leaves: bool = False,
        **sampling: Any,
    ) -> None:
        num_tokens = self._random.randint(5, 40)
        got = 0
        pieces = colrow.generate(
            self._prompt(length),
            timeout_s=CALL_TIMEOUT_S,
            max_tokens=num_tokens,
            ignore_eos=True,
            **sampling,
        )
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                got += len(piece.token_ids)
                if leaves and got > num_tokens / 2:
                    return
        wanted = num_tokens * sampling.get("n", 1)
        if got != wanted:
            raise AssertionError(f"{got} tokens of {wanted}")

    def _http(self, *, stream: bool, leaves: bool) -> None:
        body = {
            "prompt": self._prompt(),
            "max_tokens": self._random.randint(5, 40),
            "ignore_eos": True,
            "stream": stream,
        }
        request = urllib.request.Request(
            f"{self._url}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S) as response:
            if leaves:
                response.readline()
                return
            text = response.read().decode()
        if stream and not text.rstrip().endswith("data: [DONE]"):
            raise AssertionError(f"a stream ended with {text[-200:]!r}")
        if not stream and json.loads(text)["usage"]["completion_tokens"] != body["max_tokens"]:
            raise AssertionError(f"fewer tokens than {body['max_tokens']}")


class Memory:
    """The peaks of each process's resident memory, in bytes, one for each period."""

    def __init__(self, local: LocalCluster) -> None:
        self.peaks: dict[str, list[int]] = {process.name: [] for process in local.processes}
        self.now: dict[str, int] = {}
        self._local = local
        self.begin_period()

    def begin_period(self) -> None:
        for peaks in self.peaks.values():
            peaks.append(0)

    def sample(self) -> None:
        for process in self._local.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                resident = psutil.Process(process.pid).memory_info().rss
                self.now[process.name] = resident
                self.peaks[process.name][-1] = max(self.peaks[process.name][-1], resident)


def growth(peaks: list[int]) -> float:
    """What a straight line through the peaks rises by in all, as part of their mean.

    The line's slope is the median of those between any two peaks (Sen, 1968).
    """
    if len(peaks) < 2:
        return 0.0
    numbered = list(enumerate(peaks))
    slope = statistics.median(
        (later - earlier) / (j - i)
        for (i, earlier), (j, later) in itertools.combinations(numbered, 2)
    )
    return slope * (len(peaks) - 1) / statistics.mean(peaks)


def soak(local: LocalCluster, load: Load, flags: argparse.Namespace) -> tuple[Memory, int, Any]:
    """Runs the load, and kills; the memory, the number of kills, and the coordinator after warm-up."""
    memory = Memory(local)
    victim = flags.tp - 1
    (coordinator,) = [p for p in local.processes if p.name == "coordinator"]
    process = psutil.Process(coordinator.pid)
    held: dict[str, int] = {}
    began = time.monotonic()
    end = began + 60 * flags.minutes
    next_kill, next_line = began + flags.kill_every, began
    kills = 0
    load.start()
    try:
        while (now := time.monotonic()) < end:
            for message in local.supervise():
                print(f"  {message}", flush=True)
            memory.sample()
            if not held and now - began > 60 * flags.warm_up_minutes:
                held = {"fds": process.num_fds(), "threads": process.num_threads()}
            if now >= next_line:
                next_line += flags.interval
                show(now - began, memory, load)
            if now >= next_kill:
                next_kill += flags.kill_every
                if end - now > flags.kill_every / 2:  # it is to be back in the end
                    memory.begin_period()
                    local.processes[victim].popen.kill()
                    kills += 1
            time.sleep(POLL_S)
    finally:
        stopper = threading.Thread(target=load.stop)
        stopper.start()
        while stopper.is_alive():  # calls may wait for a worker to be started again
            local.supervise()
            stopper.join(POLL_S)
    return memory, kills, held


def show(seconds: float, memory: Memory, load: Load) -> None:
    sizes = ", ".join(f"{name} {size / MIB:.1f}" for name, size in memory.now.items())
    print(
        f"{seconds:5.0f} s: {sum(load.counts.values())} calls, {len(load.failures)} failed; "
        f"MiB: {sizes}",
        flush=True,
    )


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=10.0)
    add("--warm-up-minutes", type=float, default=2.0)
    add("--kill-every", type=float, default=60.0, help="seconds")
    add("--interval", type=float, default=15.0, help="seconds between two lines")
    add("--clients", type=int, default=12)
    add("--tp", type=int, default=2)
    add("--max-growth-percent", type=float, default=3.0)
    add("--model", help="a folder (default: the demo model)")
    add("--seed", type=int, default=0)
    flags = parser.parse_args()

    folder = resolve_model(flags.model)
    coordinator_args = ("--num-blocks", str(NUM_BLOCKS), "--log-level", "warning")
    with LocalCluster(folder, flags.tp, coordinator_args=coordinator_args) as local:
        local.start()
        local.wait_until_serving(START_TIMEOUT_S)
        with Colrow(local.target) as colrow:
            load = Load(local, colrow.model(), flags.clients, flags.seed)
            memory, kills, held = soak(local, load, flags)
            deadline = time.monotonic() + SETTLE_TIMEOUT_S
            while (used := colrow.cluster().scheduler.kv_blocks_used) and (
                time.monotonic() < deadline
            ):
                time.sleep(POLL_S)
            cluster = colrow.cluster()
        (coordinator,) = [p for p in local.processes if p.name == "coordinator"]
        process = psutil.Process(coordinator.pid)
        after = {"fds": process.num_fds(), "threads": process.num_threads()}

    print(f"{flags.minutes:g} minutes, {kills} kills, {cluster.recoveries} recoveries")
    print(f"  calls: {dict(load.counts)}, {len(load.failures)} failed")
    for failure in sorted(set(load.failures))[:10]:
        print(f"    {failure}")
    missed = [] if not load.failures else ["calls failed"]
    # Periods that lie in the warm-up do not count, nor does the one that the warm-up ends in.
    first = int(-(-60 * flags.warm_up_minutes // flags.kill_every))
    for name, all_peaks in memory.peaks.items():
        peaks = [peak for peak in all_peaks[first:] if peak]
        grown = 100 * growth(peaks)
        shown = " ".join(f"{peak / MIB:.1f}" for peak in peaks)
        print(f"  {name}: peaks of {shown} MiB; grew by {grown:+.1f} %")
        if grown > flags.max_growth_percent:
            missed.append(f"{name} grew by more than {flags.max_growth_percent:g} %")
    print(f"  KV blocks in use afterwards: {used}")
    print(f"  coordinator after the warm-up and in the end: {held}, {after}")
    if used:
        missed.append("blocks are in use")
    # What clients keep open goes up and down by a few.
    if held and any(after[name] > held[name] for name in held):
        missed.append("the coordinator holds more than after the warm-up")
    for target in missed:
        print(f"target missed: {target}")
    print("memory is steady and nothing failed" if not missed else "the soak failed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
