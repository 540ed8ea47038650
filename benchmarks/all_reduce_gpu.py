"""Latency of the GPU all-reduces, and of those with what follows them, in a CUDA graph.

    python -m benchmarks.all_reduce_gpu               # 2, 4 and 8 ranks, as far as there are GPUs
    python -m benchmarks.all_reduce_gpu --table

A process for each GPU. For each number of ranks and each size, of bfloat16 rows of 4096:

- nccl: NCCL's, in place;
- one_shot, two_shot: stores into each other's memory, what is more than a slot of it in pieces;
- the same "+ norm": with the residual addition and the RMSNorm after it, which stores do in one kernel.

Every one is checked first, on whole numbers, whose sums are exact. Then graphs of 50 calls are replayed
without a pause; a replay takes as long as on the slowest rank. Figures of a number of ranks are one JSON
file in --results, and all that are there are tables in its all_reduce.md.

With --share-gpu all ranks are on one GPU and take turns: sums are checked, without NCCL, and nothing is
timed, for a time would say nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.predict_scaling import size_name, table
from benchmarks.ranks import HOST, JOIN_TIMEOUT_S, Exchange, run_ranks
from benchmarks.serving import RESULTS, counts, gpu_packages
from benchmarks.serving_results import NOTHING, Target, slug
from colrow import MAX_PEERS
from coordinator.cost_model import H200_NVLINK, Algorithm
from shard_worker import kernels
from shard_worker.communicator.gloo import GlooCommunicator
from shard_worker.communicator.nccl import NcclCommunicator
from shard_worker.communicator.peer import choose_reach
from shard_worker.communicator.peer_sums import SLOT_BYTES, PeerMemory, PeerSums

PREFIX = "all_reduce_"
HIDDEN = 4096
ROW_BYTES = 2 * HIDDEN
SIZES = tuple(2**exponent for exponent in range(13, 27))  # 8 KB to 64 MB
SHARED_BYTES = 2**20  # at most, where ranks take turns on a GPU
RANKS = (2, 4, 8)
CALLS, REPLAYS = 50, 20  # of a graph
EPS = 1e-5
WITH_NORM = " + norm"

# For two NVIDIA H200 with NVLink, in µs: stores with residual addition and norm, by bytes.
TARGETS = {2**13: Target(4.5, 3.4), 2**16: Target(5.0, 3.7), 2**20: Target(8.0, 6.5)}


Figures = dict[int, dict[str, list[float]]]
"""Microseconds a call of each replay, by bytes and way."""


@dataclass(frozen=True, slots=True)
class Group:
    """This rank's ways to the others. `problem` is why there is no peer memory; else empty."""

    control: GlooCommunicator
    nccl: NcclCommunicator | None
    sums: PeerSums
    problem: str

    @classmethod
    def join(cls, rank: int, size: int, exchange: Exchange, *, is_shared: bool) -> Group:
        """Without NCCL where ranks share a GPU."""
        device = torch.device("cuda", 0 if is_shared else rank)
        torch.cuda.set_device(device)
        ids = nccl_id = b""
        control_store = nccl_store = None
        if rank == 0:
            control_id, control_store = GlooCommunicator.create_store(HOST)
            if not is_shared:
                nccl_id, nccl_store = NcclCommunicator.create_id(HOST)
            ids = pickle.dumps((control_id, nccl_id))
        control_id, nccl_id = pickle.loads(exchange(ids)[0])
        where: dict[str, Any] = {"timeout_s": JOIN_TIMEOUT_S, "interface_host": HOST}
        control = GlooCommunicator.join(control_id, rank, size, store=control_store, **where)
        nccl = None
        if not is_shared:
            nccl = NcclCommunicator.join(
                nccl_id, rank, size, device=device, store=nccl_store, **where
            )
        sums = PeerSums(control, PeerMemory.allocate(size, device), op_timeout_s=JOIN_TIMEOUT_S)
        links = sums.connect(exchange(sums.offer), JOIN_TIMEOUT_S)
        return cls(control, nccl, sums, "; ".join(link.note for link in links if link.note))

    def check(self) -> None:
        """Raises what a sum failed of."""
        torch.cuda.synchronize()
        failure = self.nccl.failure() if self.nccl is not None else None
        if not self.problem:  # else its trials may have waited in vain, and it is not used
            failure = failure or self.sums.failure()
        if failure is not None:
            raise failure

    def leave(self) -> None:
        self.control.barrier(JOIN_TIMEOUT_S)
        if self.nccl is not None:
            self.nccl.close()
        self.sums.close()
        self.control.close()


@dataclass(frozen=True, slots=True)
class Buffers:
    """What a call reads and writes: [rows, 4096] each, the weight [4096]."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    out: Tensor


def ways(group: Group, buffers: Buffers) -> dict[str, Callable[[], Tensor]]:
    """What is measured; each gives the sum or, of those with a norm, what comes after it."""
    x, residual, weight, out = buffers.x, buffers.residual, buffers.weight, buffers.out
    found: dict[str, Callable[[], Tensor]] = {}
    if (nccl := group.nccl) is not None:
        found["nccl"] = lambda: nccl.all_reduce(x)
        found["nccl" + WITH_NORM] = lambda: kernels.norm.add_rms_norm(
            nccl.all_reduce(x), residual, weight, EPS
        )
    if group.problem:
        return found

    def stores(two_shot: bool) -> Tensor:
        size = SLOT_BYTES // x.itemsize
        for piece, into in zip(x.view(-1).split(size), out.view(-1).split(size), strict=True):
            group.sums.launch(piece, into, two_shot=two_shot)
        return out

    def stores_with_norm(two_shot: bool) -> Tensor:
        group.sums.launch(x, out, residual, weight, EPS, two_shot=two_shot)
        return out

    for name, two_shot in (("one_shot", False), ("two_shot", True)):
        found[name] = lambda two_shot=two_shot: stores(two_shot)  # type: ignore[misc]
        if x.nbytes <= SLOT_BYTES:
            found[name + WITH_NORM] = lambda two_shot=two_shot: stores_with_norm(two_shot)  # type: ignore[misc]
    return found


def term(rank: int, rows: int, device: torch.device) -> Tensor:
    """[rows, 4096] bfloat16: whole numbers from -9 to 9. Sums of eight such are exact in any order."""
    numbers = torch.arange(rows * HIDDEN, device=device)
    return ((numbers * (2 * rank + 3) + 7 * rank) % 19 - 9).to(torch.bfloat16).view(rows, HIDDEN)


def sum_of_terms(size: int, rows: int, device: torch.device) -> Tensor:
    total = torch.zeros(rows, HIDDEN, dtype=torch.bfloat16, device=device)
    for rank in range(size):
        total += term(rank, rows, device)
    return total


def check_way(name: str, way: Callable[[], Tensor], group: Group, buffers: Buffers) -> None:
    """AssertionError where it does not give the exact sum, or its norm within bfloat16's rounding."""
    rank, size = group.control.rank, group.control.size
    rows, device = len(buffers.x), buffers.x.device
    buffers.x.copy_(term(rank, rows, device))
    buffers.residual.copy_(term(size, rows, device))
    expected = sum_of_terms(size, rows, device)
    got = way()
    group.check()
    where = f"{name}, {size_name(buffers.x.nbytes)}, rank {rank} of {size}"
    if not name.endswith(WITH_NORM):
        assert torch.equal(got, expected), where
        return
    expected += term(size, rows, device)
    assert torch.equal(buffers.residual, expected), where
    wide = expected.float()
    normed = wide * (wide.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * buffers.weight.float()
    torch.testing.assert_close(
        got.float(), normed, rtol=0.02, atol=0.01, msg=lambda text: f"{where}: {text}"
    )


def time_way(way: Callable[[], Tensor], group: Group, buffers: Buffers) -> list[float]:
    """Microseconds a call, of each replay."""
    buffers.x.zero_()  # sums in place stay what they are
    way()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            way()
    group.control.barrier(JOIN_TIMEOUT_S)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    events[0].record()
    # All are queued at once: between two replays the device does not wait for the host.
    for event in events[1:]:
        graph.replay()
        event.record()
    group.check()
    return [a.elapsed_time(b) * 1e3 / CALLS for a, b in itertools.pairwise(events)]


def run_rank(
    rank: int, size: int, exchange: Exchange, sizes: Sequence[int], is_shared: bool
) -> tuple[str, str, Figures]:
    """The device, why peer memory can't be reached, and the figures."""
    group = Group.join(rank, size, exchange, is_shared=is_shared)
    figures: Figures = {}
    for num_bytes in sizes:
        x = torch.empty(num_bytes // ROW_BYTES, HIDDEN, dtype=torch.bfloat16, device="cuda")
        weight = torch.linspace(0.5, 1.5, HIDDEN, device="cuda").to(x.dtype)
        buffers = Buffers(x, torch.zeros_like(x), weight, torch.empty_like(x))
        figures[num_bytes] = {}
        for name, way in ways(group, buffers).items():
            check_way(name, way, group, buffers)
            figures[num_bytes][name] = [] if is_shared else time_way(way, group, buffers)
    group.leave()
    return torch.cuda.get_device_name(), group.problem, figures


def summarise(by_rank: Sequence[Figures], is_known: bool) -> list[dict[str, Any]]:
    """A row for each size and way. A replay takes as long as on the slowest rank.

    is_known: predictions are of these GPUs.
    """
    rows = []
    for num_bytes, by_way in by_rank[0].items():
        for way in by_way:
            slowest = [
                max(each) for each in zip(*(f[num_bytes][way] for f in by_rank), strict=True)
            ]
            rows.append(
                {
                    "bytes": num_bytes,
                    "way": way,
                    "median_us": statistics.median(slowest),
                    "min_us": min(slowest),
                    "predicted_us": predict(way, len(by_rank), num_bytes) if is_known else None,
                }
            )
    return rows


def predict(way: str, size: int, num_bytes: int) -> float | None:
    """The cost model's microseconds; None where it has none."""
    name = way.removesuffix(WITH_NORM)
    (figures,) = (f for f in H200_NVLINK.link.all_reduces if f.algorithm == name)
    if num_bytes > figures.max_bytes or (figures.adds_and_norms and name == way):
        return None
    one = H200_NVLINK.all_reduce(size, num_bytes, (Algorithm(name),))
    return 1e6 * (one.seconds + (one.norm_s if name != way else 0.0))


def crossovers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Up to how many bytes which way is the fastest, as workers decide it; None without all three."""
    measured: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["way"] in tuple(Algorithm) and row["bytes"] <= SLOT_BYTES:
            measured.setdefault(row["bytes"], {})[row["way"]] = row["median_us"]
    if any(times.keys() != set(Algorithm) for times in measured.values()):
        return None
    reach = choose_reach(measured)
    return {"one_shot_bytes": reach.one_shot_bytes, "two_shot_bytes": reach.two_shot_bytes}


def measure(size: int, sizes: Sequence[int]) -> dict[str, Any]:
    """One number of ranks, each with a GPU of its own."""
    answers = run_ranks(run_rank, size, tuple(sizes), False)
    device, problem, _ = answers[0]
    rows = summarise([figures for *_, figures in answers], H200_NVLINK.name.startswith(device))
    return {
        "ranks": size,
        "device": device,
        "peer_problem": problem,
        "command": shlex.join(["python", "-m", "benchmarks.all_reduce_gpu", *sys.argv[1:]]),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "packages": {"torch": torch.__version__, "cuda": torch.version.cuda, **gpu_packages()},
        "calls_a_graph": CALLS,
        "replays": REPLAYS,
        "crossovers": crossovers(rows),
        "rows": rows,
    }


def page(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a table for each number of ranks."""
    lines = []
    for result in found:
        lines += [f"### {result['ranks']} ranks, {result['device']}", ""]
        lines += ["Microseconds a call: median, least, predicted.", ""]
        lines += [*result_table(result), ""]
        if result["peer_problem"]:
            lines += [f"Without peer memory: {result['peer_problem']}", ""]
        if (reach := result["crossovers"]) is not None:
            one, two = (size_name(reach[f"{name}_shot_bytes"]) for name in ("one", "two"))
            lines += [f"One shot is the fastest up to {one}, two shots up to {two}.", ""]
    return lines


def result_table(result: Mapping[str, Any]) -> list[str]:
    names = list(dict.fromkeys(row["way"] for row in result["rows"]))
    by_size: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in result["rows"]:
        by_size.setdefault(row["bytes"], {})[row["way"]] = row
    targets = TARGETS if result["ranks"] == 2 else {}
    heads = ["bytes", *names, *(["stores + norm: must / aim"] if targets else [])]
    rows = []
    for num_bytes, by_way in by_size.items():
        cells = [_cell(by_way[name]) if name in by_way else NOTHING for name in names]
        if targets:
            cells.append(_wanted(targets.get(num_bytes), by_way))
        rows.append([size_name(num_bytes), *cells])
    return table(heads, rows)


def _cell(row: Mapping[str, Any]) -> str:
    predicted = row["predicted_us"]
    shown = NOTHING if predicted is None else f"{predicted:.1f}"
    return f"{row['median_us']:.1f}, {row['min_us']:.1f}, {shown}"


def _wanted(target: Target | None, by_way: Mapping[str, Mapping[str, Any]]) -> str:
    if target is None:
        return NOTHING
    stores = [f"{name}_shot{WITH_NORM}" for name in ("one", "two")]
    best = min((by_way[name]["median_us"] for name in stores if name in by_way), default=None)
    is_missed = best is None or best > target.must
    return f"{target.must:g} / {target.aim:g}" + (" **missed**" if is_missed else "")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="benchmarks.all_reduce_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ranks", type=counts, default=(), help="(those of 2, 4, 8 that there are GPUs for)")
    add("--bytes", type=counts, default=(), help="whole rows of 8192 (8 KB to 64 MB; shared, 1 MB)")
    add("--share-gpu", action="store_true", help="check sums of ranks on one GPU; no times")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="(benchmarks/results)")
    add("--table", action="store_true", help="print the tables of --results, and measure nothing")
    return parser.parse_args(arguments)


def choose_sizes(flags: argparse.Namespace) -> tuple[int, ...]:
    """In bytes; ValueError naming what can't be."""
    most = SHARED_BYTES if flags.share_gpu else max(SIZES)
    for num_bytes in flags.bytes:
        if num_bytes < ROW_BYTES or num_bytes % ROW_BYTES:
            raise ValueError(f"bytes = {num_bytes}: is no whole number of rows of {ROW_BYTES}")
        if num_bytes > most:
            raise ValueError(f"bytes = {num_bytes}: is more than {size_name(most)}")
    return flags.bytes or tuple(size for size in SIZES if size <= most)


def choose_ranks(flags: argparse.Namespace, num_gpus: int) -> tuple[int, ...]:
    """ValueError naming what can't be."""
    if not num_gpus:
        raise ValueError("there is no GPU: torch.cuda.device_count() is 0")
    most = MAX_PEERS if flags.share_gpu else num_gpus
    for size in flags.ranks:
        if not 2 <= size <= MAX_PEERS:
            raise ValueError(f"ranks = {size}: is not from 2 to {MAX_PEERS}")
        if size > most:
            raise ValueError(
                f"ranks = {size}: each takes a GPU of its own, and this host has {num_gpus}; "
                "--share-gpu checks sums on one"
            )
    chosen = flags.ranks or tuple(size for size in RANKS if size <= most)
    if not chosen:
        raise ValueError("there is one GPU; --share-gpu checks sums on it")
    return chosen


def show(flags: argparse.Namespace) -> None:
    """All tables, also in all_reduce.md."""
    found = [json.loads(file.read_text()) for file in flags.results.glob(f"{PREFIX}*.json")]
    lines = "\n".join(page(sorted(found, key=lambda r: (r["device"], r["ranks"]))))
    print(lines)
    if not flags.table:
        (flags.results / "all_reduce.md").write_text(lines + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse(arguments)
    if flags.table:
        show(flags)
        return 0
    try:
        sizes = choose_sizes(flags)
        chosen = choose_ranks(flags, torch.cuda.device_count())
    except ValueError as error:
        print(f"benchmarks.all_reduce_gpu: {error}", file=sys.stderr)
        return 2
    num_failed = 0
    flags.results.mkdir(parents=True, exist_ok=True)
    for size in chosen:
        try:
            if flags.share_gpu:
                run_ranks(run_rank, size, sizes, True)
                largest = size_name(max(sizes))
                print(f"{size} ranks that share a GPU: sums are exact up to {largest}; not timed")
                continue
            result = measure(size, sizes)
            name = f"{PREFIX}{size}_{slug(result['device'])}.json"
            (flags.results / name).write_text(json.dumps(result, indent=1) + "\n")
        except AssertionError as error:  # a rank that failed or hangs; the next number is tried
            print(f"{size} ranks failed: {error}", file=sys.stderr)
            num_failed += 1
    if not flags.share_gpu:
        show(flags)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
