"""What `colrow status --time-communication` shows: how long collectives take, by path."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from client.views import new_table
from colrow.v1 import control_service_pb2


@dataclass(slots=True)
class _Row:
    calls: int = 0
    payload_bytes: int = 0
    own_us: float = 0.0
    waiting_us: float = 0.0

    def add(self, time: control_service_pb2.CommunicationTime) -> None:
        self.calls += time.calls
        self.payload_bytes += time.payload_bytes
        self.own_us += time.own_us
        self.waiting_us += sum(time.rank_us) / len(time.rank_us) - time.own_us


def times_tables(
    response: control_service_pb2.TimeCommunicationResponse, *, by_module: bool = False
) -> Iterator[Table | str]:
    """Everything to print, in order: by operation and path, and also `by_module`."""
    num_steps, step_us = response.num_steps, response.steps_us / response.num_steps
    steps = "one step" if num_steps == 1 else f"{num_steps:,} steps"
    tokens = response.num_tokens / num_steps
    about = (
        f"{steps} that {'was' if num_steps == 1 else 'were'} timed, of {tokens:,.4g} "
        f"token{'' if tokens == 1 else 's'} and {step_us:,.0f} µs{' each' if num_steps > 1 else ''}"
    )
    if not response.times:
        yield f"In {about}, nothing was communicated: one rank has nobody to talk to."
        return
    yield _table(f"Communication in {about}", response, ())
    if by_module:
        yield _table("By module", response, ("module",))
    yield (
        "A call takes as long as on the rank where it is shortest: the last one to call waits for none "
        "of the others. What the others wait is a column of its own, the mean of the ranks."
    )


def _table(
    title: str,
    response: control_service_pb2.TimeCommunicationResponse,
    further: tuple[str, ...],
) -> Table:
    keys = (*further, "operation", "path")
    rows: dict[tuple[str, ...], _Row] = {}
    for time in response.times:
        rows.setdefault(tuple(getattr(time, key) for key in keys), _Row()).add(time)
    table = new_table(title, *keys)
    for column in (
        "calls a step",
        "bytes a step",
        "µs a call",
        "µs a step",
        "of the step",
        "waiting, µs a step",
    ):
        table.add_column(column, justify="right")
    num_steps = response.num_steps
    for key, row in rows.items():
        table.add_row(
            *map(escape, key),
            f"{row.calls / num_steps:,.4g}",
            f"{row.payload_bytes / num_steps:,.0f}",
            f"{row.own_us / row.calls:,.1f}",
            f"{row.own_us / num_steps:,.1f}",
            f"{row.own_us / response.steps_us:.1%}",
            f"{row.waiting_us / num_steps:,.1f}",
        )
    return table
