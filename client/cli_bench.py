"""The command that measures a cluster: `bench`."""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.endpoint import Endpoint
from client.options import DEVICE_HELP, ApiKey, DataTypeName, DeviceName, Model, Tls

if TYPE_CHECKING:
    from rich.console import Console

    from client.bench.report import Report
    from client.bench.workload import Workload
    from client.serving import Settings


def bench(
    model: Model = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="HOST:PORT",
            help="Measure this running coordinator.",
            show_default="one is started",
        ),
    ] = None,
    tls: Tls = None,
    api_key: ApiKey = None,
    tp: Annotated[
        int | None,
        typer.Option("--tp", min=1, help="Over how many ranks the model is cut.", show_default="2"),
    ] = None,
    device: Annotated[
        DeviceName | None, typer.Option("--device", help=DEVICE_HELP, show_default="auto")
    ] = None,
    dtype: Annotated[
        DataTypeName | None,
        typer.Option(
            "--dtype", help="Type of weights and KV cache.", show_default="the checkpoint's"
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Time per token, of so many requests at once."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Time to the first token, of prompts this long."),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Throughput, of so many requests a second that arrive at random; inf is all at once.",
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many requests at each --rate.")] = 32,
    input_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens, for --batch and --rate.")
    ] = 128,
    output_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens to generate, for --batch and --rate.")
    ] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 3,
    warmups: Annotated[int, typer.Option(min=0, help="Runs of each before that.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the times of arrival.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write everything that was measured here."),
    ] = None,
) -> None:
    """Measure how fast a cluster is: time per token, time to the first token, throughput.

    Without --batch, --prompt and --rate it takes --batch 1,8 --prompt 128,1024 --rate inf.

    Prompts are random tokens, and always new, so that the prefix cache can't help.

    Example: colrow bench --target localhost:50051 --batch 1,8 --rate 2,inf --json results.json
    """
    from client.bench.report import report_data
    from client.bench.workload import Workload, parse_counts, parse_rates
    from client.bench_view import report_tables
    from client.serving import DEFAULT_TP, Settings
    from client.views import console

    if target is not None and (model, tp, device, dtype) != (None, None, None, None):
        raise ValueError(
            f"target = {target!r}: has its model already; leave out MODEL, --tp, --device and --dtype"
        )
    if (batch, prompt, rate) == (None, None, None):
        batch, prompt, rate = "1,8", "128,1024", "inf"
    workload = Workload(
        batches=parse_counts("batch", batch),
        prompts=parse_counts("prompt", prompt),
        rates=parse_rates(rate),
        requests=requests,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        repeats=repeats,
        warmups=warmups,
        seed=seed,
    )
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ValueError(f"json = {str(json_file)!r}: its folder does not exist")
    measured: Endpoint | Settings = (
        Endpoint(target, tls, api_key)
        if target is not None
        else Settings(model, tp or DEFAULT_TP, device or "auto", dtype or "auto")
    )
    report = _measure(measured, workload, console(stderr=True))
    if json_file is not None:
        json_file.write_text(json.dumps(report_data(report), indent=1) + "\n")
    out = console()
    for part in report_tables(report):
        out.print(part)
    if report.num_failed:
        raise typer.Exit(1)


def _measure(what: "Endpoint | Settings", workload: "Workload", messages: "Console") -> "Report":
    """Of a cluster that runs there, or of one that is started for it."""
    from client.bench.report import run_bench
    from client.bench_view import BenchProgress
    from client.serving import connected, running, termination_interrupts

    with contextlib.ExitStack() as stack:
        stack.enter_context(termination_interrupts())
        endpoint = (
            what
            if isinstance(what, Endpoint)
            else stack.enter_context(running(what, messages)).local.endpoint
        )
        colrow, served = stack.enter_context(connected(endpoint))
        with BenchProgress(messages) as progress:
            return run_bench(colrow, served, workload, progress)
