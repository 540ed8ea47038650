"""What `colrow doctor` shows of findings: a table, or data."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from client.views import new_table
from colrow.finding import Finding, Verdict

_STYLES = {
    Verdict.OK: "green",
    Verdict.WARNING: "yellow",
    Verdict.PROBLEM: "bold red",
    Verdict.NOT_HERE: "dim",
}


def findings_table(findings: Sequence[Finding]) -> Table:
    """Every finding; what to do where something is to be done."""
    table = new_table("This machine")
    for column in ("", "verdict"):
        table.add_column(column, no_wrap=True)
    for column in ("found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        style = _STYLES[finding.verdict]
        table.add_row(
            escape(finding.name),
            f"[{style}]{finding.verdict}[/{style}]",
            escape(finding.found),
            escape(finding.advice),
        )
    return table


def findings_summary(findings: Sequence[Finding]) -> str:
    """In a line: whether `colrow serve` would work."""
    counts = Counter(finding.verdict for finding in findings)
    problems, warnings = counts[Verdict.PROBLEM], counts[Verdict.WARNING]
    ends = f", {_number(warnings, 'warning')}" if warnings else ""
    if problems:
        return f"{_number(problems, 'problem')} would keep `colrow serve` from working{ends}."
    return f"Nothing would keep `colrow serve` from working{ends}."


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def findings_data(findings: Sequence[Finding]) -> dict[str, Any]:
    """For JSON."""
    counts = Counter(finding.verdict for finding in findings)
    return {
        "problems": counts[Verdict.PROBLEM],
        "warnings": counts[Verdict.WARNING],
        "findings": [asdict(finding) for finding in findings],
    }
