"""What the command shows of a cluster: progress, and tables of what ranks hold and communicate.

Without a terminal there are no control codes: progress is a line now and then, tables are text.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from colrow.v1 import control_service_pb2, shard_plan_pb2, shard_worker_service_pb2, tensor_pb2

PLAIN_WIDTH = 132
PLAIN_INTERVAL_S = 5.0
COUNTED_TOTAL = 1000  # smaller totals of a progress are counts, larger ones bytes

AXIS_TITLES = {
    "q_heads": "query heads",
    "kv_heads": "KV heads",
    "mlp": "MLP",
    "vocab": "vocabulary",
}


def console(*, stderr: bool = False) -> Console:
    """A console that is as wide as its terminal, and of a fixed width where there is none."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=PLAIN_WIDTH)


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def exact_bytes(num_bytes: int) -> str:
    """To the byte, and readable: `136,761,984 (130.4 MiB)`."""
    return f"{num_bytes:,} ({mib(num_bytes)})" if num_bytes >= 2**20 else f"{num_bytes:,}"


def ranks_text(tp: int) -> str:
    return f"{tp} rank" if tp == 1 else f"{tp} ranks"


# --- progress ---------------------------------------------------------------------------------


class ProgressView(Protocol):
    """Shows `view(description, done, total)`: a bar, or now and then a line, per description."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *details: object) -> None: ...
    def __call__(self, description: str, done: int, total: int) -> None: ...


def progress_view(target: Console) -> ProgressView:
    return _Bars(target) if target.is_terminal else _Lines(target)


def _amount(done: int, total: int) -> str:
    if total == 0:
        return ""
    if total < COUNTED_TOTAL:
        return f"{done}/{total}"
    return mib(total) if done >= total else f"{mib(done)} of {mib(total)}"


class _Bars:
    def __init__(self, target: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=target,
        )
        self._tasks: dict[str, TaskID] = {}
        self._endless: list[TaskID] = []

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._end_endless()
        self._progress.stop()

    def __call__(self, description: str, done: int, total: int) -> None:
        amount = _amount(done, total)
        if description not in self._tasks:
            self._end_endless()
            self._tasks[description] = self._progress.add_task(
                description, total=total or None, amount=amount
            )
            if not total:
                self._endless.append(self._tasks[description])
        self._progress.update(
            self._tasks[description], completed=done, total=total or None, amount=amount
        )

    def _end_endless(self) -> None:
        """What is under way without a known total is over when something else begins."""
        for task in self._endless:
            self._progress.update(task, total=1, completed=1)
        self._endless.clear()


class _Lines:
    def __init__(self, target: Console) -> None:
        self._console = target
        self._last: dict[str, tuple[float, bool]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        pass

    def __call__(self, description: str, done: int, total: int) -> None:
        first = description not in self._last
        complete = total >= COUNTED_TOTAL and done >= total
        said_at, said_complete = self._last.get(description, (float("-inf"), False))
        due = total >= COUNTED_TOTAL and time.monotonic() - said_at >= PLAIN_INTERVAL_S
        if said_complete or not (first or complete or due):
            return
        self._last[description] = (time.monotonic(), complete)
        amount = _amount(done, total) if total >= COUNTED_TOTAL and done else ""
        self._console.print(f"{description} {amount}".rstrip(), markup=False)


def report_loading(view: ProgressView, cluster: control_service_pb2.Cluster) -> None:
    """What the workers have loaded, on a progress view."""
    for worker in cluster.workers:
        if worker.bytes_to_read:
            view(f"Loading rank {worker.rank}", worker.bytes_read, worker.bytes_to_read)


# --- what ranks own ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RankRow:
    """What one rank owns, however it was learnt: [start, stop) by axis, and bytes."""

    rank: int
    ranges: Mapping[str, tuple[int, int]]
    weight_bytes: int
    kv_bytes_per_token: int


def rank_rows(plan: shard_plan_pb2.ShardPlan) -> list[RankRow]:
    return [
        RankRow(
            shard.rank,
            {
                enum_name(shard_plan_pb2.Axis.DESCRIPTOR, r.axis): (r.start, r.stop)
                for r in shard.ranges
            },
            shard.weight_bytes,
            shard.kv_bytes_per_token,
        )
        for shard in plan.ranks
    ]


def rank_table(title: str, rows: Iterable[RankRow]) -> Table:
    """Ranges of every axis with their lengths, and bytes."""
    table = new_table(title, "rank")
    for axis_title in AXIS_TITLES.values():
        table.add_column(axis_title)
    table.add_column("weights, bytes", justify="right")
    table.add_column("KV, bytes a token", justify="right")
    for row in rows:
        table.add_row(
            str(row.rank),
            *(_range_text(*row.ranges[axis]) for axis in AXIS_TITLES),
            exact_bytes(row.weight_bytes),
            f"{row.kv_bytes_per_token:,}",
        )
    return table


def _range_text(start: int, stop: int) -> str:
    return f"[{start},{stop}) [dim]{stop - start}[/dim]"


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column)
    return table


# --- a running cluster ------------------------------------------------------------------------


def status_tables(cluster: control_service_pb2.Cluster, *, by_module: bool = False) -> list[Table]:
    """All that `GetCluster` answers, as tables; what was communicated also `by_module`."""
    tables = [_cluster_table(cluster)]
    if cluster.HasField("plan"):
        tables.append(rank_table("What each rank owns", rank_rows(cluster.plan)))
    tables.append(workers_table(cluster))
    tables.append(held_table(cluster))
    tables.append(memory_table(cluster))
    if any(worker.description.communication for worker in cluster.workers):
        tables.append(communication_table(cluster))
        if by_module:
            tables.append(communication_by_module_table(cluster))
    return tables


def _cluster_table(cluster: control_service_pb2.Cluster) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    state = enum_name(control_service_pb2.ClusterState.DESCRIPTOR, cluster.state)
    style = {"serving": "green", "failed": "red"}.get(state, "yellow")
    table.add_row("state", f"[{style}]{state}[/{style}] for {duration(cluster.state_age_s)}")
    if cluster.error:
        table.add_row("error", escape(cluster.error))
    plan, scheduler = cluster.plan, cluster.scheduler
    model = escape(cluster.model)
    if cluster.HasField("plan"):
        model += f" ({plan.architecture}, {data_type_name(plan)}, {ranks_text(plan.tp_size)})"
    table.add_row("model", model)
    recovered = ""
    if cluster.recoveries:
        took = f"{cluster.last_recovery_s:.1f} s"
        recovered = f"; formed anew {cluster.recoveries} times, in {took} the last time"
    table.add_row("epoch", f"{cluster.epoch}{recovered}")
    table.add_row("transport", transport_name(cluster))
    for note in link_notes(cluster):
        table.add_row("", escape(note))
    table.add_row("version", cluster.version)
    if cluster.HasField("scheduler"):
        table.add_row("requests", f"{scheduler.running} running, {scheduler.waiting} waiting")
        table.add_row(
            "KV cache",
            f"{scheduler.kv_blocks_used:,} of {scheduler.kv_blocks_total:,} blocks used, "
            f"{scheduler.kv_blocks_cached:,} more hold prefixes, {scheduler.block_size} tokens each",
        )
        if scheduler.prefix_queries:
            table.add_row(
                "prefix cache",
                f"{scheduler.prefix_hits:,} of {scheduler.prefix_queries:,} prompt tokens found "
                f"({scheduler.prefix_hits / scheduler.prefix_queries:.0%})",
            )
        table.add_row(
            "so far",
            f"{scheduler.steps:,} steps, {scheduler.prompt_tokens:,} prompt tokens, "
            f"{scheduler.generated_tokens:,} generated, {scheduler.preemptions:,} preemptions",
        )
    return table


def workers_table(cluster: control_service_pb2.Cluster) -> Table:
    """How far each worker is, and what went wrong with it."""
    table = new_table("How each worker is", "rank", "phase", "last heard of")
    for column in ("last step", "losses", "restarts"):
        table.add_column(column, justify="right")
    table.add_column("last error")
    for worker in cluster.workers:
        heard = worker.HasField("heard_age_s")
        error = f"{worker.error} ({duration(worker.error_age_s)} ago)" if worker.error else ""
        table.add_row(
            str(worker.rank),
            f"{phase_name(worker)} for {duration(worker.phase_age_s)}",
            f"{duration(worker.heard_age_s)} ago" if heard else "never",
            f"{worker.last_step_id:,}",
            str(worker.losses),
            str(worker.restarts),
            escape(error),
        )
    return table


def phase_name(worker: control_service_pb2.WorkerStatus) -> str:
    return enum_name(control_service_pb2.WorkerPhase.DESCRIPTOR, worker.phase)


def duration(seconds: float) -> str:
    """In the unit that fits: 0.4 s, 12 s, 3 min, 5 h, 2 d."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for size, unit, least in ((86400, "d", 172800), (3600, "h", 7200), (60, "min", 120)):
        if seconds >= least:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def held_table(cluster: control_service_pb2.Cluster) -> Table:
    """What each worker says it holds, which need not be what the plan says."""
    table = new_table("What each worker holds, in bytes", "rank", "address", "state")
    for column in ("weights", "KV cache", "resident", "read from files"):
        table.add_column(column, justify="right")
    for worker in cluster.workers:
        about = worker.description
        numbers = (
            exact_bytes(about.weight_bytes),
            mib(about.kv_cache_bytes),
            mib(about.resident_bytes),
            exact_bytes(about.file_bytes_read),
        )
        known = worker.HasField("description")
        state = enum_name(shard_worker_service_pb2.WorkerState.DESCRIPTOR, about.state)
        table.add_row(
            str(worker.rank),
            escape(worker.address),
            state if known else "no answer yet",
            *(numbers if known else ()),
        )
    return table


def memory_table(cluster: control_service_pb2.Cluster) -> Table:
    """What each worker's memory is for: held, and planned. What is not known is a dash."""
    uses = {
        "weights": "weights",
        "kv_cache": "KV cache",
        "graphs": "graphs",
        "workspace": "workspace, at most",
    }
    table = new_table("Memory of each worker, held / planned", "rank", "device")
    for title in uses.values():
        table.add_column(title, justify="right")
    for worker in cluster.workers:
        ledger = worker.description.memory
        table.add_row(
            str(worker.rank),
            escape(worker.description.device),
            *(_use_text(getattr(ledger, name)) for name in uses),
        )
    return table


def _use_text(use: shard_worker_service_pb2.MemoryUse) -> str:
    held = mib(use.actual_bytes) if use.HasField("actual_bytes") else "-"
    planned = mib(use.planned_bytes) if use.HasField("planned_bytes") else "-"
    return f"{held} / {planned}"


def communication_table(
    cluster: control_service_pb2.Cluster, planned_tokens: int | None = None
) -> Table:
    """Calls and payload of each rank, beside what the plan predicts for `planned_tokens`."""
    table = new_table("What was communicated, in bytes that a rank put in", "rank", "operation")
    table.add_column("calls", justify="right")
    table.add_column("bytes", justify="right")
    if planned_tokens is not None:
        table.add_column(f"the plan, for {planned_tokens} tokens", justify="right")
    per_token = cluster.plan.all_reduce_bytes_per_token
    for worker in cluster.workers:
        for operation, (calls, payload_bytes) in communicated(worker).items():
            planned = []
            if planned_tokens is not None and operation == "all_reduce":
                expected = per_token * planned_tokens
                sign = "=" if expected == payload_bytes else "≠"
                planned = [f"{sign} {per_token:,} x {planned_tokens} = {expected:,}"]
            table.add_row(str(worker.rank), operation, f"{calls:,}", f"{payload_bytes:,}", *planned)
    return table


def communicated(worker: control_service_pb2.WorkerStatus) -> dict[str, tuple[int, int]]:
    """Calls and bytes of one rank by operation, all modules together."""
    sums: dict[str, tuple[int, int]] = {}
    for stats in worker.description.communication:
        calls, payload_bytes = sums.get(stats.operation, (0, 0))
        sums[stats.operation] = calls + stats.calls, payload_bytes + stats.payload_bytes
    return sums


def communication_by_module_table(cluster: control_service_pb2.Cluster) -> Table:
    """A row for each module that communicates, a column for each rank's bytes.

    Where calls were timed, also how long one took on average on the rank that waited least for others.
    """
    table = new_table("By module, in bytes that a rank put in", "module", "operation", "path")
    table.add_column("calls", justify="right")
    for worker in cluster.workers:
        table.add_column(f"rank {worker.rank}", justify="right")
    rows: dict[tuple[str, str, str], dict[int, shard_worker_service_pb2.CommunicationStats]] = {}
    for worker in cluster.workers:
        for stats in worker.description.communication:
            key = stats.module, stats.operation, stats.path
            rows.setdefault(key, {})[worker.rank] = stats
    has_times = any(s.timed_calls for by_rank in rows.values() for s in by_rank.values())
    if has_times:
        table.add_column("µs a call, waiting included", justify="right")
    for (module, operation, path), by_rank in rows.items():
        calls = dict.fromkeys(f"{stats.calls:,}" for stats in by_rank.values())
        times = [s.timed_us / s.timed_calls for s in by_rank.values() if s.timed_calls]
        table.add_row(
            escape(module),
            operation,
            escape(path),
            " / ".join(calls),  # one number: a collective is one call of every rank
            *(
                f"{by_rank[worker.rank].payload_bytes:,}" if worker.rank in by_rank else "-"
                for worker in cluster.workers
            ),
            *((f"{min(times):,.1f}" if times else "-",) if has_times else ()),
        )
    return table


def link_notes(cluster: control_service_pb2.Cluster) -> list[str]:
    """Which ranks do not reach each other as they should."""
    return [
        f"rank {worker.rank} reaches rank {link.rank} by {link.path}: {link.note}"
        for worker in cluster.workers
        for link in worker.description.links
        if link.note
    ]


def transport_name(cluster: control_service_pb2.Cluster) -> str:
    name = enum_name(shard_worker_service_pb2.Transport.DESCRIPTOR, cluster.transport)
    return {"unspecified": "none yet", "single": "none (one rank)"}.get(
        name, name.replace("_", " ")
    )


# --- protobuf as plain data -------------------------------------------------------------------


def data_type_name(plan: shard_plan_pb2.ShardPlan) -> str:
    return enum_name(tensor_pb2.DataType.DESCRIPTOR, plan.data_type)


def enum_name(kind: EnumDescriptor, value: int) -> str:
    """`CLUSTER_STATE_SERVING` -> `serving`; a number that this version does not know stays one."""
    known = kind.values_by_number
    if value not in known:
        return str(value)
    prefix = known[0].name.removesuffix("UNSPECIFIED")
    return known[value].name.removeprefix(prefix).lower()


def message_data(message: Message) -> dict[str, Any]:
    """A message as data for JSON: all fields, numbers as numbers, enums by their short names.

    protobuf's own JSON writes 64-bit numbers as strings, which is in the way of scripts.
    """
    data: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            data[field.name] = None
            continue
        value = getattr(message, field.name)
        if field.is_repeated:
            data[field.name] = [_value_data(field, item) for item in value]
        else:
            data[field.name] = _value_data(field, value)
    return data


def _value_data(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return message_data(value)
    if field.enum_type is not None:
        return enum_name(field.enum_type, value)
    return value
