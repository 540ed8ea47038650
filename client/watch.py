"""`colrow status --watch`: a cluster as it works, until Ctrl-C, whatever becomes of the coordinator.

A thread follows the coordinator and connects again when it goes away; `Meter` makes rates out of the
counters of two updates; one of three views shows them: live on a terminal, a line an interval
elsewhere, or a JSON object a line.
"""

import dataclasses
import json
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from client.endpoint import Endpoint
from client.grpc_client import Colrow
from client.views import (
    communicated,
    duration,
    enum_name,
    message_data,
    new_table,
    phase_name,
    ranks_text,
)
from colrow.errors import ServiceError
from colrow.v1 import control_service_pb2

RETRY_S = 1.0
TICK_S = 0.5  # how often the live view says how old it is
BAR_WIDTH = 40

_STATES = control_service_pb2.ClusterState.DESCRIPTOR
_LOST = control_service_pb2.WORKER_PHASE_LOST


@dataclass(frozen=True, slots=True)
class Update:
    """The cluster at a time of the monotonic clock, or why nothing was heard of it."""

    at: float
    cluster: control_service_pb2.Cluster | None
    error: str | None = None

    @property
    def state(self) -> str:
        return "no answer" if self.cluster is None else enum_name(_STATES, self.cluster.state)


@dataclass(frozen=True, slots=True)
class RankRates:
    """What one rank did between two updates; `busy` is the share of the time that it spent in steps."""

    rank: int
    busy: float
    communicated_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened between two updates. The hit rate is None when no prompt was looked up."""

    seconds: float
    steps_per_s: float
    prompt_tokens_per_s: float
    generated_tokens_per_s: float
    prefix_hit_rate: float | None
    preemptions: int
    ranks: tuple[RankRates, ...]


def rates(before: Update, after: Update) -> Rates | None:
    """None where the two are not to be compared: counters begin anew with every epoch."""
    seconds = after.at - before.at
    if before.cluster is None or after.cluster is None or seconds <= 0:
        return None
    old, new = before.cluster.scheduler, after.cluster.scheduler
    if before.cluster.epoch != after.cluster.epoch or new.steps < old.steps:
        return None
    queries = new.prefix_queries - old.prefix_queries
    return Rates(
        seconds=seconds,
        steps_per_s=(new.steps - old.steps) / seconds,
        prompt_tokens_per_s=(new.prompt_tokens - old.prompt_tokens) / seconds,
        generated_tokens_per_s=(new.generated_tokens - old.generated_tokens) / seconds,
        prefix_hit_rate=(new.prefix_hits - old.prefix_hits) / queries if queries > 0 else None,
        preemptions=new.preemptions - old.preemptions,
        ranks=tuple(
            RankRates(
                rank=now.rank,
                # A step counts when it has ended, so that a long one can be more than the time.
                busy=min(1.0, max(0, now.busy_us - then.busy_us) / 1e6 / seconds),
                communicated_bytes_per_s=max(0, _bytes(now) - _bytes(then)) / seconds,
            )
            for then, now in zip(before.cluster.workers, after.cluster.workers, strict=False)
        ),
    )


def _bytes(worker: control_service_pb2.WorkerStatus) -> int:
    return sum(payload_bytes for _, payload_bytes in communicated(worker).values())


class Meter:
    """Rates of each update against the last one that lies most of an interval back.

    Changes of the state come in between; rates over milliseconds would say nothing.
    """

    def __init__(self, interval_s: float) -> None:
        self._least_s = interval_s / 2
        self._base: Update | None = None
        self._last: Rates | None = None

    def take(self, update: Update) -> Rates | None:
        base = self._base
        if base is None or base.cluster is None or update.cluster is None:
            self._base, self._last = update, None
        elif base.cluster.epoch != update.cluster.epoch or update.at - base.at >= self._least_s:
            self._base, self._last = update, rates(base, update)
        return self._last


# --- following --------------------------------------------------------------------------------


class Follower:
    """Puts updates of a coordinator in a queue, from a thread of its own.

    With `asks_workers` those of a cluster that serves have what the workers hold and have communicated
    by now, which costs a call to each.
    """

    def __init__(self, endpoint: Endpoint, interval_s: float, *, asks_workers: bool = True) -> None:
        self._endpoint = endpoint
        self._asks_workers = asks_workers
        self.updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        self._interval_s = interval_s
        self._stopped = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="follow", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                # A connection of its own each time: gRPC waits longer and longer before it tries one
                # again that has failed.
                with self._endpoint.connect() as colrow:
                    self._follow(colrow)
                reason = "the coordinator ended the call"
            except ServiceError as error:
                reason = str(error)
            self.updates.put(Update(time.monotonic(), None, reason))
            self._stopped.wait(RETRY_S)

    def _follow(self, colrow: Colrow) -> None:
        for cluster in colrow.watch(interval_s=self._interval_s):
            if self._stopped.is_set():
                return
            serves = cluster.state == control_service_pb2.CLUSTER_STATE_SERVING
            if serves and self._asks_workers:
                cluster = colrow.cluster()
            self.updates.put(Update(time.monotonic(), cluster))


# --- showing ----------------------------------------------------------------------------------


class View(Protocol):
    def show(self, update: Update, measured: Rates | None) -> None: ...
    def tick(self) -> None:
        """Called while nothing is heard."""


def watch_cluster(
    endpoint: Endpoint, interval_s: float, out: Console, *, as_json: bool = False
) -> None:
    """Shows the cluster until interrupted: live where `out` is a terminal that can do so."""
    target = endpoint.target
    if as_json:
        _watch(endpoint, interval_s, JsonView(target))
    elif not out.is_terminal or out.is_dumb_terminal:
        _watch(endpoint, interval_s, LineView(target, out, interval_s))
    else:
        with Live(console=out, auto_refresh=False) as live:
            _watch(endpoint, interval_s, LiveView(target, live))


def _watch(endpoint: Endpoint, interval_s: float, view: View) -> None:
    follower, meter = Follower(endpoint, interval_s), Meter(interval_s)
    follower.start()
    try:
        while True:
            try:
                update = follower.updates.get(timeout=TICK_S)
            except queue.Empty:
                view.tick()
            else:
                view.show(update, meter.take(update))
    finally:
        follower.stop()


class JsonView:
    """One object a line."""

    def __init__(self, target: str) -> None:
        self._target = target

    def show(self, update: Update, measured: Rates | None) -> None:
        print(json.dumps(update_data(self._target, update, measured)), flush=True)

    def tick(self) -> None:
        pass


def update_data(target: str, update: Update, measured: Rates | None) -> dict[str, Any]:
    return {
        "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "target": target,
        "error": update.error,
        "cluster": None if update.cluster is None else message_data(update.cluster),
        "rates": None if measured is None else dataclasses.asdict(measured),
    }


class LineView:
    """A line an interval, and one for each change of the state."""

    def __init__(self, target: str, out: Console, interval_s: float) -> None:
        self._target = target
        self._out = out
        self._least_s = 0.9 * interval_s
        self._said: Update | None = None

    def show(self, update: Update, measured: Rates | None) -> None:
        said = self._said
        same = said is not None and (said.state, said.error) == (update.state, update.error)
        # While nothing is heard the same is said once.
        early = said is not None and update.at - said.at < self._least_s
        if same and (early or update.cluster is None):
            return
        self._said = update
        line = update_line(self._target, update, measured)
        self._out.print(f"{datetime.now():%H:%M:%S} {line}", markup=False, soft_wrap=True)

    def tick(self) -> None:
        pass


def update_line(target: str, update: Update, measured: Rates | None) -> str:
    cluster = update.cluster
    if cluster is None:
        return f"{target} does not answer: {update.error}; trying again"
    parts = [update.state]
    if cluster.error:
        parts.append(cluster.error)
    parts += [
        f"worker {worker.rank} lost for {duration(worker.phase_age_s)}"
        for worker in cluster.workers
        if worker.phase == _LOST
    ]
    if cluster.HasField("scheduler"):
        scheduler = cluster.scheduler
        parts.append(f"{scheduler.running} running, {scheduler.waiting} waiting")
        parts.append(
            f"KV {scheduler.kv_blocks_used} used, {scheduler.kv_blocks_cached} cached of "
            f"{scheduler.kv_blocks_total}"
        )
    if measured is not None:
        parts.append(f"{measured.steps_per_s:.1f} steps/s")
        parts.append(
            f"{measured.prompt_tokens_per_s:.1f} prompt, "
            f"{measured.generated_tokens_per_s:.1f} generated tokens/s"
        )
        if measured.prefix_hit_rate is not None:
            parts.append(f"{measured.prefix_hit_rate:.0%} prefix hits")
        if measured.preemptions:
            parts.append(f"{measured.preemptions} preemptions")
        parts.append("busy " + " ".join(f"{rank.rank}: {rank.busy:.0%}" for rank in measured.ranks))
    return "; ".join(parts)


class LiveView:
    """Redraws itself in place."""

    def __init__(self, target: str, live: Live) -> None:
        self._target = target
        self._live = live
        self._shown: tuple[Update, Rates | None] | None = None
        self._lost: Update | None = None

    def show(self, update: Update, measured: Rates | None) -> None:
        if update.cluster is None:
            # What was known last stays in sight.
            self._lost = self._lost or update
        else:
            self._shown, self._lost = (update, measured), None
        self._draw(update.error)

    def tick(self) -> None:
        self._draw(self._lost.error if self._lost else None)

    def _draw(self, error: str | None) -> None:
        parts: list[Any] = []
        if self._shown is not None:
            update, measured = self._shown
            assert update.cluster is not None
            parts += dashboard(update.cluster, measured)
        if self._lost is not None:
            since = time.monotonic() - self._lost.at
            parts.append(
                f"[red]{escape(self._target)} does not answer since {since:.0f} s: "
                f"{escape(error or '')}[/red]"
            )
        elif not parts:
            parts.append(f"Waiting for {escape(self._target)}")
        parts.append("[dim]Ctrl-C ends this.[/dim]")
        self._live.update(Group(*parts), refresh=True)


def dashboard(cluster: control_service_pb2.Cluster, measured: Rates | None) -> list[Any]:
    """The whole view of one moment, as renderables."""
    state = enum_name(_STATES, cluster.state)
    style = {"serving": "bold green", "failed": "bold red"}.get(state, "bold yellow")
    head = Text.assemble(
        (state, style), "  ", (cluster.model, "bold"), f"  {ranks_text(len(cluster.workers))}"
    )
    parts: list[Any] = [head]
    if cluster.error:
        parts.append(Text(cluster.error, style="red"))
    if cluster.HasField("scheduler"):
        parts.append(_scheduler_grid(cluster.scheduler, measured))
    parts.append(_ranks_table(cluster, measured))
    return parts


def _scheduler_grid(
    scheduler: control_service_pb2.SchedulerStatus, measured: Rates | None
) -> Table:
    grid = Table(box=None, show_header=False)
    grid.add_column(style="bold")
    grid.add_column()
    grid.add_row("requests", f"{scheduler.running} running, {scheduler.waiting} waiting")
    used, cached = scheduler.kv_blocks_used, scheduler.kv_blocks_cached
    total = scheduler.kv_blocks_total
    cells = bar((used, cached), total, BAR_WIDTH)
    grid.add_row(
        "KV blocks",
        Text.assemble(
            ("█" * cells[0], "green"),
            ("▒" * cells[1], "cyan"),
            ("·" * (BAR_WIDTH - sum(cells)), "dim"),
            f"  {used:,} used, {cached:,} cached, {total - used - cached:,} free",
        ),
    )
    if measured is not None:
        grid.add_row(
            "now",
            f"{measured.steps_per_s:,.1f} steps/s, {measured.prompt_tokens_per_s:,.1f} prompt and "
            f"{measured.generated_tokens_per_s:,.1f} generated tokens/s",
        )
    hits, queries = scheduler.prefix_hits, scheduler.prefix_queries
    now = measured.prefix_hit_rate if measured else None
    grid.add_row(
        "prefix hits",
        (f"{hits / queries:.0%} of {queries:,} prompt tokens" if queries else "none yet")
        + (f", {now:.0%} now" if now is not None else ""),
    )
    preempted = f", {measured.preemptions} now" if measured and measured.preemptions else ""
    grid.add_row("preemptions", f"{scheduler.preemptions:,}{preempted}")
    grid.add_row(
        "so far",
        f"{scheduler.steps:,} steps, {scheduler.prompt_tokens:,} prompt and "
        f"{scheduler.generated_tokens:,} generated tokens",
    )
    return grid


def _ranks_table(cluster: control_service_pb2.Cluster, measured: Rates | None) -> Table:
    table = new_table("", "rank", "phase")
    for column in ("last step", "busy", "communicated", "restarts"):
        table.add_column(column, justify="right")
    table.add_column("last error")
    by_rank = {rank.rank: rank for rank in measured.ranks} if measured else {}
    for worker in cluster.workers:
        rank = by_rank.get(worker.rank)
        loading = worker.bytes_to_read and worker.bytes_read < worker.bytes_to_read
        phase = phase_name(worker)
        if loading and worker.phase == control_service_pb2.WORKER_PHASE_LOADING:
            phase += f" {worker.bytes_read / worker.bytes_to_read:.0%}"
        elif worker.phase != control_service_pb2.WORKER_PHASE_SERVING:
            phase += f" for {duration(worker.phase_age_s)}"
        table.add_row(
            str(worker.rank),
            Text(phase, style="red" if worker.phase == _LOST else ""),
            f"{worker.last_step_id:,}",
            f"{rank.busy:.0%}" if rank else "",
            f"{rank.communicated_bytes_per_s / 2**20:,.1f} MiB/s" if rank else "",
            str(worker.restarts),
            escape(f"{worker.error} ({duration(worker.error_age_s)} ago)" if worker.error else ""),
        )
    return table


def bar(counts: Sequence[int], total: int, width: int) -> list[int]:
    """Cells of a bar for each count; rounded so that they never add up to more than `width`."""
    cells: list[int] = []
    done = 0
    for count in counts:
        done += count
        cells.append(round(width * min(done, total) / total) - sum(cells) if total else 0)
    return cells
