"""Serving at several tp sizes and transports, each as a whole cluster: every figure of docs/gpu.md.

    python -m benchmarks.serving                      # 8B and 70B shapes, all tp sizes that fit
    python -m benchmarks.serving --shapes 8b --tp 2 --transport nccl
    python -m benchmarks.serving --table

For each it starts a coordinator and its workers with random weights, and measures through gRPC as
`colrow bench` does: time per token at batches, time to the first token at prompts, output tokens a
second of many requests at once. Beside it the time from the start to the first token, how long the
device waits between decode steps (from the workers' counters), and what communication takes (timed
steps, on request).

A cluster's figures are one JSON file in --results, and all that are there are tables in its serving.md.
What fails, or takes longer than --time-limit, is written down as failed, and the next one starts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import serving_results as results
from benchmarks.predict_scaling import LLAMA_8B, LLAMA_70B, plot
from client.bench.report import measured_on, report_data, run_bench
from client.bench.workload import Workload, fresh_prompts, parse_counts
from client.grpc_client import Colrow
from client.local_cluster import LocalCluster, local_gpus
from client.serving import choose_devices, termination_interrupts
from client.views import transport_name
from colrow.v1 import control_service_pb2, inference_service_pb2
from coordinator.config import (
    DEFAULT_CPU_BATCHED_TOKENS,
    DEFAULT_GPU_BATCHED_TOKENS,
    DEFAULT_GPU_MEMORY_UTILIZATION,
    DEFAULT_MAX_RUNNING,
)
from coordinator.cost_model import (
    H200_NVLINK,
    Algorithm,
    decode_step,
    first_token,
    fits,
    unpredictable,
)
from coordinator.families import model_spec
from coordinator.shard_plan import ShardPlan, make_plan

SHAPES = {"8b": LLAMA_8B, "70b": LLAMA_70B}
TP_SIZES = (1, 2, 4, 8)
RESULTS = Path(__file__).with_name("results")
TIMED_STEPS = 32
INPUT_TOKENS = 128
SETTINGS = ("max_batched_tokens", "max_running", "time_limit")  # that bench's results do not have


class TimeLimit(Exception):
    """A cluster took too long."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The devices that ranks may have; `memory_bytes` is one's, None where ranks share a host's."""

    device: str
    count: int
    memory_bytes: int | None = None
    driver: str = ""


CPU = Machine("cpu", count=2)
"""Two ranks are the fewest that communicate."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One cluster."""

    shapes: str
    config: dict[str, Any]
    tp: int
    transport: str


def examine_gpus() -> Machine:
    """The visible ones. ValueError where there is no GPU."""
    gpus = local_gpus()
    if not gpus.num_visible:
        seen = gpus.what_is_hidden or "this host has none"
        raise ValueError(f"device = 'cuda': there is no GPU: {seen}")
    query = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    try:
        told = subprocess.run(
            ["nvidia-smi", *query], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"device = 'cuda': nvidia-smi does not describe its GPU: {error}"
        ) from error
    name, mib, driver = (part.strip() for part in told.splitlines()[0].split(","))
    return Machine(name, gpus.num_visible, int(mib) * 2**20, driver)


def gpu_packages() -> dict[str, str]:
    """Versions of what only GPUs need, as far as it is installed."""
    names = re.compile(r"cupy-cuda\d+x|nvidia-nccl-cu\d+|triton")
    return {
        d.name: d.version for d in importlib.metadata.distributions() if names.fullmatch(d.name)
    }


def read_shapes(text: str) -> dict[str, dict[str, Any]]:
    """Names of shapes, or folders with a config.json, as the configs; ValueError names what is none."""
    found = {}
    for name in text.split(","):
        if name in SHAPES:
            found[name] = SHAPES[name]
            continue
        file = Path(name) / "config.json"
        try:
            found[Path(name).resolve().name] = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            known = ", ".join(SHAPES)
            raise ValueError(
                f"shapes = {name!r}: is none of {known}, and no folder of a model: {error}"
            ) from error
    return found


def choose_setups(
    shapes: dict[str, dict[str, Any]],
    tp_sizes: Sequence[int],
    transports: Sequence[str],
    machine: Machine,
) -> list[Setup]:
    """In order; without `tp_sizes` those of 1, 2, 4 and 8 that there are devices and memory for."""
    setups = []
    for name, config in shapes.items():
        chosen = tp_sizes or fitting_tp_sizes(config, machine)
        if not chosen:
            print(f"{name}: does not fit on {machine.count} x {machine.device}")
        for tp in chosen:
            # One rank has nobody to talk to.
            ways = transports if tp > 1 else (results.SINGLE,)
            setups += [Setup(name, config, tp, transport) for transport in ways]
    return setups


def fitting_tp_sizes(config: dict[str, Any], machine: Machine) -> list[int]:
    sizes = [tp for tp in TP_SIZES if tp <= machine.count]
    if machine.memory_bytes is None:
        return sizes
    memory_bytes = int(DEFAULT_GPU_MEMORY_UTILIZATION * machine.memory_bytes)
    hardware = replace(H200_NVLINK, device=replace(H200_NVLINK.device, memory_bytes=memory_bytes))
    spec = model_spec(config)
    return [tp for tp in sizes if fits(make_plan(spec, tp), hardware)]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeLimit in the main thread when it takes longer."""

    def expire(number: int, frame: object) -> None:
        raise TimeLimit(f"not done within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def predict(
    plan: ShardPlan, setup: Setup, machine: Machine, flags: argparse.Namespace
) -> dict[str, Any]:
    """The cost model's figures, in the form of the measured ones; {} where it has none."""
    is_known = H200_NVLINK.name.startswith(machine.device)
    if not is_known or unpredictable(plan) is not None:
        return {}
    algorithms = (Algorithm.NCCL,) if setup.transport == results.NCCL else tuple(Algorithm)
    context = INPUT_TOKENS + flags.output_tokens // 2
    steps = {
        str(batch): decode_step(plan, batch, context, algorithms=algorithms)
        for batch in flags.batch
    }
    ttft_s = {
        str(prompt): first_token(
            plan, prompt, max_batched_tokens=flags.max_batched_tokens, algorithms=algorithms
        ).seconds
        for prompt in flags.prompt
    }
    one = decode_step(plan, 1, context, algorithms=algorithms)
    return {
        "tpot_s": {batch: step.seconds for batch, step in steps.items()},
        "ttft_s": ttft_s,
        "communication_s": one.communication_s,
        "communication_share": one.communication_share,
    }


def communication(times: control_service_pb2.TimeCommunicationResponse) -> list[dict[str, Any]]:
    """Of a step, by operation and path: calls, bytes, and µs without waiting for other ranks."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for timed in times.times:
        row = rows.setdefault(
            (timed.operation, timed.path),
            {"operation": timed.operation, "path": timed.path, "calls": 0, "bytes": 0, "own_us": 0},
        )
        row["calls"] += timed.calls / times.num_steps
        row["bytes"] += timed.payload_bytes / times.num_steps
        row["own_us"] += timed.own_us / times.num_steps
    return list(rows.values())


def measure(setup: Setup, machine: Machine, flags: argparse.Namespace) -> dict[str, Any]:
    """Everything about one cluster. What was measured before something failed is kept."""
    result: dict[str, Any] = {
        "shapes": setup.shapes,
        "tp_size": setup.tp,
        "transport": setup.transport,
        "chosen_transport": None,
        "device": machine.device,
        "driver": machine.driver,
        "packages": gpu_packages(),
        "command": shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "config": setup.config,
        "settings": {name: getattr(flags, name) for name in SETTINGS},
        "error": None,
        "request_errors": [],
        "figures": {},
        "predicted": {},
    }
    with contextlib.ExitStack() as stack:
        try:
            plan = make_plan(model_spec(setup.config), setup.tp)
            result["predicted"] = predict(plan, setup, machine, flags)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / setup.shapes
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(setup.config))
            transport = "auto" if setup.transport == results.SINGLE else setup.transport
            local = LocalCluster(
                folder,
                setup.tp,
                devices=choose_devices(flags.device, setup.tp, local_gpus()),
                coordinator_args=(
                    *("--load-format", "dummy", "--transport", transport),
                    *("--max-batched-tokens", str(flags.max_batched_tokens)),
                    *("--max-running", str(flags.max_running)),
                    *("--log-level", "warning"),
                ),
            )
            stack.enter_context(local)
            with time_limit(flags.time_limit):
                measure_cluster(local, flags, result)
        except Exception as error:  # whatever it is, the next cluster is tried
            result["error"] = f"{type(error).__name__}: {error}"
    return result


def measure_cluster(local: LocalCluster, flags: argparse.Namespace, result: dict[str, Any]) -> None:
    figures = result["figures"]
    began = time.monotonic()
    local.start()
    cluster = local.wait_until_serving(flags.time_limit)
    figures["serving_after_s"] = time.monotonic() - began
    result["chosen_transport"] = transport_name(cluster)
    with local.endpoint.connect() as colrow:
        model = colrow.model()
        list(colrow.generate(fresh_prompts(model)(INPUT_TOKENS), max_tokens=1, ignore_eos=True))
        figures["first_token_after_s"] = time.monotonic() - began
        result["measured_on"] = measured_on(model, colrow.cluster())
        result["bench"] = []
        for workload in workloads(flags):
            bench(colrow, model, workload, result)
        times = colrow.time_communication(TIMED_STEPS)
        result["communication"] = communication(times)
        figures["communication_s"] = sum(row["own_us"] for row in result["communication"]) / 1e6


def workloads(flags: argparse.Namespace) -> list[Workload]:
    """One for each figure, so that those before a failure are kept."""
    alone = Workload(
        input_tokens=INPUT_TOKENS, output_tokens=flags.output_tokens, repeats=flags.repeats
    )
    offline = Workload(
        rates=(float("inf"),),
        requests=flags.requests,
        input_tokens=flags.offline_tokens[0],
        output_tokens=flags.offline_tokens[1],
        repeats=flags.repeats,
    )
    return [
        *(replace(alone, batches=(batch,)) for batch in flags.batch),
        *(replace(alone, prompts=(prompt,)) for prompt in flags.prompt),
        offline,
    ]


def bench(
    colrow: Colrow,
    model: inference_service_pb2.GetModelResponse,
    workload: Workload,
    result: dict[str, Any],
) -> None:
    def on_progress(name: str, done: int, total: int) -> None:
        if not done:
            print(f"  {name}", flush=True)

    report = run_bench(colrow, model, workload, on_progress)
    data = results.without_requests(report_data(report))
    result["bench"].append(data)
    for kind, values in results.figures_of(data).items():
        result["figures"].setdefault(kind, {}).update(values)
    for measurement in report.measurements:
        result["request_errors"] += sorted(set(measurement.errors))


def counts(text: str) -> tuple[int, ...]:
    try:
        return parse_counts("value", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", default="8b,70b", help="8b, 70b, or a folder with a config.json (8b,70b)")
    add("--tp", type=counts, default=(), help="sizes (those of 1, 2, 4, 8 that fit)")
    add("--transport", default="auto,nccl", help="of several ranks; auto is peer (auto,nccl)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--batch", type=counts, default=(1, 8, 32, 128), help="time per token (1,8,32,128)")
    add("--prompt", type=counts, default=(128, 1024, 8192), help="first token (128,1024,8192)")
    add("--output-tokens", type=int, default=256, help="of each request of a batch (256)")
    add("--requests", type=int, default=512, help="at once, for throughput (512)")
    add(
        "--offline-tokens",
        type=counts,
        default=(512, 256),
        metavar="IN,OUT",
        help="of each of those requests (512,256)",
    )
    add(
        "--max-batched-tokens",
        type=int,
        help="tokens in a step (the coordinator's default: "
        f"{DEFAULT_GPU_BATCHED_TOKENS}, on CPUs {DEFAULT_CPU_BATCHED_TOKENS})",
    )
    add(
        "--max-running",
        type=int,
        default=DEFAULT_MAX_RUNNING,
        help=f"sequences in a step ({DEFAULT_MAX_RUNNING})",
    )
    add("--repeats", type=int, default=3, help="of each measurement (3)")
    add("--time-limit", type=float, default=900.0, help="seconds that a cluster may take (900)")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="(benchmarks/results)")
    add("--table", action="store_true", help="print the tables of --results, and measure nothing")
    add("--plot", type=Path, metavar="FILE", help="draw speed-ups here; needs matplotlib")
    flags = parser.parse_args(arguments)
    if flags.max_batched_tokens is None:
        on_gpu = flags.device == "cuda"
        flags.max_batched_tokens = (
            DEFAULT_GPU_BATCHED_TOKENS if on_gpu else DEFAULT_CPU_BATCHED_TOKENS
        )
    if len(flags.offline_tokens) != 2:
        parser.error("--offline-tokens: two numbers, IN,OUT")
    if flags.plot is not None and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return flags


def show(flags: argparse.Namespace) -> None:
    """All tables, also in serving.md; and the plot."""
    known = results.load(flags.results)
    lines = "\n".join(results.page(known))
    print(lines)
    if not flags.table:
        (flags.results / "serving.md").write_text(lines + "\n")
    if flags.plot is not None:
        names = dict.fromkeys(result["shapes"] for result in known)
        rows = {f"{name} shapes": results.speed_rows(known, name) for name in names}
        plot({name: row for name, row in rows.items() if row}, flags.plot, "measured")


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse(arguments)
    if flags.table:
        show(flags)
        return 0
    try:
        shapes = read_shapes(flags.shapes)
        machine = examine_gpus() if flags.device == "cuda" else CPU
        setups = choose_setups(shapes, flags.tp, flags.transport.split(","), machine)
    except ValueError as error:
        print(f"benchmarks.serving: {error}", file=sys.stderr)
        return 2
    num_failed = 0
    flags.results.mkdir(parents=True, exist_ok=True)
    with termination_interrupts():
        for setup in setups:
            print(f"{setup.shapes}, tp={setup.tp}, {setup.transport}:", flush=True)
            result = measure(setup, machine, flags)
            if result["error"] is not None:
                print(f"  failed: {result['error']}", flush=True)
            num_failed += bool(result["error"] or result["request_errors"])
            name = results.file_name(setup.shapes, setup.tp, setup.transport, machine.device)
            (flags.results / name).write_text(json.dumps(result, indent=1) + "\n")
    show(flags)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
