"""`python -m shard_worker.doctor`: examines this machine and prints what it finds, as it finds it."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from colrow.finding import Finding, Verdict
from colrow.gpus import VISIBLE_DEVICES, HostGpus, host_gpus
from shard_worker import config
from shard_worker.doctor import gpus, host, topology, transports
from shard_worker.doctor.trial import failure_of, output_of, try_out


def examine(host_has: HostGpus) -> Iterator[Finding]:
    """All findings, in the order in which they are made. Takes some 10 s, on GPUs more."""
    num_gpus = host_has.num_visible
    yield from _guarded("cores", lambda: [host.cores()])
    yield from _guarded("memory", lambda: [host.memory()])
    yield from _guarded("shared memory", lambda: [host.shared_memory()])
    yield from _guarded("gRPC stubs", lambda: [host.stubs()])
    (torch,) = try_out("torch_build")
    yield gpus.torch_finding(torch, num_gpus)
    yield host.allocator(config.expandable_segments(), num_gpus)
    if torch.failure:
        return  # all that follows is tried with it
    yield from _guarded("CPU transports", lambda: _cpu_transports(num_gpus))
    cuda = torch.value("cuda")
    if cuda is None:
        found = f"torch is built for CPUs; the driver has {host_has.num_in_driver}"
        yield Finding("GPUs", Verdict.NOT_HERE, found)
        return
    yield from _guarded("GPUs", lambda: _gpus(cuda, host_has))


def _guarded(name: str, step: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """A step's findings; what fails in it hides none of the steps after it."""
    try:
        yield from step()
    except Exception as error:
        # Broad, for machines differ in ways that nobody thought of, and an examination has to go on.
        found = f"could not be examined: {type(error).__name__}: {error}"
        yield Finding(name, Verdict.WARNING, found, "this is a defect of the doctor: report it")


def _cpu_transports(num_gpus: int) -> Iterator[Finding]:
    works = {}
    for name, verdict, advice in (
        ("shm", Verdict.PROBLEM, "mount a larger /dev/shm, or serve with --transport gloo"),
        (
            "gloo",
            Verdict.WARNING,
            "ranks on several hosts, and NCCL's, meet over it: see to loopback",
        ),
    ):
        trials = try_out(name, ranks=2)
        works[name] = not failure_of(trials)
        if num_gpus:  # GPUs do without shared memory, and meet over Gloo
            verdict = Verdict.WARNING if name == "shm" else Verdict.PROBLEM
        yield transports.all_reduce_finding(
            f"transport {name}", trials, verdict=verdict, advice=advice
        )
    if not num_gpus:
        yield transports.cpu_transport_finding(works)


def _gpus(torch_cuda: str, host_has: HostGpus) -> Iterator[Finding]:
    smi = topology.parse_gpus(output_of(topology.GPUS) or "")
    (devices,) = try_out("devices")
    yield from gpus.device_findings(devices, smi, torch_cuda, host_has)
    uuid_of = gpus.uuids(devices)
    num_devices = len(uuid_of)
    if not num_devices or num_devices < devices.value("num_devices"):
        return  # no two of them can be tried while one is broken
    (triton,) = try_out("package", "triton")
    yield gpus.package_finding(
        "Triton", triton, needed_for="kernels on GPUs are written in it", without=""
    )
    (flashinfer,) = try_out("package", "flashinfer")
    yield gpus.package_finding(
        "FlashInfer", flashinfer, needed_for="", without="attention is torch's and Colrow's own"
    )
    (library,) = try_out("nccl_library")
    yield gpus.nccl_library_finding(library, num_devices)

    peer_access: dict[gpus.Pair, str] = {}
    cuda_ipc: dict[gpus.Pair, str] = {}
    if num_devices > 1:
        links = topology.parse_links(output_of(topology.TOPOLOGY) or "")
        yield from gpus.link_findings(uuid_of, smi, links)
        (tried,) = try_out("peer_access")
        peer_access = gpus.write_outcomes(tried.told, num_devices, tried.failure)
        yield from gpus.write_findings("peer access", peer_access)
        indices = [str(device) for device in uuid_of]
        ranks = try_out("cuda_ipc", *indices, ranks=num_devices)
        told = [line for rank in ranks for line in rank.told]
        cuda_ipc = gpus.write_outcomes(told, num_devices, failure_of(ranks))
        yield from gpus.write_findings("CUDA IPC", cuda_ipc)
        yield transports.all_reduce_finding(
            "transport nccl",
            try_out("nccl", *indices, ranks=num_devices),
            verdict=Verdict.PROBLEM,
            advice="run again with NCCL_DEBUG=INFO in the environment, and see what NCCL says",
        )
    yield gpus.transport_finding(num_devices, peer_access, cuda_ipc)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m shard_worker.doctor",
        description="Examines this machine for shard workers. Exit code 1 where they can't work.",
    )
    parser.add_argument("--json", action="store_true", help="print an object a line")
    parser.add_argument(
        "--visible-devices",
        metavar="LIST",
        help=f"the value of {VISIBLE_DEVICES}, where it is set: `colrow doctor` passes it on",
    )
    flags = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends trials, too
    healthy = True
    for finding in examine(host_gpus(flags.visible_devices)):
        healthy &= finding.verdict is not Verdict.PROBLEM
        text = f"{finding.verdict}: {finding.name}: {finding.found}"
        if finding.advice:
            text += f" -> {finding.advice}"
        print(finding.to_json() if flags.json else text, flush=True)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
