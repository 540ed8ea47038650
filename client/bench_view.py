"""What `colrow bench` shows: a progress bar, and a table for each kind of measurement."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from client.bench.distribution import Distribution
from client.bench.report import Report
from client.bench.traces import Measurement, control_share, measurement_title, steps_per_s
from client.views import new_table, ranks_text

DRAW_INTERVAL_S = 1.0
NOTHING = "-"


class BenchProgress:
    """Bars that are drawn when told to and never by a timer: who draws takes from what is measured."""

    def __init__(self, target: Console) -> None:
        self._console = target
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            console=target,
            auto_refresh=False,
        )
        self._tasks: dict[str, TaskID] = {}
        self._drawn_at = 0.0

    def __enter__(self) -> "BenchProgress":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
            self._drawn_at = 0.0
            if not self._console.is_terminal:
                self._console.print(f"Measuring: {name}", markup=False)
        self._progress.update(self._tasks[name], completed=done)
        due = time.monotonic() - self._drawn_at >= DRAW_INTERVAL_S
        if self._console.is_terminal and (due or done == total):
            self._progress.refresh()
            self._drawn_at = time.monotonic()


def report_tables(report: Report) -> Iterator[Table | str]:
    """Everything to print, in order."""
    about = report.measured_on
    yield (
        f"[bold]{escape(about['model'])}[/bold] ({about['architecture']}, {about['data_type']}) over "
        f"{ranks_text(about['tp_size'])}, transport: {about['transport']}, devices: "
        f"{', '.join(dict.fromkeys(about['devices']))} "
        f"({escape(', '.join(dict.fromkeys(about['device_names'])))}); measured from "
        f"{escape(about['client']['cpu'])}, {about['client']['cores']} cores"
    )
    if not report.server_idle:
        yield "[yellow]The server had other requests when this began.[/yellow]"
    for kind, make in (
        ("decode", _decode_tables),
        ("prefill", _prefill_tables),
        ("throughput", _throughput_tables),
    ):
        if measurements := [m for m in report.measurements if m.kind == kind]:
            yield from make(measurements)
    if report.measurements:
        yield (
            f"[dim]Times are in ms over all requests, rates are medians of "
            f"{report.workload.repeats} repeats. TTFT: time to the first token. TPOT: time per token "
            "after it. Pause: between two responses with tokens. Latency: of whole requests.[/dim]"
        )
    for measurement in report.measurements:
        for error in sorted(set(measurement.errors)):
            count = measurement.errors.count(error)
            what = measurement_title(measurement.kind, measurement.value)
            yield f"[red]{what}: {count} failed: {escape(error)}[/red]"


def _decode_tables(measurements: Sequence[Measurement]) -> Iterator[Table]:
    first = measurements[0]
    table = _table(
        f"Decoding: {first.input_tokens} prompt tokens, {first.output_tokens} new ones",
        "batch|tokens/s|min - max|steps/s|control plane|failed",
    )
    for m in measurements:
        rate = m.over_repeats(lambda repeat: repeat.decode_tokens_per_s)
        share = m.over_repeats(control_share)
        table.add_row(
            f"{m.value:g}",
            _median(rate),
            f"{rate.min:.1f} - {rate.max:.1f}" if rate else NOTHING,
            _median(m.over_repeats(steps_per_s)),
            f"{share.p50:.1%}" if share else NOTHING,
            _failed(m),
        )
    table.caption = "Control plane: the part of a step in which the slowest rank executed nothing."
    if not all(m.over_repeats(control_share) for m in measurements):
        table.caption += (
            " It is known where all of a batch decodes together, and nothing else does."
        )
    table.caption_justify = "left"
    yield table
    yield _latency_table("batch", measurements)


def _prefill_tables(measurements: Sequence[Measurement]) -> Iterator[Table]:
    table = _table(
        "Time to the first token", "prompt tokens|p50|p90|p99|min|max|prompt tokens/s|failed"
    )
    for m in measurements:
        ttft = m.ttft_s
        table.add_row(
            f"{m.input_tokens:,}",
            *_ms(ttft, "p50", "p90", "p99", "min", "max"),
            f"{m.input_tokens / ttft.p50:,.0f}" if ttft else NOTHING,
            _failed(m),
        )
    yield table


def _throughput_tables(measurements: Sequence[Measurement]) -> Iterator[Table]:
    first = measurements[0]
    table = _table(
        f"Throughput: {first.input_tokens} prompt tokens, {first.output_tokens} new ones, "
        f"{len(first.repeats[0].traces)} requests",
        "rate|requests/s|tokens/s|min - max|most at once|failed",
    )
    for m in measurements:
        tokens = m.over_repeats(lambda repeat: repeat.tokens_per_s)
        peak = m.over_repeats(lambda repeat: repeat.peak_concurrency)
        table.add_row(
            f"{m.value:g}",
            _median(m.over_repeats(lambda repeat: repeat.requests_per_s), 2),
            _median(tokens),
            f"{tokens.min:.1f} - {tokens.max:.1f}" if tokens else NOTHING,
            f"{peak.max:.0f}" if peak else NOTHING,
            _failed(m),
        )
    yield table
    yield _latency_table("rate", measurements)


def _latency_table(label: str, measurements: Sequence[Measurement]) -> Table:
    table = _table("", f"{label}|ms|p50|p90|p99|max")
    table.title = None
    for m in measurements:
        for name, values in (
            ("TTFT", m.ttft_s),
            ("TPOT", m.tpot_s),
            ("pause", m.pause_s),
            ("latency", m.latency_s),
        ):
            shown = f"{m.value:g}" if name == "TTFT" else ""
            table.add_row(shown, name, *_ms(values, "p50", "p90", "p99", "max"))
        table.add_section()
    return table


def _table(name: str, columns: str) -> Table:
    table = new_table(name)
    for column in columns.split("|"):
        table.add_column(column, justify="right")
    return table


def _ms(values: Distribution | None, *names: str) -> list[str]:
    if values is None:
        return [NOTHING] * len(names)
    figures = [1e3 * getattr(values, name) for name in names]
    return [f"{figure:,.1f}" if figure < 1000 else f"{figure:,.0f}" for figure in figures]


def _median(values: Distribution | None, digits: int = 1) -> str:
    return NOTHING if values is None else f"{values.p50:,.{digits}f}"


def _failed(measurement: Measurement) -> Any:
    count = len(measurement.errors)
    return f"[red]{count}[/red]" if count else "0"
