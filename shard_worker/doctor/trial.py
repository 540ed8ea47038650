"""Runs what is to be tried in processes of their own, and ends them in time."""

import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0
_GRACE_S = 2.0  # for the other ranks, once one has failed, to say what they saw of it
_KILL_TIMEOUT_S = 1.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Trial:
    """What a rank of a probe told, in its order, and why it failed after that; "" if it did not."""

    told: tuple[dict[str, Any], ...]
    failure: str

    def value(self, name: str, default: Any = None) -> Any:
        """What it told under a name, the first time."""
        return next((line[name] for line in self.told if name in line), default)


def try_out(
    probe: str, *arguments: str, ranks: int = 1, timeout_s: float = TIMEOUT_S
) -> list[Trial]:
    """Runs one of `probe.PROBES`, a process for each rank; returns soon after timeout_s at most."""
    with tempfile.TemporaryDirectory(prefix="colrow-doctor-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        commands = [
            [
                *(sys.executable, "-P", "-m", "shard_worker.doctor.probe", probe),
                *(str(folder), str(rank), str(ranks), str(math.ceil(timeout_s)), *arguments),
            ]
            for rank in range(ranks)
        ]
        logs = [folder / f"{rank}.log" for rank in range(ranks)]
        codes = _run(commands, logs, timeout_s)
        trials = []
        for rank, code in enumerate(codes):
            results = folder / f"{rank}.results"
            text = results.read_text(encoding="utf-8") if results.exists() else ""
            told = tuple(json.loads(line) for line in text.splitlines(True) if line.endswith("\n"))
            said = next((line["failure"] for line in told if "failure" in line), "")
            trials.append(Trial(told, said or how_it_failed(code, _text(logs[rank]), timeout_s)))
        return trials


def failure_of(trials: Sequence[Trial]) -> str:
    """Why the ranks of a probe failed, by the one that can say it best; "" if none did."""
    failed = [(rank, trial) for rank, trial in enumerate(trials) if trial.failure]
    if not failed:
        return ""
    # One that waited in vain for another was killed, and knows nothing.
    rank, trial = next((one for one in failed if one[1].value("failure")), failed[0])
    return trial.failure if len(trials) == 1 else f"rank {rank}: {trial.failure}"


def output_of(command: Sequence[str], timeout_s: float = TIMEOUT_S) -> str | None:
    """What a command prints; None where there is no such command, or it fails or does not end."""
    with tempfile.TemporaryDirectory(prefix="colrow-doctor-", ignore_cleanup_errors=True) as made:
        output = Path(made) / "output"
        try:
            (code,) = _run([command], [output], timeout_s)
        except OSError:
            return None
        return _text(output) if code == 0 else None


def how_it_failed(code: int | None, log: str, timeout_s: float) -> str:
    """Of a process by its exit code, None if it had to be killed; "" if it did not fail."""
    if code == 0:
        return ""
    if code is None:
        return f"did not end within {timeout_s:g} s"
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
    how = f"ended with exit code {code}"
    if code < 0:
        how = f"was killed by signal {-code}"
        with contextlib.suppress(ValueError):  # one that Python has no name for
            how = f"was killed by {signal.Signals(-code).name}"
    return f"{how}: {last.strip()}" if last else how


def _run(
    commands: Sequence[Sequence[str]], logs: Sequence[Path], timeout_s: float
) -> list[int | None]:
    """The exit codes of the commands, run side by side; None for those that had to be killed."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                    )
                )
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in processes):
            if time.monotonic() >= deadline:
                break
            if any(process.returncode for process in processes):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            time.sleep(_POLL_S)
        return [process.returncode for process in processes]
    finally:
        for process in processes:
            process.kill()
            # One that is stuck within the driver can't be killed, and must not be waited for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_TIMEOUT_S)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")
