"""The one thread that owns the device, and the end of a process whose device is lost.

Everything that computes, allocates or communicates runs on it, in the order in which it was asked for.
The event loop only asks and waits, so a collective that hangs never blocks health checks or an abort.

What runs on it returns values, and the event loop assigns them: what a worker knows of itself is written
by the event loop alone, and read there without a lock. Beside that stand the `MemoryMeter` and the
communicators, which say themselves what other threads may ask of them.
"""

import asyncio
import faulthandler
import logging
import os
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import psutil
import torch

from colrow.errors import (
    Aborted,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from shard_worker import cuda_libraries
from shard_worker.communicator import CommunicatorAborted, CommunicatorError, CommunicatorTimeout
from shard_worker.memory_meter import MemoryMeter

log = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_HUNG = 70
"""The exit code of a worker whose device thread hangs."""
EXIT_BROKEN = 71
"""The exit code of a worker whose device refuses every call."""
SLOW_OPEN_S = 10.0
"""After so long it is said that a driver does not answer: the first use of a GPU takes a few seconds."""


def _first_line(error: BaseException) -> str:
    """What CUDA says first; advice on debugging kernels follows."""
    return str(error).partition("\n")[0]


class DeviceThread:
    """Runs functions on the device, one after the other; a second thread waits for its results."""

    def __init__(self, device: torch.device, meter: MemoryMeter) -> None:
        self.device = device
        self._meter = meter
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
        self._reader = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="results", initializer=self._use
        )
        self._memory = (0, 0)  # of a GPU: available, total
        self._looking: Future[None] | None = None

    async def open(self) -> None:
        """Takes the device. InvalidArgument when it is not there or refuses."""
        if self.device.type != "cuda":
            return
        # As it is and not by `run`: a device that can't be had at all is no broken one.
        taking = asyncio.get_running_loop().run_in_executor(self._thread, self._take)
        if not (await asyncio.wait([taking], timeout=SLOW_OPEN_S))[0]:
            log.warning(
                "waiting for %s: its driver has not answered for %g s; `colrow doctor` says more",
                self.device,
                SLOW_OPEN_S,
            )
        await taking
        await self.measure_memory()

    def _take(self) -> None:
        """Makes the GPU this thread's own."""
        problem = cuda_libraries.torch_problem(torch.__version__, torch.version.cuda)
        problem = problem or cuda_libraries.device_problem(
            self.device.index, torch.cuda.device_count()
        )
        if problem:
            raise InvalidArgument("device", str(self.device), problem)
        try:
            self._use()
        except RuntimeError as error:
            raise InvalidArgument("device", str(self.device), _first_line(error)) from error

    def _use(self) -> None:
        """Sets this thread's device, which is the first GPU until it is said: what waits for an event
        there would make a context on that one, of half a gigabyte that no ledger knows of."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    async def run(
        self, function: Callable[[], T], *, unwanted: Callable[[T], None] | None = None
    ) -> T:
        """Runs `function` behind what is queued; what the device refuses becomes the caller's error.

        Where the caller is cancelled, `function` may still run: `unwanted` then gets, on this thread,
        what it has made.
        """
        running = self._thread.submit(self._attempt, function)
        try:
            return await _outcome(running)
        except asyncio.CancelledError:
            if unwanted is not None:
                self.queue(lambda: _hand_over(running, unwanted))
            raise

    async def read(self, function: Callable[[], T]) -> T:
        """Waits for a result on the other thread, so that this one goes on to launch the next step."""
        return await _outcome(self._reader.submit(self._attempt, function))

    def queue(self, function: Callable[[], None]) -> "Future[None]":
        """Runs `function` behind what is queued. Nobody waits for it: what goes wrong is logged."""

        def run() -> None:
            try:
                self._attempt(function)
            except Exception:
                log.exception("what was queued on the device thread failed")

        return self._thread.submit(run)

    def _attempt(self, function: Callable[[], T]) -> T:
        """On either thread."""
        try:
            return function()
        except (torch.OutOfMemoryError, MemoryError) as error:
            traceback.clear_frames(error.__traceback__)
            self._meter.look()
            raise ResourceExhausted(
                f"{self.device} is out of memory ({self._meter.ledger}): {error}",
                reason="OUT_OF_MEMORY",
            ) from error
        except Exception as error:
            # An error that somebody keeps must not keep the tensors of its frames.
            traceback.clear_frames(error.__traceback__)
            # As which torch, CuPy, NCCL and Triton alike raise what a device refuses.
            if isinstance(error, RuntimeError):
                said = _first_line(error)
                self._thread.submit(lambda: self._end_if_broken(said))
            raise

    def synchronize(self) -> None:
        """Waits until the device has done all that it was given. On its thread."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _end_if_broken(self, said: str) -> None:
        """Ends the process, after an error, where the device refuses a call that can't fail.

        After an illegal access or a memory error CUDA refuses every later call of the process. Only a
        new process has the device again, so its supervisor starts one.
        """
        try:
            self.synchronize()
        except Exception as error:
            log.critical(
                "%s is broken: %s; nor can it be synchronized: %s; ending the process",
                *(self.device, said, _first_line(error)),
            )
            os._exit(EXIT_BROKEN)

    async def measure_memory(self) -> None:
        """Gives what torch keeps unused back to a GPU, and looks what is free there."""

        def measure() -> tuple[int, int]:
            torch.cuda.empty_cache()
            return torch.cuda.mem_get_info(self.device)

        if self.device.type == "cuda":
            self._memory = await self.run(measure)

    def memory(self) -> tuple[int, int]:
        """Bytes, available and total: of a GPU as they were last measured."""
        if self.device.type == "cuda":
            return self._memory
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def look_at_peak(self) -> None:
        """Has the meter look when the thread is next free. What it sees is told from then on."""
        # One at a time: a device that hangs is not to find a queue of them.
        if self.device.type == "cuda" and (self._looking is None or self._looking.done()):
            self._looking = self.queue(self._meter.look)

    async def end(self, give_up: Callable[[], None], timeout_s: float) -> None:
        """Runs `give_up` behind what runs. After `timeout_s` without an end the process ends.

        A thread can't be ended from outside, and one that hangs, in a driver or a collective that heeds
        no abort, holds the device for good. The supervisor starts another process.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self.run(give_up)
                await self.read(lambda: None)
                # Who joins next sizes its cache by what is free now.
                await self.measure_memory()
        except TimeoutError:
            faulthandler.dump_traceback(all_threads=True)  # for the log: where it hangs
            log.critical(
                "the device thread hangs: %g s after an abort it has not ended what it runs; ending "
                "the process",
                timeout_s,
            )
            os._exit(EXIT_HUNG)

    def close(self) -> None:
        """Ends both threads; nothing runs on them any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._reader.shutdown(wait=False, cancel_futures=True)


async def _outcome(running: "Future[T]") -> T:
    """Its result, or its error as one for the caller of a service."""
    try:
        return await asyncio.wrap_future(running)
    except CommunicatorTimeout as error:
        raise DeadlineExceeded(str(error), reason="PEER_TIMEOUT") from error
    except CommunicatorAborted as error:
        raise Aborted(str(error), reason="GROUP_ABORTED") from error
    except CommunicatorError as error:
        raise Unavailable(str(error), reason="COMMUNICATOR_FAILED") from error


def _hand_over(ended: "Future[T]", unwanted: Callable[[T], None]) -> None:
    """What a function has made, if it came to that."""
    if not ended.cancelled() and ended.exception() is None:
        unwanted(ended.result())
