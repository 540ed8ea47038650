"""Which way a sum goes, from what was measured; and that the kernel compiles for a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_worker.communicator import peer_sums
from shard_worker.communicator.peer import Reach, choose_reach

KIB, MIB = 2**10, 2**20


def measured(**microseconds: list[float]) -> dict[int, dict[str, float]]:
    sizes = [8 * KIB, 256 * KIB, MIB, 16 * MIB]
    return {
        size: {path: times[at] for path, times in microseconds.items()}
        for at, size in enumerate(sizes)
    }


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (
            measured(one_shot=[4, 6, 20, 99], two_shot=[6, 8, 10, 90], nccl=[20, 20, 25, 79]),
            Reach(256 * KIB, MIB, False),
        ),
        (
            measured(one_shot=[4, 6, 20, 60], two_shot=[6, 8, 30, 90], nccl=[20, 20, 25, 79]),
            Reach(16 * MIB, 16 * MIB, True),
        ),
        (
            measured(one_shot=[9, 9, 99, 99], two_shot=[8, 8, 8, 8], nccl=[20, 20, 25, 79]),
            Reach(0, 16 * MIB, True),
        ),
        (
            measured(one_shot=[30, 30, 30, 30], two_shot=[30, 30, 9, 9], nccl=[20, 20, 25, 79]),
            Reach(0, 0, False),
        ),
    ],
    ids=["each its range", "one shot for all", "two shots for all", "NCCL for the small ones"],
)
def test_where_the_paths_cross(times: dict[int, dict[str, float]], expected: Reach) -> None:
    assert choose_reach(times) == expected


@given(
    st.lists(
        st.fixed_dictionaries(
            {path: st.floats(1, 100) for path in ("one_shot", "two_shot", "nccl")}
        ),
        max_size=6,
    )
)
def test_where_peers_do_it_nccl_was_slower(times: list[dict[str, float]]) -> None:
    by_size = {2**at: paths for at, paths in enumerate(times)}
    reach = choose_reach(by_size)
    for size, paths in by_size.items():
        chosen = reach.path(size)
        if chosen == "one_shot":
            assert paths[chosen] == min(paths.values())
        elif chosen == "two_shot":
            assert paths[chosen] <= paths["nccl"]
    assert reach.one_shot_bytes <= reach.two_shot_bytes


def test_the_rest_is_nccls() -> None:
    reach = Reach(one_shot_bytes=64, two_shot_bytes=256)
    paths = [reach.path(size) for size in (1, 64, 65, 256, 257)]
    assert paths == ["one_shot", "one_shot", "two_shot", "two_shot", "nccl"]
    assert Reach().path(1) == "nccl"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("num_ranks", [2, 8])
@pytest.mark.parametrize("element", [0, 1, 2], ids=["bfloat16", "float16", "float32"])
def test_the_kernel_compiles_for_a_gpu_and_keeps_to_its_registers(
    num_ranks: int, element: int, tmp_path: Path
) -> None:
    source = Path(peer_sums.__file__).with_name("peer_all_reduce.cu")
    command = ["nvcc", "-arch=sm_90", "-std=c++17", "-cubin", "-Xptxas=-v", "-o", "kernel.cubin"]
    defined = [f"-DRANKS={num_ranks}", f"-DELEMENT={element}", "-DITEMS=1"]
    told = subprocess.run(
        [*command, *defined, str(source)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in told.stderr
