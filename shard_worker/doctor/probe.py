"""What the doctor tries, each in a process of its own: `python -m shard_worker.doctor.probe NAME …`.

A probe tells what it finds line by line, so that what it told counts though it hang later.
"""

import contextlib
import ctypes
import importlib
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAYLOAD_BYTES = 8192
"""Of the all-reduces whose time is told: one token of an 8B model in 16 bits."""

_NUM_VALUES = PAYLOAD_BYTES // 4
_WARMUPS = 20
_REPEATS = 200
_WRITTEN_BYTES = 1 << 20
_POLL_S = 0.005
_LATE_S = 5  # after which a probe ends itself that nobody has ended

# cudaMemcpyKind
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Probe:
    """One rank of a probe. All ranks see `folder`, through which they meet and tell what they found."""

    folder: Path
    rank: int
    size: int
    deadline: float
    arguments: Sequence[str]

    @property
    def left_s(self) -> float:
        return max(self.deadline - time.monotonic(), 0.001)

    def tell(self, **fields: Any) -> None:
        with (self.folder / f"{self.rank}.results").open("a", encoding="utf-8") as results:
            results.write(json.dumps(fields) + "\n")

    def exchange(self, name: str, text: str = "") -> list[str]:
        """Every rank's text of that name, once all ranks have come to it."""
        new = self.folder / f"{self.rank}.{name}.new"
        new.write_text(text)
        new.rename(self.folder / f"{self.rank}.{name}")  # so that nobody reads half of it
        files = [self.folder / f"{rank}.{name}" for rank in range(self.size)]
        while not all(file.exists() for file in files):
            if time.monotonic() >= self.deadline:
                missing = [str(rank) for rank, file in enumerate(files) if not file.exists()]
                raise TimeoutError(f"rank {', '.join(missing)} did not come to {name!r}")
            time.sleep(_POLL_S)
        return [file.read_text() for file in files]


def torch_build(probe: Probe) -> None:
    import torch

    probe.tell(version=torch.__version__, cuda=torch.version.cuda)


def package(probe: Probe) -> None:
    """Whether a package can be imported, by the name of its module."""
    module = importlib.import_module(probe.arguments[0])
    probe.tell(version=getattr(module, "__version__", "of unknown version"))


def shm(probe: Probe) -> None:
    from shard_worker.communicator.shm import ShmCommunicator

    made = ShmCommunicator.create_id().hex() if probe.rank == 0 else ""
    communicator_id = bytes.fromhex(probe.exchange("id", made)[0])
    comm = ShmCommunicator.join(
        communicator_id, probe.rank, probe.size, timeout_s=probe.left_s, op_timeout_s=probe.left_s
    )
    _all_reduce(probe, comm, "cpu")


def gloo(probe: Probe) -> None:
    from shard_worker.communicator.gloo import GlooCommunicator

    host, made, store = "127.0.0.1", b"", None
    if probe.rank == 0:
        made, store = GlooCommunicator.create_store(host)
    communicator_id = bytes.fromhex(probe.exchange("id", made.hex())[0])
    comm = GlooCommunicator.join(
        communicator_id,
        probe.rank,
        probe.size,
        timeout_s=probe.left_s,
        op_timeout_s=probe.left_s,
        interface_host=host,
        store=store,
    )
    _all_reduce(probe, comm, "cpu")


def nccl(probe: Probe) -> None:
    """A rank on each of the devices that the arguments name."""
    import torch

    from shard_worker.communicator.nccl import NcclCommunicator

    device = torch.device("cuda", int(probe.arguments[probe.rank]))
    torch.cuda.set_device(device)
    host, made, store = "127.0.0.1", b"", None
    if probe.rank == 0:
        made, store = NcclCommunicator.create_id(host)
    communicator_id = bytes.fromhex(probe.exchange("id", made.hex())[0])
    comm = NcclCommunicator.join(
        communicator_id,
        probe.rank,
        probe.size,
        device=device,
        timeout_s=probe.left_s,
        interface_host=host,
        store=store,
    )
    _all_reduce(probe, comm, str(device))


def _all_reduce(probe: Probe, comm: Any, device: str) -> None:
    """Tells the microseconds of a small one, once one has given the right sum."""
    import torch

    torch.set_num_threads(1)
    values = torch.arange(_NUM_VALUES, dtype=torch.float32, device=device)
    total = comm.all_reduce(values * (probe.rank + 1))
    if not torch.equal(total, values * (probe.size * (probe.size + 1) // 2)):
        raise ArithmeticError("the all-reduce gave another sum on this rank")
    zeros = torch.zeros_like(values)
    for _ in range(_WARMUPS):
        comm.all_reduce(zeros)
    times_us = []
    for _ in range(_REPEATS):
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        comm.all_reduce(zeros)
        if device != "cpu":
            torch.cuda.synchronize()
        times_us.append((time.perf_counter() - began) * 1e6)
    comm.barrier(probe.left_s)
    comm.close()
    probe.tell(median_us=sorted(times_us)[_REPEATS // 2])


def devices(probe: Probe) -> None:
    import torch

    driver_cuda = ctypes.c_int()
    with contextlib.suppress(OSError):  # without a driver there is no GPU either
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver_cuda))
    num_devices = torch.cuda.device_count()
    probe.tell(num_devices=num_devices, driver_cuda=driver_cuda.value)
    for index in range(num_devices):
        try:
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            if torch.ones(1000, device=f"cuda:{index}").sum().item() != 1000:
                raise ArithmeticError("a sum is wrong")
            probe.tell(
                index=index,
                name=properties.name,
                uuid=str(properties.uuid).removeprefix("GPU-"),
                capability=f"{properties.major}.{properties.minor}",
                free_bytes=free,
                total_bytes=total,
            )
        except (RuntimeError, ArithmeticError) as error:
            probe.tell(index=index, error=_first_line(error))


def peer_access(probe: Probe) -> None:
    """Each device writes into the memory of each other one, within one process."""
    import torch

    num_devices = torch.cuda.device_count()
    for writer in range(num_devices):
        for owner in range(num_devices):
            if writer == owner:
                continue
            try:
                if not torch.cuda.can_device_access_peer(writer, owner):
                    probe.tell(writer=writer, owner=owner, error="the driver offers none")
                    continue
                target = torch.zeros(_WRITTEN_BYTES, dtype=torch.uint8, device=f"cuda:{owner}")
                torch.cuda.synchronize(owner)
                pattern = _pattern(writer)
                # A copy between devices is queued on the one that has the source: it writes.
                target.copy_(pattern.to(f"cuda:{writer}"))
                torch.cuda.synchronize(writer)
                torch.cuda.synchronize(owner)
                probe.tell(writer=writer, owner=owner, arrived=torch.equal(target.cpu(), pattern))
            except RuntimeError as error:
                probe.tell(writer=writer, owner=owner, error=_first_line(error))


def cuda_ipc(probe: Probe) -> None:
    """A rank on each device that the arguments name opens the memory of each other one and writes."""
    import torch  # first, as in a worker: CuPy then finds the CUDA libraries that it brings
    from cupy.cuda import runtime

    others = [rank for rank in range(probe.size) if rank != probe.rank]
    runtime.setDevice(int(probe.arguments[probe.rank]))
    own = runtime.malloc(_WRITTEN_BYTES * probe.size)  # a slot for each writer
    runtime.memset(own, 0, _WRITTEN_BYTES * probe.size)
    source = runtime.malloc(_WRITTEN_BYTES)
    pattern = _pattern(probe.rank)
    runtime.memcpy(source, pattern.data_ptr(), _WRITTEN_BYTES, _HOST_TO_DEVICE)
    runtime.deviceSynchronize()
    handles = probe.exchange("handle", runtime.ipcGetMemHandle(own).hex())
    for owner in others:
        try:
            opened = runtime.ipcOpenMemHandle(
                bytes.fromhex(handles[owner]), runtime.cudaIpcMemLazyEnablePeerAccess
            )
            slot = opened + probe.rank * _WRITTEN_BYTES
            runtime.memcpy(slot, source, _WRITTEN_BYTES, _DEVICE_TO_DEVICE)
            runtime.deviceSynchronize()
            runtime.ipcCloseMemHandle(opened)
        except runtime.CUDARuntimeError as error:
            probe.tell(writer=probe.rank, owner=owner, error=_first_line(error))
    probe.exchange("written")
    found = torch.empty(_WRITTEN_BYTES, dtype=torch.uint8)
    for writer in others:
        slot = own + writer * _WRITTEN_BYTES
        runtime.memcpy(found.data_ptr(), slot, _WRITTEN_BYTES, _DEVICE_TO_HOST)
        arrived = torch.equal(found, _pattern(writer))
        probe.tell(writer=writer, owner=probe.rank, arrived=arrived)
    runtime.free(source)
    runtime.free(own)


def nccl_library(probe: Probe) -> None:
    """What NCCL a worker of this installation gets; fails as its join would."""
    import torch

    from shard_worker import cuda_libraries
    from shard_worker.communicator.nccl import NcclCommunicator

    NcclCommunicator.create_id("127.0.0.1")
    import cupy
    from cupy.cuda import nccl

    probe.tell(
        nccl=cuda_libraries.nccl_version(nccl.get_version()),
        cupy=f"{cupy.__version__} ({', '.join(cuda_libraries.cupy_packages())})",
        cuda=torch.version.cuda,
        libraries=cuda_libraries.mapped_libraries(
            Path("/proc/self/maps").read_text(), cuda_libraries.NCCL
        ),
    )


def _pattern(writer: int) -> Any:
    """On the host, a uint8 tensor of `_WRITTEN_BYTES`, another for each writer, and never zero."""
    import torch

    return ((5 * torch.arange(_WRITTEN_BYTES) + 31 * writer) % 251 + 1).to(torch.uint8)


def _first_line(error: BaseException) -> str:
    """The first line of an error: CUDA's go on with advice on debugging kernels."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


PROBES: dict[str, Callable[[Probe], None]] = {
    function.__name__: function
    for function in (
        *(torch_build, package, shm, gloo, nccl, devices, peer_access, cuda_ipc, nccl_library),
    )
}


def main(name: str, folder: str, rank: str, size: str, timeout_s: str, *arguments: str) -> int:
    # The system ends it, whatever it hangs in, though its parent be gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(timeout_s) + _LATE_S)
    deadline = time.monotonic() + int(timeout_s)
    probe = Probe(Path(folder), int(rank), int(size), deadline, arguments)
    try:
        PROBES[name](probe)
    except Exception as error:
        # Broad, because it is the doctor's business to tell what goes wrong, whatever it is.
        probe.tell(failure=f"{type(error).__name__}: {_first_line(error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
