"""`colrow doctor` on this machine as it is, and with something wrong."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from colrow.finding import Finding, Verdict

COMMAND = str(Path(sys.executable).with_name("colrow"))
TIMEOUT_S = 120.0
GONE_TIMEOUT_S = 15.0

pytestmark = pytest.mark.timeout(300)


def free_ports() -> list[str]:
    """Two flags, of ports that are free now."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as other:
        grpc_port, http_port = (str(server.getsockname()[1]) for server in (one, other))
    return ["--grpc-port", grpc_port, "--http-port", http_port]


def environment(cache: Path, **changed: str) -> dict[str, str]:
    left_out = ("COLUMNS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"XDG_CACHE_HOME": str(cache)} | changed


def doctor(cache: Path, *flags: str, **changed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "doctor", *flags],
        env=environment(cache, **changed),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_a_machine_that_serves_has_no_problem_and_its_transports_are_tried(
    demo_cache_home: Path,
) -> None:
    done = doctor(demo_cache_home, "--json", *free_ports())
    data = json.loads(done.stdout)
    findings = {
        found["name"]: Finding(**(found | {"verdict": Verdict(found["verdict"])}))
        for found in data["findings"]
    }
    assert (done.returncode, data["problems"]) == (0, 0), done.stdout + done.stderr
    for name in ("transport shm", "transport gloo"):
        assert findings[name].verdict is Verdict.OK
        assert re.search(r"over 2 ranks verified; [\d,]+ µs", findings[name].found)
    for name in ("gRPC port", "HTTP port", "demo model", "gRPC stubs", "torch", "shared memory"):
        assert findings[name].verdict is Verdict.OK, findings[name]
    for finding in findings.values():
        assert finding.found
        assert bool(finding.advice) is (finding.verdict in (Verdict.WARNING, Verdict.PROBLEM))


def test_what_is_wrong_is_named_with_what_to_do(demo_cache_home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = doctor(
            demo_cache_home,
            *(*free_ports(), "--http-port", port),
            PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
        )
    assert done.returncode == 1, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert re.search(rf"HTTP port problem http-port {port} on 127\.0\.0\.1", text)
    assert "--http-port" in text
    # Where there is a GPU it is a problem too.
    assert re.search(r"torch's allocator (warning|problem) PYTORCH_CUDA_ALLOC_CONF", text)
    assert "unset PYTORCH_CUDA_ALLOC_CONF" in text
    assert re.search(r"\d problems? would keep `colrow serve` from working", text)


def test_without_torch_all_else_is_examined(demo_cache_home: Path, tmp_path: Path) -> None:
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    paths = filter(None, (str(tmp_path), os.environ.get("PYTHONPATH", "")))
    done = doctor(demo_cache_home, "--json", *free_ports(), PYTHONPATH=os.pathsep.join(paths))
    assert done.returncode == 1, done.stdout + done.stderr
    (problem,) = [f for f in json.loads(done.stdout)["findings"] if f["verdict"] == "problem"]
    assert problem["name"] == "torch"
    assert "pip install 'colrow[worker]'" in problem["advice"]


def test_a_doctor_that_is_killed_leaves_no_process(demo_cache_home: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [COMMAND, "doctor", *free_ports()],
        env=environment(demo_cache_home, TMPDIR=str(tmp_path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as popen:
        deadline = time.monotonic() + TIMEOUT_S
        children: list[psutil.Process] = []
        while len(children) < 2:  # the worker's side, and a trial of it
            assert popen.poll() is None and time.monotonic() < deadline
            children = psutil.Process(popen.pid).children(recursive=True)
            time.sleep(0.02)
        popen.kill()
    _, alive = psutil.wait_procs(children, timeout=GONE_TIMEOUT_S)
    for process in alive:
        process.kill()
    assert not alive
    assert not list(tmp_path.iterdir())
