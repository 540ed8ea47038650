"""Examines this machine for `colrow serve`: what a client can see, and what the worker's side finds."""

import contextlib
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence

from client.demo_model import DEMO_MODEL_NAME, DemoModelError, demo_model_ready, find_source
from client.local_cluster import CHILD, local_gpus
from client.model_source import default_cache_folder
from client.serving import check_port
from colrow.finding import Finding, Verdict

SILENCE_TIMEOUT_S = 150.0
"""Between two findings of the worker's side, each of whose trials has a deadline of its own."""

STOP_TIMEOUT_S = 5.0

_MODULE = "shard_worker.doctor"


def examine(host: str, grpc_port: int, http_port: int) -> Iterator[Finding]:
    """All findings, as they are made; ports are those that `colrow serve` would listen on."""
    yield port_finding("gRPC port", host, grpc_port, "grpc-port")
    yield port_finding("HTTP port", host, http_port, "http-port")
    yield demo_model_finding()
    command = [sys.executable, "-P", str(CHILD), _MODULE, "--json"]
    visible_devices = local_gpus().visible_devices
    if visible_devices is not None:
        command.append(f"--visible-devices={visible_devices}")
    yield from findings_of(command, SILENCE_TIMEOUT_S)


def port_finding(name: str, host: str, port: int, flag: str) -> Finding:
    try:
        check_port(host, port, flag)
    except ValueError as error:
        found, _, advice = str(error).partition("; ")
        return Finding(name, Verdict.PROBLEM, found, f"{advice}, or end what listens there")
    return Finding(name, Verdict.OK, f"{port} on {host} is free")


def demo_model_finding() -> Finding:
    """Whether `colrow serve` without a MODEL has one to serve."""
    folder = default_cache_folder() / "models" / DEMO_MODEL_NAME
    if demo_model_ready(folder):
        return Finding("demo model", Verdict.OK, f"converted, in {folder}")
    try:
        source = find_source()
    except DemoModelError as error:
        return Finding("demo model", Verdict.WARNING, str(error), "or name a MODEL to serve")
    return Finding("demo model", Verdict.OK, f"is converted when first served, from {source}")


def findings_of(command: Sequence[str], silence_timeout_s: float) -> Iterator[Finding]:
    """What a command prints, a finding a line; and one more where it breaks off or goes silent.

    It is ended then, and when the caller wants no more.
    """
    name = "shard worker"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            encoding="utf-8",
        )
        assert process.stdin is not None and process.stdout is not None
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()

        def read() -> None:
            with contextlib.suppress(ValueError):  # closed: nobody waits for more
                for line in process.stdout or ():
                    lines.put(line)
            lines.put("")

        threading.Thread(target=read, name="doctor", daemon=True).start()
        try:
            while line := lines.get(timeout=silence_timeout_s):
                yield Finding.from_json(line)
            code = process.wait(silence_timeout_s)
        except (queue.Empty, subprocess.TimeoutExpired):
            found = f"{_MODULE} has found nothing more for {silence_timeout_s:g} s"
            yield Finding(name, Verdict.PROBLEM, found, "see what hangs: a driver, or a full disk")
        else:
            if code not in (0, 1):
                complaints.seek(0)
                last = "".join(complaints.read().strip().splitlines()[-1:])
                found = f"{_MODULE} ended with exit code {code}: {last}"
                yield Finding(name, Verdict.PROBLEM, found, "install colrow anew")
        finally:
            process.terminate()
            for _ in range(2):  # it has trials to end first; one that hangs is not waited for
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_TIMEOUT_S)
                process.kill()
            process.stdin.close()
