"""The settings of a worker process. Nothing below this reads flags or the environment."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from colrow.logs import FORMATS


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """`advertise_host` is the address under which the other ranks reach this worker's data plane.

    Without `model_roots` models are loaded from any folder.
    """

    host: str
    port: int
    advertise_host: str
    device: str
    cuda_graphs: bool
    num_threads: int
    peer_timeout_s: float
    """How long a collective waits for the other ranks, over every transport but NCCL."""
    lease_s: float
    abort_timeout_s: float
    log_level: str
    log_format: str
    port_file: Path | None = None
    tls: Path | None = None
    tls_client: str = "coordinator"
    model_roots: tuple[Path, ...] = ()
    expandable_segments: tuple[str, str] | None = None
    """The environment's variable that has torch use them, and its value."""


_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def expandable_segments(environ: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """The variable, and its value, that has torch's allocator use expandable segments; else None."""
    for variable in _ALLOCATOR_VARIABLES:
        value = environ.get(variable, "")
        # Of the form `name:value,name:value`, with spaces anywhere.
        if "expandable_segments:True" in "".join(value.split()).split(","):
            return variable, value
    return None


def parse(arguments: Sequence[str] | None = None) -> WorkerConfig:
    """The configuration that command line flags describe; ends the process on a wrong flag."""
    parser = argparse.ArgumentParser(
        prog="colrow worker",
        description="One shard worker: holds one rank's part of a model and executes steps for a "
        "coordinator.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=50061, help="port to listen on; 0 takes any")
    parser.add_argument(
        "--advertise-host",
        help="address or name under which workers on other hosts reach this one; activations are "
        "exchanged there (default: --host)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where the shard lives: cpu, cuda or, of several GPUs, cuda:N",
    )
    parser.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, decode steps are captured and replayed as a whole",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads for computing; with one worker a core, 1",
    )
    parser.add_argument(
        "--peer-timeout",
        type=float,
        default=10.0,
        help="seconds to wait within a step for what another worker computes, before it is lost: "
        "between CPUs, and for sums through peers' memory between GPUs of one host. For what goes over "
        "NCCL the coordinator's --step-timeout counts",
    )
    parser.add_argument(
        "--lease",
        type=float,
        default=60.0,
        help="seconds without a call of a coordinator after which weights and cache are freed",
    )
    parser.add_argument(
        "--abort-timeout",
        type=float,
        default=8.0,
        help="seconds after an abort in which the device has to end what it runs; a worker whose "
        "device hangs ends itself then. Raise it where what can't be broken off takes longer, as one "
        "layer of a large model on a slow CPU may",
    )
    parser.add_argument(
        "--model-root",
        type=Path,
        action="append",
        metavar="DIR",
        help="load models from folders within this one only, links followed. May be given several "
        "times (default: from any folder)",
    )
    parser.add_argument(
        "--tls",
        type=Path,
        metavar="DIR",
        help="serve over mutual TLS: show DIR/tls.crt, check clients by DIR/ca.crt; `colrow certs` "
        "makes them",
    )
    parser.add_argument(
        "--tls-client",
        default="coordinator",
        metavar="NAME",
        help="with --tls: the name in the certificate of the only client that may call",
    )
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info"
    )
    parser.add_argument(
        "--log-format", choices=FORMATS, default="text", help="json is one object a line"
    )
    parser.add_argument(
        "--port-file", type=Path, help="file to write the port to once it is bound, for --port 0"
    )
    flags = parser.parse_args(arguments)
    if not 0 <= flags.port <= 65535:
        parser.error(f"--port {flags.port}: is not in [0, 65535]")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", flags.device):
        parser.error(f"--device {flags.device}: is none of cpu, cuda, cuda:N")
    if not 0 < flags.peer_timeout < float("inf"):
        parser.error(f"--peer-timeout {flags.peer_timeout}: is no time")
    if flags.threads < 1:
        parser.error(f"--threads {flags.threads}: is not positive")
    for name in ("lease", "abort_timeout"):
        value = getattr(flags, name)
        if not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {value}: is no time")
    return WorkerConfig(
        host=flags.host,
        port=flags.port,
        advertise_host=flags.advertise_host or flags.host.strip("[]"),
        device=flags.device,
        cuda_graphs=flags.cuda_graphs,
        num_threads=flags.threads,
        peer_timeout_s=flags.peer_timeout,
        lease_s=flags.lease,
        abort_timeout_s=flags.abort_timeout,
        log_level=flags.log_level,
        log_format=flags.log_format,
        port_file=flags.port_file,
        tls=flags.tls,
        tls_client=flags.tls_client,
        model_roots=tuple(flags.model_root or ()),
        expandable_segments=expandable_segments(),
    )
