"""A whole run of `colrow bench`, on what it was measured, and all of it as data for JSON."""

import asyncio
import contextlib
import importlib.metadata
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from client.bench.distribution import Distribution
from client.bench.measuring import Bench
from client.bench.traces import Measurement, Repeat, SteadyPhase, control_share, steps_per_s
from client.bench.workload import Progress, Workload, fresh_prompts, measure
from client.grpc_client import Colrow
from client.local_cluster import num_cores
from client.views import enum_name, transport_name
from colrow import __version__
from colrow.processor import processor_name
from colrow.v1 import control_service_pb2, inference_service_pb2, tensor_pb2


@dataclass(frozen=True, slots=True)
class Report:
    """All there is to say about a run. `server_idle`: nothing else was served when it began."""

    measured_on: dict[str, Any]
    workload: Workload
    server_idle: bool
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def num_failed(self) -> int:
        return sum(len(measurement.errors) for measurement in self.measurements)


def run_bench(
    colrow: Colrow,
    model: inference_service_pb2.GetModelResponse,
    workload: Workload,
    on_progress: Progress,
) -> Report:
    """Measures the server that `colrow` is connected to."""
    workload.check(model)
    cluster = colrow.cluster()
    scheduler = cluster.scheduler

    async def run() -> list[Measurement]:
        async with colrow.asynchronous() as client:
            await client.cluster_as_known()  # connects, before anything is timed
            return await measure(Bench(client, fresh_prompts(model)), workload, on_progress)

    return Report(
        measured_on(model, cluster),
        workload,
        server_idle=scheduler.running + scheduler.waiting == 0,
        measurements=asyncio.run(run()),
    )


def measured_on(
    model: inference_service_pb2.GetModelResponse, cluster: control_service_pb2.Cluster
) -> dict[str, Any]:
    """The server, and the machine that measured it, which for a local cluster is the same."""
    return {
        "model": model.model,
        "architecture": model.architecture,
        "num_parameters": model.num_parameters,
        "data_type": enum_name(tensor_pb2.DataType.DESCRIPTOR, model.data_type),
        "tp_size": model.tp_size,
        "transport": transport_name(cluster),
        "devices": [worker.description.device for worker in cluster.workers],
        "device_names": [worker.description.device_name for worker in cluster.workers],
        "hosts": len({worker.description.host_id for worker in cluster.workers}),
        "context_length": model.context_length,
        "kv_blocks": cluster.scheduler.kv_blocks_total,
        "block_size": cluster.scheduler.block_size,
        "server_version": cluster.version,
        "client": {
            "version": __version__,
            "cpu": processor_name(),
            "cores": num_cores(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "packages": _versions("grpcio", "protobuf", "torch", "numpy"),
        },
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed: a client alone does without torch."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def report_data(report: Report) -> dict[str, Any]:
    """For JSON: the settings, the figures, and every request of every repeat."""
    settings = asdict(report.workload)
    settings["rates"] = [_json_number(rate) for rate in report.workload.rates]
    return {
        "measured_on": report.measured_on,
        "settings": settings,
        "server_idle": report.server_idle,
        "measurements": [measurement_data(m) for m in report.measurements],
    }


def measurement_data(measurement: Measurement) -> dict[str, Any]:
    return {
        "kind": measurement.kind,
        "value": _json_number(measurement.value),
        "input_tokens": measurement.input_tokens,
        "output_tokens": measurement.output_tokens,
        "completed": len(measurement.good),
        "failed": len(measurement.errors),
        "errors": sorted(set(measurement.errors)),
        "over_requests": {
            "ttft_s": _asdict_or_none(measurement.ttft_s),
            "tpot_s": _asdict_or_none(measurement.tpot_s),
            "pause_s": _asdict_or_none(measurement.pause_s),
            "latency_s": _asdict_or_none(measurement.latency_s),
        },
        "over_repeats": {
            name: _asdict_or_none(measurement.over_repeats(figure))
            for name, figure in FIGURES.items()
        },
        "repeats": [_repeat_data(repeat) for repeat in measurement.repeats],
    }


FIGURES: dict[str, Callable[[Repeat], float | None]] = {
    "requests_per_s": lambda repeat: repeat.requests_per_s,
    "tokens_per_s": lambda repeat: repeat.tokens_per_s,
    "decode_tokens_per_s": lambda repeat: repeat.decode_tokens_per_s,
    "slowest_ttft_s": lambda repeat: repeat.slowest_ttft_s,
    "peak_concurrency": lambda repeat: repeat.peak_concurrency,
    "steps_per_s": steps_per_s,
    "control_share": control_share,
}


def _repeat_data(repeat: Repeat) -> dict[str, Any]:
    return {
        **{name: figure(repeat) for name, figure in FIGURES.items()},
        "seconds": repeat.seconds,
        "steady": _asdict_or_none(repeat.steady),
        "requests": [
            {
                "sent_s": trace.sent_s,
                "ended_s": trace.ended_s,
                "error": trace.error,
                "arrivals": [[round(at, 6), count] for at, count in trace.arrivals],
            }
            for trace in repeat.traces
        ],
    }


def _asdict_or_none(value: Distribution | SteadyPhase | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _json_number(value: float) -> float | str:
    """JSON has no infinity."""
    return "inf" if math.isinf(value) else value
