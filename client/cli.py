"""The `colrow` command.

Modules that take long to import are imported by the commands that need them, or `--help` would wait
for them.
"""

import contextlib
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from client.cli_access import certs, key
from client.cli_doctor import doctor
from client.cli_processes import coordinator, serve, worker
from client.endpoint import DEFAULT_TARGET, Endpoint
from client.errors import ClusterError
from client.options import (
    ApiKey,
    DataType,
    DataTypeName,
    Json,
    MemoryWeights,
    MinP,
    Model,
    Seed,
    System,
    Target,
    Temperature,
    TensorParallel,
    Tls,
    TopK,
    TopP,
)
from colrow import __version__
from colrow.errors import ServiceError, Unavailable

HEALTH_POLL_S = 0.2
DEMO_QUESTION = "How do plants make food?"


class _Group(TyperGroup):
    """Says what went wrong in one line where a user can have caused it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ServiceError, ValueError, ClusterError) as error:
            print(f"colrow: {error}", file=sys.stderr)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"colrow {__version__}")
        raise typer.Exit


@app.callback()
def _colrow(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """Serves language models with tensor parallelism.

    Every weight matrix is cut along its columns or its rows; each shard worker holds one cut.

    Example, to begin with: colrow demo
    """


app.command()(serve)
app.command()(certs)
app.command()(key)
app.command()(doctor)


@app.command()
def demo(
    tp: TensorParallel = 2,
    question: Annotated[str, typer.Option(help="What to ask.")] = DEMO_QUESTION,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer, at most.")] = 96,
) -> None:
    """Serve the demo model, ask it, and show what each rank held and what was communicated.

    Example: colrow demo --tp 3
    """
    from client.demo import run_demo
    from client.serving import termination_interrupts

    with termination_interrupts():
        run_demo(tp, question, max_tokens)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue or answer; - reads stdin.")],
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Render PROMPT with the model's chat template, or take it as it is.",
            show_default="chat if the model has a template",
        ),
    ] = None,
    system: System = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 256,
    min_tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens to generate before the text may end.")
    ] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1: what the prompt or the text has already becomes less likely."),
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Above 0: what the text has already becomes less likely.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="The same, for each time that the text has it.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the text before this one. May be given several times."),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on where the model would end.")
    ] = False,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many continuations.")] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Show how likely each token was, and the N likeliest in its place.",
        ),
    ] = None,
    target: Target = None,
    tls: Tls = None,
    api_key: ApiKey = None,
) -> None:
    """Stream the answer to a prompt.

    With no cluster running, the demo model is started for it.

    Example: colrow generate "What is the capital of Japan?" --max-tokens 32
    """
    from client.answer import logprobs_table, stream_answer
    from client.serving import connected_or_demo, termination_interrupts
    from client.views import console

    text = sys.stdin.read() if prompt == "-" else prompt
    messages = console(stderr=True)
    with (
        termination_interrupts(),
        connected_or_demo(target, tls, api_key, messages) as (colrow, model),
    ):
        as_chat = model.has_chat_template if chat is None else chat
        if system is not None and not as_chat:
            raise ValueError("system: needs a chat; leave out --raw, or the model has no template")
        asked: Any = text
        if as_chat:
            asked = [{"role": "system", "content": system}] if system is not None else []
            asked.append({"role": "user", "content": text})
        answer = stream_answer(
            colrow,
            asked,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            stop=stop,
            ignore_eos=ignore_eos,
            n=n,
            logprobs=logprobs,
        )
        if logprobs is not None:
            text_of = functools.cache(lambda token: colrow.detokenize([token]))
            for index, tokens in enumerate(answer.logprobs):
                title = "Tokens" if n == 1 else f"Tokens of {index + 1}"
                console().print(logprobs_table(title, tokens, text_of))
        messages.print(answer.summary, style="dim")


@app.command()
def chat(
    system: System = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 1024,
    temperature: Temperature = 0.6,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    target: Target = None,
    tls: Tls = None,
    api_key: ApiKey = None,
) -> None:
    """Talk with the model, in turns.

    Ctrl-C stops an answer, Ctrl-D leaves, /help lists what else there is.

    Without a terminal each line of stdin is a question.

    With no cluster running, the demo model is started for it.

    Example: colrow chat --system "Answer in one sentence."
    """
    from client.chat import Chat, make_reader
    from client.serving import connected_or_demo, termination_interrupts
    from client.views import console

    messages = console(stderr=True)
    settings = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }
    with (
        termination_interrupts(SystemExit),  # an interrupt ends the answer only
        connected_or_demo(target, tls, api_key, messages) as (colrow, model),
    ):
        Chat(colrow, model, messages, system=system, settings=settings).run(make_reader(messages))


@app.command()
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


@app.command()
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
    from client.endpoint import DEFAULT_TARGET, Endpoint

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


@app.command()
def fetch(model: Model = None) -> None:
    """Download or convert a model, unless that is done, and print its folder.

    Commands that take a MODEL do it themselves; this is for doing it beforehand.

    Example: colrow fetch Qwen/Qwen3-0.6B
    """
    from client.model_source import resolve_model
    from client.serving import termination_interrupts
    from client.views import console, progress_view

    with termination_interrupts(), progress_view(console(stderr=True)) as progress:
        folder = resolve_model(model, progress=progress)
    print(folder)


@app.command()
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
    from client.bench.report import report_data, run_bench
    from client.bench.workload import Workload, parse_counts, parse_rates
    from client.bench_view import BenchProgress, report_tables
    from client.serving import Settings, connected, running, termination_interrupts
    from client.views import console

    if target is not None and (model, tp, dtype) != (None, None, None):
        raise ValueError(
            f"target = {target!r}: has its model already; leave out MODEL, --tp and --dtype"
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
    messages = console(stderr=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(termination_interrupts())
        if target is None:
            settings = Settings(model=model, tp=tp or 2, dtype=dtype or "auto")
            endpoint = stack.enter_context(running(settings, messages)).local.endpoint
        else:
            endpoint = Endpoint(target, tls, api_key)
        colrow, served = stack.enter_context(connected(endpoint))
        with BenchProgress(messages) as progress:
            report = run_bench(colrow, served, workload, progress)
    if json_file is not None:
        json_file.write_text(json.dumps(report_data(report), indent=1) + "\n")
    out = console()
    for part in report_tables(report):
        out.print(part)
    if report.num_failed:
        raise typer.Exit(1)


@app.command()
def plan(
    model: Model = None,
    tp: TensorParallel = 2,
    dtype: DataType = "auto",
    memory_weights: MemoryWeights = None,
    as_json: Json = False,
) -> None:
    """Show how a model would be cut over N ranks, from its config.json alone.

    Neither its weights nor a cluster are needed.

    Example: colrow plan Qwen/Qwen3-0.6B --tp 4
    """
    from client.plan_view import load_spec, plan_data, plan_summary, plan_tables
    from client.serving import parse_memory_weights
    from client.views import console, progress_view
    from coordinator.shard_plan import make_plan

    with progress_view(console(stderr=True)) as progress:
        spec = load_spec(model, progress)
    if memory_weights == "auto":
        raise ValueError("memory-weights = 'auto': only running workers know their memory")
    cut = make_plan(
        spec,
        tp,
        dtype=None if dtype == "auto" else dtype,
        memory_weights=parse_memory_weights(memory_weights),
    )
    if as_json:
        print(json.dumps(plan_data(cut), indent=2))
        return
    out = console()
    for table in plan_tables(cut):
        out.print(table)
    for line in plan_summary(cut):
        out.print(line)


@app.command()
def layer(
    layer: Annotated[
        str, typer.Argument(help="A layer's number, or a module outside of them: lm_head.")
    ],
    module: Annotated[
        str,
        typer.Argument(
            help="Within the layer: mlp.down_proj, self_attn.", show_default="the whole layer"
        ),
    ] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of noise to send through.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    target: Target = None,
    tls: Tls = None,
    api_key: ApiKey = None,
) -> None:
    """Look inside a layer: each rank's partial output, and what the partial outputs combine to.

    It sends seeded noise through the layer, or through one module of it.

    With no cluster running, the demo model is started for it.

    Example: colrow layer 3 mlp.down_proj
    """
    from client.layer_view import show_layer
    from client.serving import connected_or_demo, termination_interrupts
    from client.views import console

    number = int(layer) if layer.isdecimal() else None
    name = module if number is not None else ".".join(filter(None, (layer, module)))
    with (
        termination_interrupts(),
        connected_or_demo(target, tls, api_key, console(stderr=True)) as (colrow, _),
    ):
        response = colrow.run_layer(layer=number, module=name, num_tokens=tokens, seed=seed)
        show_layer(console(), response)


for _service in (coordinator, worker):
    app.command(
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        add_help_option=False,  # the service explains its own flags
    )(_service)


def main() -> None:
    if sys.argv[1:2] not in (["coordinator"], ["worker"]):
        # gRPC tells on stderr of every handshake that fails, beside our own line. Read at its import.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    app(prog_name="colrow")


if __name__ == "__main__":
    main()
