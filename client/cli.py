"""The `colrow` command.

Modules that take long to import are imported by the commands that need them, or `--help` would wait
for them.
"""

import json
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from client.cli_access import certs, key
from client.cli_bench import bench
from client.cli_doctor import doctor
from client.cli_generate import chat, generate
from client.cli_processes import coordinator, serve, worker
from client.cli_status import health, status
from client.errors import ClusterError
from client.options import (
    ApiKey,
    DataType,
    Json,
    MemoryWeights,
    Model,
    Target,
    TensorParallel,
    Tls,
)
from colrow import __version__
from colrow.errors import ServiceError

DEMO_QUESTION = "How do plants make food?"


class _ErrorsInOneLine(TyperGroup):
    """Says what went wrong in one line where a user can have caused it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ServiceError, ValueError, ClusterError) as error:
            print(f"colrow: {error}", file=sys.stderr)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_ErrorsInOneLine,
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


def demo(
    tp: TensorParallel = 2,
    question: Annotated[str, typer.Option(help="What to ask.")] = DEMO_QUESTION,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer, at most.")] = 96,
) -> None:
    """Serve the demo model on the CPU, ask it, and show what each rank held and what it communicated.

    Example: colrow demo --tp 3
    """
    from client.demo import run_demo
    from client.serving import termination_interrupts

    with termination_interrupts():
        run_demo(tp, question, max_tokens)


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


for _command in (
    *(serve, demo, generate, chat, status, bench, plan, layer),
    *(doctor, health, fetch, certs, key),
):
    app.command()(_command)

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
