"""The settings of a coordinator process. Nothing below this reads flags or the environment."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colrow.logs import FORMATS
from coordinator.model_spec import ITEMSIZES

DEFAULT_MAX_RUNNING = 256
DEFAULT_CPU_CACHE_MIB = 512
DEFAULT_GPU_MEMORY_UTILIZATION = 0.9
# Of a step. A GPU computes a long prompt faster in one step than in eight; on a CPU that would keep
# everybody else waiting for seconds.
DEFAULT_CPU_BATCHED_TOKENS = 1024
DEFAULT_GPU_BATCHED_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """`workers` are addresses host:port by rank; sizes are in bytes and tokens, times in seconds."""

    model: Path
    served_model_name: str
    workers: tuple[str, ...]
    host: str
    grpc_port: int
    dtype: str | None
    transport: str | None
    memory_weights: tuple[float, ...] | None
    memory_weighted: bool
    kv_cache_bytes: int | None
    gpu_memory_utilization: float
    load_format: str
    num_blocks: int | None
    block_size: int
    max_model_len: int | None
    max_batched_tokens: int | None
    max_running: int
    max_waiting: int
    prefix_caching: bool
    run_ahead: int
    startup_timeout_s: float
    step_timeout_s: float
    heartbeat_timeout_s: float
    recovery_timeout_s: float
    drain_timeout_s: float
    log_level: str
    log_format: str
    otlp_endpoint: str
    tls: Path | None
    client_cert_auth: bool
    worker_tls: Path | None
    api_keys: tuple[Path, ...]
    control_api_keys: tuple[Path, ...]
    http_port: int = 8000
    port_file: Path | None = None
    http_port_file: Path | None = None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="colrow coordinator",
        description="The coordinator: plans the shards of a model, drives the workers and serves "
        "users over gRPC and HTTP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model folder, readable by every worker")
    add("--served-model-name", help="id that clients see (default: the folder's name)")
    add(
        "--workers",
        required=True,
        help="worker addresses host:port, comma separated; their order is their rank",
    )
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--grpc-port", type=int, default=50051, help="port to listen on; 0 takes any")
    add(
        "--http-port",
        type=int,
        default=8000,
        help="port of the HTTP API, which is OpenAI's; 0 takes any",
    )
    add("--dtype", choices=("auto", *ITEMSIZES), default="auto", help="auto is the checkpoint's")
    add(
        "--transport",
        choices=("auto", "shm", "gloo", "nccl", "peer"),
        default="auto",
        help="how workers exchange activations; on one host auto is peer between GPUs (NCCL, and for "
        "small sums each other's memory) and shm between CPUs, across hosts nccl and gloo",
    )
    add(
        "--memory-weights",
        help="relative shares of the model by rank, comma separated; 'auto' takes each worker's "
        "available memory (default: equal shares)",
    )
    add(
        "--load-format",
        choices=("safetensors", "dummy"),
        default="safetensors",
        help="dummy fills the model with random weights and reads no file but its config.json",
    )
    add(
        "--kv-cache-mib",
        type=int,
        help=f"KV cache of each rank, at most (default: {DEFAULT_CPU_CACHE_MIB} on a CPU; on a GPU "
        "what is left, see --gpu-memory-utilization)",
    )
    add(
        "--gpu-memory-utilization",
        type=float,
        default=DEFAULT_GPU_MEMORY_UTILIZATION,
        help="the share of a GPU's memory that weights, KV cache, CUDA graphs and steps may take",
    )
    add("--num-blocks", type=int, help="blocks of KV cache (default: what --kv-cache-mib holds)")
    add("--block-size", type=int, default=16, help="tokens in a block of KV cache")
    add("--max-model-len", type=int, help="context length in tokens (default: the model's)")
    add(
        "--max-batched-tokens",
        type=int,
        help=f"tokens in a step, at most (default: {DEFAULT_CPU_BATCHED_TOKENS} on CPUs, "
        f"{DEFAULT_GPU_BATCHED_TOKENS} on GPUs)",
    )
    add(
        "--max-running",
        type=int,
        help=f"sequences in a step, at most (default: {DEFAULT_MAX_RUNNING}, or "
        "--max-batched-tokens if that is less)",
    )
    add(
        "--max-waiting",
        type=int,
        default=1024,
        help="sequences that wait to run; more are refused with RESOURCE_EXHAUSTED",
    )
    add(
        "--prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prompts that begin alike share their KV cache",
    )
    add("--run-ahead", type=int, default=2, help="steps sent before the oldest one is read")
    add("--startup-timeout", type=float, default=300.0, help="seconds for workers to come up")
    add("--step-timeout", type=float, default=60.0, help="seconds after which a step has failed")
    add(
        "--heartbeat-timeout",
        type=float,
        default=2.0,
        help="seconds without a sign of life after which a worker is lost",
    )
    add(
        "--recovery-timeout",
        type=float,
        default=120.0,
        help="seconds that requests wait for lost workers to be back before they fail",
    )
    add(
        "--drain-timeout",
        type=float,
        default=30.0,
        help="seconds that running requests have to end after SIGTERM; SIGINT waits for none",
    )
    add(
        "--tls",
        type=Path,
        metavar="DIR",
        help="serve gRPC and HTTP over TLS with DIR/tls.crt and DIR/tls.key; `colrow certs` makes them",
    )
    add(
        "--client-cert-auth",
        action="store_true",
        help="with --tls: hear only those whose certificate is of a CA in DIR/ca.crt (mutual TLS)",
    )
    add(
        "--worker-tls",
        type=Path,
        metavar="DIR",
        help="call the workers over mutual TLS: show DIR/tls.crt, check theirs by DIR/ca.crt",
    )
    add(
        "--api-keys",
        type=Path,
        action="append",
        metavar="FILE",
        help="hear only those who show a key of this file, which `colrow key` writes; it is read "
        "again when it changes. May be given several times",
    )
    add(
        "--control-api-keys",
        type=Path,
        action="append",
        metavar="FILE",
        help="the same for ControlService and channelz (default: those of --api-keys)",
    )
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    add("--log-format", choices=FORMATS, default="text", help="json is one object a line")
    add(
        "--otlp-endpoint",
        default="",
        metavar="URL",
        help="where to send traces over OTLP with gRPC: http://HOST:4317, or https over TLS; none "
        "are made without it",
    )
    add(
        "--port-file",
        type=Path,
        help="file to write the port to once it is bound, for --grpc-port 0",
    )
    add("--http-port-file", type=Path, help="the same for --http-port; it is written first")
    return parser


def parse(arguments: Sequence[str] | None = None) -> CoordinatorConfig:
    """The configuration that command line flags describe; ends the process on a wrong flag."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    positive = (
        "kv_cache_mib",
        "num_blocks",
        "block_size",
        "max_model_len",
        "max_batched_tokens",
        "max_running",
        "max_waiting",
        "run_ahead",
        "startup_timeout",
        "step_timeout",
        "heartbeat_timeout",
        "recovery_timeout",
        "drain_timeout",
    )
    for name in positive:
        value = getattr(flags, name)
        if value is not None and not 0 < value < 2**32:
            parser.error(f"--{name.replace('_', '-')} {value}: is not in (0, {2**32})")
    if not 0 < flags.gpu_memory_utilization <= 1:
        parser.error(f"--gpu-memory-utilization {flags.gpu_memory_utilization}: is not in (0, 1]")
    most = flags.max_batched_tokens or DEFAULT_MAX_RUNNING
    max_running = flags.max_running or min(DEFAULT_MAX_RUNNING, most)
    if flags.max_batched_tokens is not None and max_running > flags.max_batched_tokens:
        parser.error(
            f"--max-running {max_running}: a step has only --max-batched-tokens "
            f"{flags.max_batched_tokens}"
        )
    for name in ("grpc_port", "http_port"):
        port = getattr(flags, name)
        if not 0 <= port <= 65535:
            parser.error(f"--{name.replace('_', '-')} {port}: is not in [0, 65535]")
    workers = tuple(address.strip() for address in flags.workers.split(","))
    for address in workers:
        if not address.rpartition(":")[2].isdecimal() or not address.rpartition(":")[0]:
            parser.error(f"--workers {address!r}: is no host:port")
    if len(set(workers)) != len(workers):
        parser.error(f"--workers {flags.workers}: an address stands there twice")
    if flags.otlp_endpoint and not re.fullmatch(r"https?://[^\s/]+/?", flags.otlp_endpoint):
        parser.error(f"--otlp-endpoint {flags.otlp_endpoint!r}: is no http://HOST:PORT")
    if flags.client_cert_auth and flags.tls is None:
        parser.error("--client-cert-auth: needs --tls, whose ca.crt says whose certificates count")
    weights = None
    if flags.memory_weights not in (None, "auto"):
        try:
            weights = tuple(float(weight) for weight in flags.memory_weights.split(","))
        except ValueError:
            parser.error(f"--memory-weights {flags.memory_weights!r}: is neither auto nor numbers")
    return CoordinatorConfig(
        model=flags.model,
        served_model_name=flags.served_model_name or flags.model.resolve().name,
        workers=workers,
        host=flags.host,
        grpc_port=flags.grpc_port,
        dtype=None if flags.dtype == "auto" else flags.dtype,
        transport=None if flags.transport == "auto" else flags.transport,
        memory_weights=weights,
        memory_weighted=flags.memory_weights == "auto",
        kv_cache_bytes=None if flags.kv_cache_mib is None else flags.kv_cache_mib * 2**20,
        gpu_memory_utilization=flags.gpu_memory_utilization,
        load_format=flags.load_format,
        num_blocks=flags.num_blocks,
        block_size=flags.block_size,
        max_model_len=flags.max_model_len,
        max_batched_tokens=flags.max_batched_tokens,
        max_running=max_running,
        max_waiting=flags.max_waiting,
        prefix_caching=flags.prefix_caching,
        run_ahead=flags.run_ahead,
        startup_timeout_s=flags.startup_timeout,
        step_timeout_s=flags.step_timeout,
        heartbeat_timeout_s=flags.heartbeat_timeout,
        recovery_timeout_s=flags.recovery_timeout,
        drain_timeout_s=flags.drain_timeout,
        log_level=flags.log_level,
        log_format=flags.log_format,
        otlp_endpoint=flags.otlp_endpoint,
        tls=flags.tls,
        client_cert_auth=flags.client_cert_auth,
        worker_tls=flags.worker_tls,
        api_keys=tuple(flags.api_keys or ()),
        control_api_keys=tuple(flags.control_api_keys or flags.api_keys or ()),
        http_port=flags.http_port,
        port_file=flags.port_file,
        http_port_file=flags.http_port_file,
    )
