"""The commands that ask a running cluster how it is: `status` and `health`."""

import contextlib
import json
import time
from typing import Annotated

import typer

from client.endpoint import DEFAULT_TARGET, Endpoint
from client.options import ApiKey, Json, Target, Tls
from colrow.errors import Unavailable

HEALTH_POLL_S = 0.2


def status(
    target: Target = None,
    tls: Tls = None,
    api_key: ApiKey = None,
    as_json: Json = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Keep showing it as it changes, until Ctrl-C.")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds between updates, with --watch.")
    ] = 1.0,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show which layer communicated how much.")
    ] = False,
    time_communication: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            metavar="STEPS",
            help="Have the communication of so many steps timed first, and show that too.",
        ),
    ] = None,
    tokens_per_step: Annotated[
        int,
        typer.Option(
            min=1, help="That are computed for it if nothing else runs; more than 1 are a prompt."
        ),
    ] = 1,
) -> None:
    """Show a running cluster: its state, and what each rank holds and has communicated.

    With --watch it is a live view: requests, KV cache, rates, and how busy each rank is.

    With --watch and --json it is one object a line.

    With --time-communication it says how long collectives take, by the path that they go: of steps of
    the requests that run, or of some that are made for it.

    Example: colrow status --watch --interval 2
    """
    from client.serving import connected, termination_interrupts
    from client.times_view import times_tables
    from client.views import console, message_data, status_tables

    out = console()
    endpoint = Endpoint(target or DEFAULT_TARGET, tls, api_key)
    if watch:
        if time_communication is not None:
            raise ValueError(f"time-communication = {time_communication}: leave out --watch")
        from client.watch import watch_cluster

        with contextlib.suppress(KeyboardInterrupt), termination_interrupts():  # meant to end so
            watch_cluster(endpoint, interval, out, as_json=as_json)
        return
    times = None
    with termination_interrupts(), connected(endpoint) as (colrow, _):
        if time_communication is not None:
            times = colrow.time_communication(time_communication, tokens_per_step=tokens_per_step)
        cluster = colrow.cluster()
    if as_json:
        data = message_data(cluster)
        if times is not None:
            data["communication_times"] = message_data(times)
        print(json.dumps(data, indent=2))
        return
    for table in status_tables(cluster, by_module=layers):
        out.print(table)
    if times is not None:
        for part in times_tables(times, by_module=layers):
            out.print(part)


def health(
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="HOST:PORT",
            help="The coordinator, or a worker.",
            show_default="localhost:50051",
        ),
    ] = None,
    tls: Tls = None,
    live: Annotated[
        bool, typer.Option("--live", help="Ask whether it runs, though it may not serve yet.")
    ] = False,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to ask again and again, until it does serve.")
    ] = 0.0,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds that an answer may take.")
    ] = 3.0,
) -> None:
    """Ask the gRPC health service: exit code 0 if it serves, 1 if it does not. For health checks.

    A coordinator whose workers are not all there is alive, but does not serve.

    Example: colrow health --target localhost:50061
    """
    deadline = time.monotonic() + wait
    with Endpoint(target or DEFAULT_TARGET, tls).connect() as colrow:
        while True:
            last = time.monotonic() >= deadline
            try:
                serving = colrow.healthy(timeout, live=live)
            except Unavailable:
                if last:
                    raise
            else:
                if serving or last:
                    break
            time.sleep(HEALTH_POLL_S)
    print("SERVING" if serving else "NOT_SERVING")
    if not serving:
        raise typer.Exit(1)
