"""What `colrow doctor` shows, and how it reads what the worker's side finds."""

import socket
import sys
import time
from collections.abc import Iterator, Sequence

import pytest
from rich.console import Console

from client import doctor
from client.doctor import demo_model_finding, findings_of, port_finding
from client.doctor_view import findings_data, findings_summary, findings_table
from colrow.finding import Finding, Verdict

FINE = Finding("shm", Verdict.OK, "24 µs")
SLOW = Finding("links", Verdict.WARNING, "cuda:0-1: [SYS]", "choose others")
BROKEN = Finding("torch", Verdict.PROBLEM, "built for CPUs", "pip install 'colrow[cuda13]'")
NONE = Finding("GPUs", Verdict.NOT_HERE, "none")


def command(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def shown(findings: list[Finding]) -> str:
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(findings_table(findings))
    return capture.get()


def test_a_finding_is_the_same_after_a_line_of_json() -> None:
    for finding in (FINE, SLOW, BROKEN, NONE):
        assert Finding.from_json(finding.to_json()) == finding
    for line in ("", "{}", "[1]", '{"name": "x", "verdict": "fine", "found": ""}'):
        with pytest.raises(ValueError):
            Finding.from_json(line)


def test_the_table_has_every_finding_as_it_is_written() -> None:
    text = shown([FINE, SLOW, BROKEN, NONE])
    for part in ("24 µs", "[SYS]", "choose others", "problem", "'colrow[cuda13]'", "not here"):
        assert part in text


@pytest.mark.parametrize(
    ("findings", "summary"),
    [
        ([FINE, NONE], "Nothing would keep `colrow serve` from working."),
        ([FINE, SLOW], "Nothing would keep `colrow serve` from working, 1 warning."),
        ([BROKEN, SLOW, SLOW], "1 problem would keep `colrow serve` from working, 2 warnings."),
        ([BROKEN, BROKEN], "2 problems would keep `colrow serve` from working."),
    ],
)
def test_the_summary_counts(findings: list[Finding], summary: str) -> None:
    assert findings_summary(findings) == summary


def test_data_has_all_of_it() -> None:
    data = findings_data([BROKEN, SLOW])
    assert (data["problems"], data["warnings"]) == (1, 1)
    assert data["findings"][0] == {
        "name": "torch",
        "verdict": "problem",
        "found": "built for CPUs",
        "advice": "pip install 'colrow[cuda13]'",
    }


def test_a_taken_port_is_a_problem_that_names_the_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        finding = port_finding("HTTP port", "127.0.0.1", port, "http-port")
        assert finding.verdict is Verdict.PROBLEM
        assert str(port) in finding.found and "--http-port" in finding.advice
    assert port_finding("HTTP port", "127.0.0.1", port, "http-port").verdict is Verdict.OK


def test_without_the_package_of_the_demo_model_a_model_has_to_be_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    monkeypatch.setattr("client.demo_model._SOURCE_PACKAGE", "no_such_package")
    finding = demo_model_finding()
    assert finding.verdict is Verdict.WARNING and "MODEL" in finding.advice


def test_findings_come_as_they_are_printed() -> None:
    lines = f"{FINE.to_json()}\n{BROKEN.to_json()}\n"
    ended = command(f"import sys; sys.stdout.write({lines!r}); sys.exit(1)")
    assert list(findings_of(ended, 30)) == [FINE, BROKEN]


def test_silence_is_a_problem_after_what_was_found_before() -> None:
    began = time.monotonic()
    silent = command(f"import time; print({FINE.to_json()!r}, flush=True); time.sleep(60)")
    first, second = findings_of(silent, 2.0)
    assert first == FINE
    assert second.verdict is Verdict.PROBLEM and "nothing more for 2 s" in second.found
    assert time.monotonic() - began < 20


def test_an_end_in_the_middle_is_a_problem_with_the_last_words() -> None:
    (finding,) = findings_of(command("raise SystemExit(3)"), 30)
    assert finding.verdict is Verdict.PROBLEM and "exit code 3" in finding.found
    (finding,) = findings_of(command("import sys; print('no', file=sys.stderr); sys.exit(7)"), 30)
    assert finding.found.endswith("exit code 7: no")


@pytest.mark.parametrize(
    ("visible", "flags"), [(None, []), ("", ["--visible-devices="]), ("1", ["--visible-devices=1"])]
)
def test_the_workers_side_is_told_which_gpus_are_visible(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, flags: list[str]
) -> None:
    commands: list[Sequence[str]] = []

    def findings_of(command: Sequence[str], silence_timeout_s: float) -> Iterator[Finding]:
        commands.append(command)
        return iter(())

    monkeypatch.setattr(doctor, "findings_of", findings_of)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    list(doctor.examine("127.0.0.1", 0, 0))
    (command,) = commands
    assert command[command.index("--json") + 1 :] == flags
