"""`colrow chat` in a terminal, `colrow bench` and `colrow status --watch`, with real clusters."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from colrow.processor import processor_name
from tests.clusters import RunningCluster, WorkerPool, cluster, start

COMMAND = str(Path(sys.executable).with_name("colrow"))
TIMEOUT_S = 60.0

# Gives a command a terminal of its own, which is this process's stdin and stdout.
IN_TERMINAL = (
    "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])) & 0xff)"
)
CTRL_C, CTRL_D, ENTER, ALT_ENTER = "\x03", "\x04", "\r", "\x1b\r"


class Terminal:
    """A command in a terminal: what it has shown, and a keyboard."""

    def __init__(self, *command: str, term: str = "xterm-256color") -> None:
        environment = os.environ | {
            "TERM": term,
            "COLUMNS": "100",
            "LINES": "30",
            "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody here says where the cursor is
        }
        self.popen = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.shown = ""
        self._seen = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        while data := os.read(self.popen.stdout.fileno(), 65536):
            self.shown += data.decode(errors="replace")

    def type(self, keys: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(keys.encode())
        self.popen.stdin.flush()

    def wait_for(self, pattern: str) -> None:
        """Until it shows this after what was waited for last."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (found := re.search(pattern, self.shown[self._seen :], re.DOTALL)):
            assert time.monotonic() < deadline, self.shown
            assert self.popen.poll() is None, self.shown
            time.sleep(0.02)
        self._seen += found.end()

    def wait(self) -> int:
        code = self.popen.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        return code

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()


@contextlib.contextmanager
def chatting(target: str, *flags: str, term: str = "xterm-256color") -> Iterator[Terminal]:
    terminal = Terminal(COMMAND, "chat", "--target", target, *flags, term=term)
    try:
        yield terminal
    finally:
        terminal.close()


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "bench", *arguments], capture_output=True, text=True, timeout=2 * TIMEOUT_S
    )


# --- with clusters of their own ---------------------------------------------------------------


def test_chat_leaves_out_what_no_longer_fits(
    worker_pool: WorkerPool, demo_model_folder: Path
) -> None:
    with cluster(worker_pool, demo_model_folder, 1, "--max-model-len", "160") as small:
        questions = "\n".join(f"What is {number} and {number}?" for number in range(8))
        done = subprocess.run(
            [COMMAND, "chat", "--temperature", "0", "--max-tokens", "30", "--target", small.target],
            input=questions,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert done.returncode == 0, done.stderr
    assert "no longer fits the context of 160 tokens" in done.stderr
    assert done.stderr.count(" tokens in ") == 8


def test_bench_starts_and_stops_a_cluster(demo_cache_home: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    flags = ("--batch", "1", "--output-tokens", "4", "--repeats", "1", "--warmups", "0")
    done = subprocess.run(
        [COMMAND, "bench", "--tp", "1", "--dtype", "float32", *flags, "--json", str(file)],
        env=os.environ | {"XDG_CACHE_HOME": str(demo_cache_home)},
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    about = json.loads(file.read_text())["measured_on"]
    assert (about["tp_size"], about["data_type"]) == (1, "float32")


def test_bench_counts_requests_that_fail(worker_pool: WorkerPool, demo_model_folder: Path) -> None:
    flags = ("--max-running", "1", "--max-waiting", "2")
    with cluster(worker_pool, demo_model_folder, 1, *flags) as small:
        size = ("--input-tokens", "8", "--output-tokens", "8", "--requests", "12")
        done = bench("--target", small.target, "--rate", "inf", *size, "--repeats", "1")
    assert done.returncode == 1
    failed = re.search(r"all requests at once: (\d+) failed: RESOURCE_EXHAUSTED", done.stdout)
    assert failed is not None, done.stdout
    assert 0 < int(failed[1]) < 12


def test_watch_survives_the_coordinator(
    worker_pool: WorkerPool, demo_model_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "watch"
    with cluster(worker_pool, demo_model_folder, 1) as first:
        port = str(first.coordinator.port)
        popen = subprocess.Popen(
            [COMMAND, "status", "--watch", "--json", "--interval", "0.2", "--target", first.target],
            stdout=output.open("wb"),
        )
        try:
            wait_for_states(output, ["serving"])
        except BaseException:
            popen.kill()
            raise
    try:
        wait_for_states(output, ["serving", None])
        workers = ",".join(worker_pool.addresses(1))
        model = ("--model", str(demo_model_folder))
        again = start(
            "coordinator", "coordinator", *model, "--workers", workers, "--grpc-port", port
        )
        try:
            again.wait_for_port()
            wait_for_states(output, ["serving", None, "serving"])
        finally:
            again.stop()
    finally:
        popen.send_signal(signal.SIGINT)
        assert popen.wait(TIMEOUT_S) == 0


def wait_for_states(output: Path, wanted: list[str | None]) -> None:
    """Until the watch has gone through these states, with others between them."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        lines = output.read_text().splitlines(keepends=True)
        updates = [json.loads(line) for line in lines if line.endswith("\n")]
        states = [update["cluster"] and update["cluster"]["state"] for update in updates]
        left = iter(states)
        if all(state in left for state in wanted):
            return
        assert time.monotonic() < deadline, states
        time.sleep(0.05)


# --- with one that runs -----------------------------------------------------------------------


# After those with clusters of their own: they use the same workers.
@pytest.fixture(scope="module")
def served(worker_pool: WorkerPool, demo_model_folder: Path) -> Iterator[RunningCluster]:
    with cluster(worker_pool, demo_model_folder, 2) as running:
        yield running


def test_chat_in_a_terminal(served: RunningCluster) -> None:
    with chatting(served.target, "--temperature", "0", "--max-tokens", "1000") as terminal:
        terminal.wait_for("Ctrl-D leaves")
        terminal.type(f"What is the capital{ALT_ENTER}of Japan?{ENTER}")
        terminal.wait_for(r"Tokyo.*tokens in [\d.]+ s \(stop\), the first after")
        terminal.type(f"/settings temperature 1{ENTER}")
        terminal.wait_for("temperature 1.0")

        terminal.type(f"Write a very long story about a cat.{ENTER}")
        time.sleep(1.0)
        terminal.type(CTRL_C)
        terminal.wait_for(r"\d+ tokens in [\d.]+ s \(interrupted\)")
        deadline = time.monotonic() + TIMEOUT_S
        while served.client.cluster().scheduler.running:
            assert time.monotonic() < deadline, "the answer goes on"
            time.sleep(0.02)

        terminal.type(f"/stats{ENTER}")
        terminal.wait_for("2 answers of")
        terminal.type(CTRL_C)
        terminal.wait_for("/quit leaves")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0, terminal.shown
    assert "Traceback" not in terminal.shown


def test_chat_in_a_terminal_that_can_do_nothing(served: RunningCluster) -> None:
    with chatting(served.target, "--temperature", "0", term="dumb") as terminal:
        terminal.wait_for("Ctrl-D leaves.*> ")
        terminal.type("What is the capital of\\\nJapan?\n")
        terminal.wait_for(r"Tokyo.*\(stop\).*> ")
        terminal.type(CTRL_D)
        assert terminal.wait() == 0, terminal.shown
    assert "\x1b" not in terminal.shown
    assert "Traceback" not in terminal.shown


def test_chat_ends_when_it_is_told_to(served: RunningCluster) -> None:
    """SIGTERM is not Ctrl-C: it ends the chat and not the answer alone."""
    popen = subprocess.Popen(
        [COMMAND, "chat", "--target", served.target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert popen.stdin is not None
    popen.stdin.write("Write a very long story about a cat.\n")
    popen.stdin.flush()
    deadline = time.monotonic() + TIMEOUT_S
    while not served.client.cluster().scheduler.running:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    popen.terminate()
    _, errors = popen.communicate(timeout=TIMEOUT_S)
    assert popen.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors


def test_bench_of_a_running_cluster(served: RunningCluster, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    parts = ("--batch", "1,3", "--prompt", "20,70", "--rate", "20,inf", "--requests", "4")
    size = ("--input-tokens", "24", "--output-tokens", "32", "--repeats", "2")
    done = bench("--target", served.target, *parts, *size, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    for title in (
        "Decoding: 24 prompt tokens, 32 new",
        "Time to the first token",
        "Throughput: 24",
    ):
        assert title in done.stdout
    assert done.stderr.splitlines()[0] == "Measuring: batch 1"

    data = json.loads(file.read_text())
    about = data["measured_on"]
    assert (about["tp_size"], about["transport"], about["data_type"]) == (
        *(2, "shared memory"),
        "bfloat16",
    )
    assert about["devices"] == ["cpu", "cpu"]
    assert about["device_names"] == [processor_name()] * 2
    assert data["server_idle"]
    measured = {(m["kind"], m["value"]): m for m in data["measurements"]}
    assert set(measured) == {
        *(("decode", 1), ("decode", 3), ("prefill", 20), ("prefill", 70)),
        *(("throughput", 20.0), ("throughput", "inf")),
    }
    for (kind, value), measurement in measured.items():
        assert measurement["failed"] == 0, measurement["errors"]
        requests = {"decode": value, "prefill": 1, "throughput": 4}[kind]
        assert measurement["completed"] == 2 * requests
    for batch in (1, 3):
        check_steady(measured["decode", batch])
    assert measured["throughput", "inf"]["over_repeats"]["peak_concurrency"]["min"] == 4


def check_steady(measurement: dict[str, Any]) -> None:
    for repeat in measurement["repeats"]:
        steady = repeat["steady"]
        assert steady is not None
        # Two ways to count: by the arrivals of tokens, and by the coordinator's own steps.
        assert steady["steps"] / steady["seconds"] == pytest.approx(repeat["steps_per_s"], rel=0.3)
        assert -0.1 < repeat["control_share"] < 0.9
        assert 0 < steady["busy_s"] < 1.1 * steady["period_s"]


def test_bench_says_what_is_wrong_before_it_measures(served: RunningCluster) -> None:
    for flags, complaint in (
        (("--tp", "2"), "leave out MODEL, --tp, --device and --dtype"),
        (("--batch", "one"), "batch = 'one'"),
        (("--prompt", "100000"), "prompt = 100000: the context holds 8192"),
        (("--json", "/no/such/folder/x.json"), "its folder does not exist"),
    ):
        done = bench("--target", served.target, *flags)
        assert done.returncode == 1
        assert complaint in done.stderr
        assert "Traceback" not in done.stderr
        assert "Measuring" not in done.stderr
