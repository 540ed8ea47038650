"""How fast a worker loads its slices of a checkpoint: `python benchmarks/loading.py --help`.

A checkpoint of Llama-3.1-8B's shapes in bfloat16, with so many of its layers and of its vocabulary that
it has about `--gib`, is written to a temporary folder, which leaves it in the page cache. Then, in turn,
medians of the repeats:

- page cache: as many bytes read with as many threads, straight on, into memory that is used again;
- load: what a worker does, into weights that were just allocated; on a CPU the kernel has to clear
  their memory meanwhile, page by page;
- again: the same into weights that were loaded before: reading alone.

Each rank loads alone. `colrow serve` starts CPU workers with huge pages; for the same here:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/loading.py
    python benchmarks/loading.py --device cuda --gib 16
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch

from coordinator.families import model_spec
from coordinator.shard_plan import ShardPlan, make_plan
from shard_worker import checkpoint, loader, models
from shard_worker.__main__ import SWITCH_INTERVAL_S
from shard_worker.communicator.single import SingleCommunicator
from shard_worker.sharding import Parameter, Section, ShardLayout, ShardTensors
from shard_worker.tensor_parallel import TensorParallel

LAYERS, VOCAB = 32, 128256
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
DTYPE = torch.bfloat16
BLOCK_BYTES = 32 * 1024 * 1024


def config_of(num_bytes: int) -> dict[str, Any]:
    """A part of the layers and as large a part of the vocabulary: shares are those of the whole."""
    parameters = model_spec(CONFIG).parameters
    whole = sum(prod(p.shape) for p in parameters) * DTYPE.itemsize
    layers = max(1, min(LAYERS, round(LAYERS * num_bytes / whole)))
    return CONFIG | {"num_hidden_layers": layers, "vocab_size": VOCAB * layers // LAYERS}


def write(folder: Path, config: dict[str, Any]) -> Path:
    """The checkpoint in one file, its keys in alphabetical order, as transformers writes them."""
    header, end = {}, 0
    for parameter in sorted(model_spec(config).parameters, key=lambda p: p.name):
        begin, end = end, end + prod(parameter.shape) * DTYPE.itemsize
        header[parameter.name] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = memoryview(os.urandom(BLOCK_BYTES))
    file = folder / checkpoint.SINGLE_FILE
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for at in range(0, end, BLOCK_BYTES):
            stream.write(block[: end - at])
    return file


def layout_of(plan: ShardPlan, rank: int) -> ShardLayout:
    parameters = {
        p.name: Parameter(
            p.name,
            p.shape,
            p.split_dim,
            tuple(Section(str(s.axis), s.units, s.unit_size) for s in p.sections),
            str(p.combine),
        )
        for p in plan.spec.parameters
    }
    ranges = tuple(
        {str(axis): (r.start, r.stop) for axis, r in shard.ranges.items()} for shard in plan.ranks
    )
    return ShardLayout(parameters, rank, ranges)


def page_cache_s(file: Path, num_bytes: int, num_threads: int) -> float:
    """Seconds to read the file's first `num_bytes` in pieces, by threads that each have one buffer."""
    size = loader.PIECE_BYTES
    buffers = [memoryview(bytearray(size)) for _ in range(num_threads)]
    descriptor = os.open(file, os.O_RDONLY)

    def read(number: int) -> None:
        for at in range(number * size, num_bytes, num_threads * size):
            os.preadv(descriptor, [buffers[number][: num_bytes - at]], at)

    with ThreadPoolExecutor(num_threads) as pool:
        began = time.perf_counter()
        list(pool.map(read, range(num_threads)))
        seconds = time.perf_counter() - began
    os.close(descriptor)
    return seconds


def load_s(
    folder: Path, config: dict[str, Any], layout: ShardLayout, device: torch.device, threads: int
) -> tuple[int, float, float]:
    """Bytes read, and the seconds of a load into fresh weights and of another into the same."""
    tp = TensorParallel(layout.rank, len(layout.ranks), SingleCommunicator())
    stored = checkpoint.match_keys(layout, checkpoint.Checkpoint.open(folder), (), "")
    tensors = ShardTensors(layout, tp, DTYPE, device)
    models.build(config, tensors)

    def load() -> tuple[int, float]:
        began = time.perf_counter()
        num_bytes = checkpoint.load(
            layout, stored, tensors.destinations, lambda _: None, num_threads=threads
        )
        return num_bytes, time.perf_counter() - began

    num_bytes, fresh_s = load()
    _, again_s = load()
    return num_bytes, fresh_s, again_s


def measure(
    folder: Path, config: dict[str, Any], tp: int, device: torch.device, threads: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """A row for each rank."""
    plan = make_plan(model_spec(config), tp)
    file = folder / checkpoint.SINGLE_FILE
    layouts = [layout_of(plan, rank) for rank in range(tp)]
    bytes_read = [0] * tp
    times: list[dict[str, list[float]]] = [
        {"page_cache": [], "load": [], "again": []} for _ in layouts
    ]
    for repeat in range(-1, repeats):  # the first one warms up
        for rank, layout in enumerate(layouts):
            num_bytes, load, again = load_s(folder, config, layout, device, threads)
            page_cache = page_cache_s(file, num_bytes, threads)
            bytes_read[rank] = num_bytes
            if repeat >= 0:
                for name, seconds in (("page_cache", page_cache), ("load", load), ("again", again)):
                    times[rank][name].append(seconds)
    for rank in range(tp):
        rates = {
            name: bytes_read[rank] / statistics.median(seconds) / 1e9
            for name, seconds in times[rank].items()
        }
        yield {
            "tp": tp,
            "rank": rank,
            "bytes": bytes_read[rank],
            **{f"{name}_gb_per_s": rate for name, rate in rates.items()},
            "load_share": rates["load"] / rates["page_cache"],
            "again_share": rates["again"] / rates["page_cache"],
            "seconds": times[rank],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=3.0, help="size of the checkpoint")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="that read (default: as a worker takes)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument(
        "--preadv",
        action="store_true",
        help="read rows one call each, as where process_vm_readv is forbidden",
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.preadv:
        loader._process_vm_readv = lambda local, remote: -1
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    cores = len(os.sched_getaffinity(0))
    threads = arguments.threads or min(loader.MAX_THREADS, cores)
    config = config_of(int(arguments.gib * 2**30))
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        file = write(Path(name), config)
        about = {
            "checkpoint_bytes": file.stat().st_size,
            "layers": config["num_hidden_layers"],
            "device": torch.cuda.get_device_name(arguments.device)
            if arguments.device.type == "cuda"
            else "cpu",
            "cores": cores,
            "threads": threads,
            "repeats": arguments.repeats,
            "huge_pages": "hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""),
        }
        if not arguments.json:
            print(", ".join(f"{key} {value}" for key, value in about.items()))
            print(f"{'tp':>2} {'rank':>4} {'GB':>6} {'page cache':>11} {'load':>16} {'again':>16}")
        for tp in arguments.tp:
            for row in measure(
                Path(name), config, tp, arguments.device, threads, arguments.repeats
            ):
                rows.append(row)
                if not arguments.json:
                    print(
                        f"{tp:>2} {row['rank']:>4} {row['bytes'] / 1e9:>6.2f} "
                        f"{row['page_cache_gb_per_s']:>6.2f} GB/s "
                        f"{row['load_gb_per_s']:>5.2f} GB/s {row['load_share']:>5.0%} "
                        f"{row['again_gb_per_s']:>5.2f} GB/s {row['again_share']:>5.0%}",
                        flush=True,
                    )
    if arguments.json:
        print(json.dumps(about | {"ranks": rows}, indent=1))


if __name__ == "__main__":
    main()
