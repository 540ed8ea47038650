"""The commands that start processes and stay: `serve`, `coordinator` and `worker`."""

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from client.options import DEVICE_HELP, DataType, DeviceName, MemoryWeights, Model, TensorParallel
from coordinator import config as coordinator_config

if TYPE_CHECKING:
    from client.serving import Settings

# Flags that `serve` hands on: their defaults are said once, where they are defined.
DEFAULTS = coordinator_config.parse(("--model", ".", "--workers", "unused:1"))

POLL_S = 0.2

Arguments = Annotated[list[str] | None, typer.Argument(metavar="FLAGS...")]


def serve(
    model: Model = None,
    tp: TensorParallel = 2,
    device: Annotated[DeviceName, typer.Option(help=DEVICE_HELP)] = "auto",
    dtype: DataType = "auto",
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any.")
    ] = DEFAULTS.grpc_port,
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the OpenAI-compatible API; 0 takes any.")
    ] = DEFAULTS.http_port,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = DEFAULTS.host,
    served_model_name: Annotated[
        str | None, typer.Option(help="Id that clients see.", show_default="MODEL's name")
    ] = None,
    kv_cache_mib: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="KV cache of each rank, at most.",
            show_default=f"{coordinator_config.DEFAULT_CPU_CACHE_MIB} on a CPU; on a GPU what "
            "--gpu-memory-utilization leaves",
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1,
            help="The share of a GPU's memory that weights, KV cache, CUDA graphs and steps may take.",
        ),
    ] = DEFAULTS.gpu_memory_utilization,
    block_size: Annotated[
        int, typer.Option(min=1, help="Tokens in a block of KV cache.")
    ] = DEFAULTS.block_size,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="Context length in tokens.", show_default="the model's"),
    ] = None,
    max_batched_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens in a step, at most.",
            show_default=f"{coordinator_config.DEFAULT_CPU_BATCHED_TOKENS} on CPUs, "
            f"{coordinator_config.DEFAULT_GPU_BATCHED_TOKENS} on GPUs",
        ),
    ] = None,
    max_running: Annotated[
        int, typer.Option(min=1, help="Sequences in a step, at most.")
    ] = DEFAULTS.max_running,
    memory_weights: MemoryWeights = None,
    transport: Annotated[
        Literal["auto", "shm", "gloo", "nccl", "peer"],
        typer.Option(
            help="How workers exchange activations; auto is peer (NCCL, and for small sums each "
            "other's memory) between GPUs, else shm."
        ),
    ] = "auto",
    load_format: Annotated[
        Literal["safetensors", "dummy"],
        typer.Option(help="dummy: random weights for MODEL's config.json, to measure speed."),
    ] = "safetensors",
    tls: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Serve gRPC and HTTP over TLS, and call the workers over mutual TLS, with a folder "
            "of `colrow certs`.",
            show_default="not encrypted",
        ),
    ] = None,
    client_cert_auth: Annotated[
        bool,
        typer.Option(
            "--client-cert-auth", help="With --tls: hear only those with a certificate of its CA."
        ),
    ] = False,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Hear only those who show a key of this file; see `colrow key`."
        ),
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(help="Of the log files of the processes."),
    ] = "info",
) -> None:
    """Serve a model: a coordinator and N shard workers on this machine, until Ctrl-C.

    Example: colrow serve Qwen/Qwen3-0.6B --tp 2
    """
    from client.serving import Settings
    from coordinator.access import what_is_open

    if client_cert_auth and tls is None:
        raise ValueError("client-cert-auth: needs --tls")
    flags = {
        "kv-cache-mib": kv_cache_mib,
        "gpu-memory-utilization": gpu_memory_utilization,
        "block-size": block_size,
        "max-model-len": max_model_len,
        "max-batched-tokens": max_batched_tokens,
        "max-running": max_running,
        "transport": transport,
        "load-format": load_format,
        "log-level": log_level,
    }
    coordinator_args = [
        argument
        for name, value in flags.items()
        if value is not None
        for argument in (f"--{name}", str(value))
    ]
    if client_cert_auth:
        coordinator_args.append("--client-cert-auth")
    settings = Settings(
        model=model,
        tp=tp,
        device=device,
        dtype=dtype,
        memory_weights=memory_weights,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        served_model_name=served_model_name,
        coordinator_args=coordinator_args,
        worker_args=("--log-level", log_level),
        tls=tls,
        api_keys=api_keys,
    )
    keys = () if api_keys is None else (api_keys,)
    access = replace(
        DEFAULTS,
        host=host,
        tls=tls,
        client_cert_auth=client_cert_auth,
        api_keys=keys,
        control_api_keys=keys,
        workers=(),
    )
    _serve_until_interrupted(settings, what_is_open(access))


def _serve_until_interrupted(settings: "Settings", open_to_all: Iterable[str]) -> None:
    """Starts a cluster, shows it, and starts workers again that end or hang. ClusterError as that does.

    open_to_all: what anybody who reaches it may do, in words.
    """
    from client.serving import how_to_call, running, termination_interrupts
    from client.views import console, held_table, rank_rows, rank_table

    out = console()
    with (
        contextlib.suppress(KeyboardInterrupt),  # that is how it is meant to end
        termination_interrupts(),
        running(settings, console(stderr=True)) as started,
    ):
        out.print(rank_table("What each rank owns", rank_rows(started.cluster.plan)))
        out.print(held_table(started.cluster))
        for line in open_to_all:
            out.print(f"Open: {line}", style="bold red", markup=False, soft_wrap=True)
        out.print(how_to_call(started.local, started.cluster), soft_wrap=True)
        try:
            while True:
                time.sleep(POLL_S)
                for message in started.local.supervise():
                    out.print(message, style="yellow", markup=False)
        except KeyboardInterrupt:
            out.print("Stopping.")
            raise


def coordinator(arguments: Arguments = None) -> None:
    """Start one coordinator, for workers that run elsewhere: what a container runs.

    Example: colrow coordinator --model demo --workers 10.0.0.1:50061,10.0.0.2:50061
    """
    flags = list(arguments or ())
    if {"-h", "--help"} & set(flags):
        _introduce(coordinator)
        coordinator_config.parse(flags)
    from coordinator.__main__ import main as coordinator_main

    raise typer.Exit(coordinator_main(_with_model_folder(flags)))


def worker(arguments: Arguments = None) -> None:
    """Start one shard worker, which waits for a coordinator: what a container runs.

    Example: colrow worker --host 0.0.0.0 --advertise-host 10.0.0.1
    """
    from client.local_cluster import require_worker_packages
    from shard_worker import config

    flags = list(arguments or ())
    if {"-h", "--help"} & set(flags):
        _introduce(worker)
    config.parse(flags)  # a wrong flag should not have to wait for torch
    require_worker_packages()
    from shard_worker.__main__ import main as worker_main

    raise typer.Exit(worker_main(flags))


def _introduce(command: Any) -> None:
    print("\n".join(line.strip() for line in command.__doc__.splitlines()))


def _with_model_folder(flags: Sequence[str]) -> list[str]:
    """The flags of a coordinator, with the folder of a `--model` that is a hub id or `demo`."""
    from client.model_source import resolve_model
    from client.serving import hub_name
    from client.views import console, progress_view

    changed = list(flags)
    for place, flag in enumerate(flags):
        name, has_value, value = flag.partition("=")
        if name != "--model" or not (has_value or flags[place + 1 :]):
            continue
        model = value if has_value else flags[place + 1]
        with progress_view(console(stderr=True)) as progress:
            folder = resolve_model(model, progress=progress)
        changed[place : place + (1 if has_value else 2)] = ["--model", str(folder)]
        if served_name := hub_name(model, folder):
            # In front, so that a name that was given counts.
            changed[:0] = ["--served-model-name", served_name]
        break
    return changed
