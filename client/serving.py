"""Clusters that the command starts itself, and connections to those that run."""

import contextlib
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from client.endpoint import DEFAULT_TARGET, Endpoint
from client.grpc_client import Colrow
from client.local_cluster import LocalCluster, local_gpus
from client.model_source import resolve_model
from client.plan_view import read_spec
from client.views import ProgressView, progress_view, ranks_text, report_loading
from colrow.errors import ServiceError, Unauthenticated, Unavailable
from colrow.gpus import HostGpus
from colrow.tls import CA_FILE, explain, read_server
from colrow.v1 import control_service_pb2, inference_service_pb2
from coordinator.shard_plan import make_plan

DEFAULT_TP = 2
SERVING_TIMEOUT_S = 600.0  # of loading, which the progress bars show; a large model takes minutes


@dataclass(frozen=True, slots=True)
class Settings:
    """What is served, and how. `coordinator_args` are further flags of `colrow coordinator`."""

    model: str | None = None
    tp: int = DEFAULT_TP
    device: str = "auto"
    """"auto", "cpu" or "cuda"; see `choose_devices`."""
    dtype: str = "auto"
    memory_weights: str | None = None
    host: str = "127.0.0.1"
    grpc_port: int = 0
    http_port: int = 0
    served_model_name: str | None = None
    coordinator_args: Sequence[str] = ()
    worker_args: Sequence[str] = ()
    tls: Path | None = None
    api_keys: Path | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster of this process that serves, and how it was when it began to."""

    local: LocalCluster
    cluster: control_service_pb2.Cluster


@contextlib.contextmanager
def running(settings: Settings, messages: Console) -> Iterator[Running]:
    """Starts a cluster, with its progress on `messages`, and stops it in the end.

    What the user can have got wrong is found before any process starts: ValueError.
    """
    if settings.tls is not None:
        read_server(settings.tls, "tls", client_certificates=True)
    for flag, port in (("grpc-port", settings.grpc_port), ("http-port", settings.http_port)):
        if port:
            check_port(settings.host, port, flag)
    with progress_view(messages) as progress:
        local = _prepare(settings, progress)
        # Outside of `with local`, for the bars to end before what is shown while it serves; `start`
        # and the `except` see to it that an interruption in between leaves nothing behind.
        try:
            local.start(progress)
            cluster = local.wait_until_serving(
                SERVING_TIMEOUT_S, lambda cluster: report_loading(progress, cluster)
            )
        except BaseException:
            local.stop()
            raise
    with local:
        yield Running(local, cluster)


def choose_devices(device: str, tp: int, gpus: HostGpus) -> list[str]:
    """The device of each rank: a GPU of its own, or "cpu".

    `device` "auto" is GPUs where any are visible, else CPUs. ValueError where there are too few GPUs,
    with "auto" too: one rank more must not move a model to CPUs without a word.
    """
    if device == "cpu" or (device == "auto" and not gpus.num_visible):
        return ["cpu"] * tp
    if gpus.num_visible < tp:
        has = gpus.what_is_hidden or f"this host has {gpus.num_visible}"
        fitting = f"--tp {gpus.num_visible} takes no more, " if gpus.num_visible else ""
        raise ValueError(
            f"tp = {tp}: each rank takes a GPU of its own, and {has}; {fitting}--device cpu does without"
        )
    return [f"cuda:{rank}" for rank in range(tp)]


def _prepare(settings: Settings, progress: ProgressView) -> LocalCluster:
    devices = choose_devices(settings.device, settings.tp, local_gpus())
    folder = resolve_model(settings.model, progress=progress)
    # A dry run, for its errors: seconds before the coordinator would come to the same ones.
    make_plan(
        read_spec(folder / "config.json"),
        settings.tp,
        dtype=None if settings.dtype == "auto" else settings.dtype,
        memory_weights=parse_memory_weights(settings.memory_weights),
    )
    arguments, worker_arguments = [*settings.coordinator_args], [*settings.worker_args]
    for root in model_roots(folder):
        worker_arguments += ["--model-root", str(root)]
    if settings.memory_weights is not None:
        arguments += ["--memory-weights", settings.memory_weights]
    if name := settings.served_model_name or hub_name(settings.model, folder):
        arguments += ["--served-model-name", name]
    return LocalCluster(
        folder,
        settings.tp,
        devices=devices,
        dtype=settings.dtype,
        coordinator_args=arguments,
        worker_args=worker_arguments,
        grpc_port=settings.grpc_port,
        http_port=settings.http_port,
        host=settings.host,
        tls=settings.tls,
        api_keys=settings.api_keys,
    )


def model_roots(folder: Path) -> list[Path]:
    """The folders that workers need to read a model: its own, and where links in it lead."""
    leads_to = {file.resolve().parent for file in folder.iterdir() if file.is_symlink()}
    return sorted({folder.resolve(), *leads_to})


def hub_name(model: str | None, folder: Path) -> str | None:
    """The id of a hub model, whose folder in the hub's cache is named after a commit."""
    if model is None or model == "demo" or Path(model).expanduser().resolve() == folder:
        return None
    return model


def parse_memory_weights(text: str | None) -> list[float] | None:
    """One number a rank; None for equal shares, and for `auto`, which only the workers can say."""
    if text is None or text == "auto":
        return None
    try:
        return [float(weight) for weight in text.split(",")]
    except ValueError:
        raise ValueError(f"memory-weights = {text!r}: is neither 'auto' nor numbers") from None


def check_port(host: str, port: int, flag: str) -> None:
    """ValueError when the port can't be listened on. The coordinator would say so, but seconds later."""
    bare_host = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare_host else socket.AF_INET
    try:
        socket.create_server((bare_host, port), family=family).close()
    except OSError as error:
        raise ValueError(
            f"{flag} {port} on {host} can't be listened on ({error.strerror}); "
            f"choose another one with --{flag}"
        ) from error


class NothingAnswers(Unavailable):
    """No server listens there."""


@contextlib.contextmanager
def connected(
    endpoint: Endpoint,
) -> Iterator[tuple[Colrow, inference_service_pb2.GetModelResponse]]:
    """A client of a coordinator, and the model there. `NothingAnswers` when there is none."""
    target = endpoint.target
    with endpoint.connect() as colrow:
        try:
            model = colrow.model()
        except ServiceError as error:
            # An Unavailable of a coordinator has a reason of its own.
            if error.code == Unavailable.code and error.reason == Unavailable.reason:
                encrypted = endpoint.tls is not None
                if problem := explain(error.message, encrypted=encrypted):
                    given = f"--tls is {endpoint.tls}" if encrypted else "--tls is not given"
                    raise Unavailable(f"{target}: {problem} ({given})", reason="TLS") from error
                raise NothingAnswers(
                    f"nothing answers at {target}; start one with `colrow serve`"
                ) from error
            if error.code == Unauthenticated.code:
                raise Unauthenticated(
                    f"{target}: {error.message} (--api-key, or COLROW_API_KEY)", reason=error.reason
                ) from error
            if error.code == "UNIMPLEMENTED":
                raise Unavailable(f"what answers at {target} is no Colrow coordinator") from error
            raise
        yield colrow, model


@contextlib.contextmanager
def connected_or_demo(
    target: str | None, tls: Path | None, api_key: str | None, messages: Console
) -> Iterator[tuple[Colrow, inference_service_pb2.GetModelResponse]]:
    """As `connected`; without a `target` and with nothing at the default one, the demo model.

    That is then served, on the CPU whatever GPUs there are, for as long as the context lasts.
    """
    with contextlib.ExitStack() as stack:
        try:
            connection = stack.enter_context(
                connected(Endpoint(target or DEFAULT_TARGET, tls, api_key))
            )
        except NothingAnswers:
            if target is not None:
                raise
            messages.print(
                f"Nothing answers at {DEFAULT_TARGET}: serving the demo model over "
                f"{ranks_text(DEFAULT_TP)} on the CPU for this command alone. `colrow serve` keeps one "
                "running."
            )
            started = stack.enter_context(running(Settings(device="cpu"), messages))
            connection = stack.enter_context(connected(started.local.endpoint))
        yield connection


def how_to_call(local: LocalCluster, cluster: control_service_pb2.Cluster) -> str:
    """What one may type now."""
    # localhost is not this address where it is an IPv6 one.
    is_default = local.target in (DEFAULT_TARGET, DEFAULT_TARGET.replace("localhost", "127.0.0.1"))
    target = "" if is_default else f" --target {local.target}"
    curl = "curl"
    if local.tls is not None:
        target += f" --tls {escape(str(local.tls))}"
        curl += f" --cacert {escape(str(local.tls / CA_FILE))}"
    if local.api_keys is not None:
        target += " --api-key KEY"
        curl += " -H 'Authorization: Bearer KEY'"
    return "\n".join(
        (
            f"[bold green]Serving[/bold green] {escape(cluster.model)} at "
            f"[bold]{escape(local.target)}[/bold] over {ranks_text(local.tp)}. Try:",
            f'  colrow generate "What is the capital of Japan?"{target}',
            f"  colrow status{target}",
            f"  colrow layer 3 mlp.down_proj{target}",
            f"  {curl} {escape(local.http_url)}/v1/models",
            f"OpenAI's clients take base_url={escape(local.http_url)}/v1.",
            f"Logs are in {local.log_folder}. Ctrl-C stops it all.",
        )
    )


@contextlib.contextmanager
def termination_interrupts(
    error: type[KeyboardInterrupt] | type[SystemExit] = KeyboardInterrupt,
) -> Iterator[None]:
    """SIGTERM, and a terminal that closes, end what runs as Ctrl-C does: in good order.

    With SystemExit they end what goes on after Ctrl-C, too.
    """

    def interrupt(number: int, frame: object) -> None:
        raise error(128 + number)

    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # as nohup wants it
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
