"""What there is of a host, GPUs aside."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
from pathlib import Path

import psutil

from colrow import __version__
from colrow.finding import Finding, Verdict

MIB = 2**20

SHM = Path("/dev/shm")
SHM_NEEDED_BYTES = 4 * MIB
"""Two slots of 1 MiB for each of two ranks."""
SHM_ENOUGH_BYTES = 32 * MIB

DEMO_MEMORY_BYTES = 2048 * MIB
"""What the demo model over two ranks and its coordinator take, rounded up."""


def cores() -> Finding:
    count = len(os.sched_getaffinity(0))
    if count < 2:
        return Finding(
            "cores",
            Verdict.WARNING,
            "1 core for all processes",
            "two ranks would wait for each other's turn: serve with --tp 1",
        )
    return Finding("cores", Verdict.OK, f"{count} cores; a rank on a CPU computes with one or more")


def memory() -> Finding:
    seen = psutil.virtual_memory()
    return memory_finding(seen.total, seen.available, _memory_limit(Path("/sys/fs/cgroup")))


def _memory_limit(folder: Path) -> int | None:
    """Of a container, in bytes."""
    try:
        text = (folder / "memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def memory_finding(total: int, available: int, limit: int | None) -> Finding:
    """Of bytes, and the limit that a container may have beside."""
    found = f"{available / MIB:,.0f} MiB of {total / MIB:,.0f} are free"
    if limit is not None and limit < total:
        found += f"; this container may take {limit / MIB:,.0f}"
        available = min(available, limit)
    if available < DEMO_MEMORY_BYTES:
        advice = (
            f"the demo model over two ranks takes {DEMO_MEMORY_BYTES / MIB:,.0f} MiB; `colrow plan` "
            "says what another model's weights take"
        )
        return Finding("memory", Verdict.WARNING, found, advice)
    return Finding("memory", Verdict.OK, found)


def shared_memory() -> Finding:
    try:
        usage = shutil.disk_usage(SHM)
    except OSError as error:
        return Finding(
            "shared memory",
            Verdict.PROBLEM,
            f"{SHM}: {error.strerror}",
            f"mount a tmpfs at {SHM}, or serve with --transport gloo",
        )
    return shared_memory_finding(usage.total, usage.free)


def shared_memory_finding(total: int, free: int) -> Finding:
    """Of the bytes of /dev/shm; whether it can be used, the trial of its transport shows."""
    found = f"{SHM}: {free / MIB:,.0f} MiB of {total / MIB:,.0f} are free"
    if free >= SHM_ENOUGH_BYTES:
        return Finding("shared memory", Verdict.OK, found)
    advice = (
        "ranks take 2 MiB each, NCCL more: mount a larger one, as docker run --shm-size 1g does"
    )
    verdict = Verdict.PROBLEM if free < SHM_NEEDED_BYTES else Verdict.WARNING
    return Finding("shared memory", verdict, found, advice)


def stubs() -> Finding:
    """Whether gRPC and protobuf are as new as what the generated stubs were generated with."""
    spec = importlib.util.find_spec("colrow.v1")
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [Path(place) / "inference_service_pb2" for place in places]
    try:
        text = "".join(
            file.with_name(file.name + suffix).read_text(encoding="utf-8")
            for file in files
            for suffix in ("_grpc.py", ".py")
        )
    except OSError as error:
        return Finding(
            "gRPC stubs",
            Verdict.PROBLEM,
            f"{error.filename} can't be read: {error.strerror}",
            "run python protos/generate.py, or install colrow anew",
        )
    installed = {name: importlib.metadata.version(name) for name in ("grpcio", "protobuf")}
    return stubs_finding(stub_versions(text), installed)


def stub_versions(text: str) -> dict[str, str]:
    """By package, the version that generated stubs ask for, by their text."""
    found = {}
    for package, pattern in {
        "grpcio": r"^GRPC_GENERATED_VERSION = '([\d.]+)'",
        "protobuf": r"^# Protobuf Python Version: ([\d.]+)",
    }.items():
        if match := re.search(pattern, text, re.MULTILINE):
            found[package] = match.group(1)
    return found


def stubs_finding(wanted: dict[str, str], installed: dict[str, str]) -> Finding:
    """Of versions by package."""
    found = f"colrow {__version__}, " + ", ".join(
        f"{name} {version} (stubs: {wanted.get(name, '?')})" for name, version in installed.items()
    )
    older = [
        name for name, version in wanted.items() if _release(installed[name]) < _release(version)
    ]
    if older:
        upgrade = " ".join(f"'{name}>={wanted[name]}'" for name in older)
        advice = f"the stubs refuse older ones than they were generated with: pip install {upgrade}"
        return Finding("gRPC stubs", Verdict.PROBLEM, found, advice)
    return Finding("gRPC stubs", Verdict.OK, found)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def allocator(setting: tuple[str, str] | None, num_gpus: int) -> Finding:
    """Of what `config.expandable_segments` finds, on a host with so many GPUs."""
    name = "torch's allocator"
    if setting is None:
        return Finding(name, Verdict.OK, "no expandable segments")
    variable, value = setting
    return Finding(
        name,
        Verdict.PROBLEM if num_gpus else Verdict.WARNING,
        f"{variable} = {value!r}",
        "memory in expandable segments can't be shared between workers' GPUs, and a worker on a GPU "
        f"refuses to start: unset {variable}",
    )
