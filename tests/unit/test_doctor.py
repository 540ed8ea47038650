"""What the doctor makes of what it finds, on machines of any kind."""

import os
import sys
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from colrow import MAX_PEERS
from colrow.finding import Finding, Verdict
from colrow.gpus import HostGpus
from shard_worker.doctor import __main__ as doctor
from shard_worker.doctor import gpus, host, topology, transports
from shard_worker.doctor.topology import SmiGpu
from shard_worker.doctor.trial import Trial, failure_of, how_it_failed, output_of, try_out

GIB, MIB = 2**30, 2**20

TWO_GPUS = (
    "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tPIX\t0-47,96-143\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tSYS\t48-95,144-191\t1\t\tN/A\n"
    "NIC0\tPIX\tSYS\t X \t\t\t\t\n"
    "\n"
    "Legend:\n"
    "\n"
    "  X    = Self\n"
    "  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes\n"
    "  NV#  = Connection traversing a bonded set of # NVLinks\n"
    "\n"
    "NIC Legend:\n"
    "\n"
    "  NIC0: mlx5_0\n"
)
FOUR_GPUS = (
    "        GPU0    GPU1    GPU2    GPU3    CPU Affinity    NUMA Affinity\n"
    "GPU0     X      PIX     SYS     SYS     0-15            0\n"
    "GPU1    PIX      X      SYS     SYS     0-15            0\n"
    "GPU2    SYS     SYS      X      PHB     16-31           1\n"
    "GPU3    SYS     SYS     PHB      X      16-31           1\n"
)
ONE_GPU = "\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t0-15\t0\n"

SMI = [
    SmiGpu(0, "aa", "580.95.05", "Default", "Disabled"),
    SmiGpu(1, "bb", "580.95.05", "Default", "Disabled"),
]


def told(*lines: dict[str, Any], failure: str = "") -> Trial:
    return Trial(lines, failure)


def gpu(index: int, uuid: str = "aa", free: float = 138.0) -> dict[str, Any]:
    return {
        "index": index,
        "name": "NVIDIA H200",
        "uuid": uuid,
        "capability": "9.0",
        "free_bytes": int(free * GIB),
        "total_bytes": 140 * GIB,
    }


class TestTopology:
    def test_links_of_two_gpus_beside_a_network_card(self) -> None:
        assert topology.parse_links(TWO_GPUS) == {(0, 1): "NV18"}

    def test_links_of_four_gpus_each_pair_once(self) -> None:
        assert topology.parse_links(FOUR_GPUS) == {
            (0, 1): "PIX",
            **dict.fromkeys([(0, 2), (0, 3), (1, 2), (1, 3)], "SYS"),
            (2, 3): "PHB",
        }

    @pytest.mark.parametrize("text", [ONE_GPU, "", "Failed to query topology\n"])
    def test_no_pair_has_no_link(self, text: str) -> None:
        assert topology.parse_links(text) == {}

    @pytest.mark.parametrize(
        ("link", "words", "short"),
        [
            ("NV18", "18 NVLinks", True),
            ("NV1", "1 NVLink", True),
            ("PIX", "one PCIe switch (PIX)", True),
            ("SYS", "PCIe through the CPUs of two NUMA nodes (SYS)", False),
            ("C2C", "C2C", False),
        ],
    )
    def test_a_link_in_words(self, link: str, words: str, short: bool) -> None:
        assert topology.describe_link(link) == words
        assert topology.is_short(link) is short

    def test_gpus_of_the_driver(self) -> None:
        text = (
            "0, GPU-5d3a-77, 580.95.05, Default, Disabled\n"
            "1, GPU-5d3a-78, 580.95.05, Exclusive_Process, [N/A]\n"
        )
        assert topology.parse_gpus(text) == [
            SmiGpu(0, "5d3a-77", "580.95.05", "Default", "Disabled"),
            SmiGpu(1, "5d3a-78", "580.95.05", "Exclusive_Process", "[N/A]"),
        ]
        assert topology.parse_gpus("No devices were found\n") == []


class TestDevices:
    def test_a_gpu_that_works(self) -> None:
        trial = told({"num_devices": 1, "driver_cuda": 13010}, gpu(0))
        (finding,) = gpus.device_findings(trial, SMI, "13.0", HostGpus(1))
        assert (finding.name, finding.verdict, finding.advice) == ("cuda:0", Verdict.OK, "")
        for part in (
            *("NVIDIA H200", "138.0 of 140.0 GiB", "capability 9.0"),
            *("CUDA 13.0 in torch and 13.1 in the driver 580.95.05", "compute mode Default"),
        ):
            assert part in finding.found

    def test_one_that_fails_hides_no_other(self) -> None:
        broken = {"index": 0, "error": "CUDA error: no kernel image is available"}
        findings = gpus.device_findings(told(broken, gpu(1, "bb")), SMI, "13.0", HostGpus(2))
        assert [f.verdict for f in findings] == [Verdict.PROBLEM, Verdict.OK]

    def test_a_driver_that_hangs_is_a_problem_after_those_that_answered(self) -> None:
        trial = told({"num_devices": 2}, gpu(0), failure="did not end within 60 s")
        first, second = gpus.device_findings(trial, SMI, "13.0", HostGpus(2))
        assert first.verdict is Verdict.OK
        assert second.verdict is Verdict.PROBLEM
        assert "did not end within 60 s (after 1 GPUs)" in second.found and second.advice

    @pytest.mark.parametrize(
        ("smi", "free", "verdict", "advice"),
        [
            (SMI[0], 20.0, Verdict.WARNING, "other processes hold memory"),
            (
                SmiGpu(3, "aa", "580", "Prohibited", "[N/A]"),
                139,
                Verdict.PROBLEM,
                "-i 3 -c DEFAULT",
            ),
            (
                SmiGpu(3, "aa", "580", "Exclusive_Process", "[N/A]"),
                *(139, Verdict.WARNING, "nvidia-smi -i 3 -c DEFAULT"),
            ),
            (SmiGpu(3, "aa", "580", "Default", "Enabled"), 139, Verdict.WARNING, "-i 3 -mig 0"),
        ],
    )
    def test_a_gpu_that_is_not_free_to_use(
        self, smi: SmiGpu, free: float, verdict: Verdict, advice: str
    ) -> None:
        (finding,) = gpus.device_findings(told(gpu(0, free=free)), [smi], "13.0", HostGpus(1))
        assert finding.verdict is verdict
        assert advice in finding.advice

    @pytest.mark.parametrize(("num_gpus", "verdict"), [(0, Verdict.NOT_HERE), (1, Verdict.PROBLEM)])
    def test_no_gpu_is_a_problem_where_the_driver_has_one(
        self, num_gpus: int, verdict: Verdict
    ) -> None:
        (finding,) = gpus.device_findings(told({"num_devices": 0}), [], "13.0", HostGpus(num_gpus))
        assert finding.verdict is verdict
        assert bool(finding.advice) is bool(num_gpus)

    @pytest.mark.parametrize(
        ("visible_devices", "seen"), [("", []), ("1", [gpu(0, "bb")]), ("-1,0", [])]
    )
    def test_gpus_that_the_environment_hides_are_no_fault_of_the_driver(
        self, visible_devices: str, seen: list[dict[str, Any]]
    ) -> None:
        trial = told({"num_devices": len(seen)}, *seen)
        *others, hidden = gpus.device_findings(trial, SMI, "13.0", HostGpus(2, visible_devices))
        assert "driver is not there" not in str(others)
        assert all(finding.verdict is not Verdict.PROBLEM for finding in others)
        assert hidden.found == f"CUDA_VISIBLE_DEVICES = {visible_devices!r} shows {len(seen)} of 2"

    def test_torch_for_cpus_is_a_problem_where_there_are_gpus(self) -> None:
        trial = told({"version": "2.13.0+cpu", "cuda": None})
        assert gpus.torch_finding(trial, 0).verdict is Verdict.OK
        problem = gpus.torch_finding(trial, 2)
        assert problem.verdict is Verdict.PROBLEM and "pip install" in problem.advice

    def test_no_torch_is_a_problem_with_its_extra(self) -> None:
        trial = told(failure="ModuleNotFoundError: No module named 'torch'")
        assert "'colrow[worker]'" in gpus.torch_finding(trial, 0).advice


class TestPairs:
    def test_links_are_found_by_uuid_whatever_cudas_order(self) -> None:
        smi = [SmiGpu(index, uuid, "580", "Default", "") for index, uuid in enumerate("abcd")]
        # Seen by torch as cuda:0 and cuda:1: the driver's 3 and 2.
        (finding,) = gpus.link_findings({0: "d", 1: "c"}, smi, topology.parse_links(FOUR_GPUS))
        assert (finding.verdict, finding.found) == (
            Verdict.WARNING,
            "cuda:0-1: PCIe through the CPU (PHB)",
        )

    def test_without_nvidia_smi_links_are_unknown(self) -> None:
        (finding,) = gpus.link_findings({0: "aa", 1: "bb"}, [], {})
        assert finding.verdict is Verdict.NOT_HERE and "unknown" in finding.found

    def test_pairs_with_the_same_link_are_one_finding(self) -> None:
        smi = [SmiGpu(index, str(index), "580", "Default", "") for index in range(4)]
        uuid_of = {index: str(index) for index in range(4)}
        same = {(a, b): "NV18" for a in range(4) for b in range(a + 1, 4)}
        (finding,) = gpus.link_findings(uuid_of, smi, same)
        assert (finding.verdict, finding.found) == (Verdict.OK, "all 6 pairs: 18 NVLinks")
        different = gpus.link_findings(uuid_of, smi, same | {(1, 2): "SYS"})
        assert [f.verdict for f in different] == [Verdict.OK, Verdict.WARNING]
        assert different[1].found.startswith("cuda:1-2: ")

    def test_what_is_written_both_ways_is_verified(self) -> None:
        lines = [
            {"writer": 0, "owner": 1, "arrived": True},
            {"writer": 1, "owner": 0, "arrived": True},
        ]
        outcomes = gpus.write_outcomes(lines, 2, "")
        assert outcomes == {(0, 1): "", (1, 0): ""}
        (finding,) = gpus.write_findings("peer access", outcomes)
        assert finding.verdict is Verdict.OK and "written and verified" in finding.found

    @pytest.mark.parametrize("lost", [(0, 1), (1, 0)])
    def test_what_does_not_arrive_is_a_problem_either_way(self, lost: tuple[int, int]) -> None:
        lines = [
            {"writer": writer, "owner": owner, "arrived": (writer, owner) != lost}
            for writer, owner in [(0, 1), (1, 0)]
        ]
        outcomes = gpus.write_outcomes(lines, 2, "")
        assert outcomes[lost] == gpus.LOST
        (finding,) = gpus.write_findings("peer access", outcomes)
        assert finding.verdict is Verdict.PROBLEM and "ACS" in finding.advice

    def test_a_handle_that_can_not_be_opened_is_why_nothing_arrived(self) -> None:
        lines: list[dict[str, Any]] = [
            {"writer": 0, "owner": 1, "error": "cudaErrorMapBufferObjectFailed"},
            {"writer": 1, "owner": 0, "arrived": True},
            {"writer": 0, "owner": 1, "arrived": False},
        ]
        outcomes = gpus.write_outcomes(lines, 2, "")
        assert outcomes == {(0, 1): "cudaErrorMapBufferObjectFailed", (1, 0): ""}
        (finding,) = gpus.write_findings("CUDA IPC", outcomes)
        assert finding.verdict is Verdict.WARNING and "cudaErrorMap" in finding.found

    def test_pairs_after_one_that_hangs_fail_with_the_reason(self) -> None:
        lines = [{"writer": 0, "owner": 1, "arrived": True}]
        outcomes = gpus.write_outcomes(lines, 2, "did not end within 60 s")
        assert outcomes == {(0, 1): "", (1, 0): "did not end within 60 s"}

    def test_ranks_take_peer_where_every_pair_can_write_and_else_all_of_them_nccl(self) -> None:
        works = dict.fromkeys(permutations(range(4), 2), "")
        assert gpus.transport_finding(4, works, works).found == "exchange over peer"
        one_way = works | {(2, 1): "no"}
        for by_peer, by_ipc in ((one_way, works), (works, one_way), (one_way, one_way)):
            found = gpus.transport_finding(4, by_peer, by_ipc).found
            assert found.startswith("all exchange over nccl, for cuda:1-2 can't write")
        found = gpus.transport_finding(4, one_way, works | {(0, 3): gpus.LOST}).found
        assert found.startswith("all exchange over nccl, for cuda:0-3, cuda:1-2 can't write")
        none = dict.fromkeys(works, "no")
        found = gpus.transport_finding(4, none, works).found
        assert found.startswith("all exchange over nccl, for all 6 pairs can't write")

    def test_more_ranks_than_peers_can_be_take_nccl(self) -> None:
        works = dict.fromkeys(permutations(range(MAX_PEERS + 1), 2), "")
        found = gpus.transport_finding(MAX_PEERS + 1, works, works).found
        assert found == "exchange over peer up to --tp 8, beyond that over nccl"

    def test_one_gpu_has_nobody_to_exchange_with(self) -> None:
        assert "--tp 1" in gpus.transport_finding(1, {}, {}).found


class TestLibraries:
    def test_nccl_is_named_with_the_library_that_is_loaded(self) -> None:
        trial = told(
            {
                "nccl": "2.28.9",
                "cupy": "14.2.0 (cupy-cuda13x)",
                "cuda": "13.0",
                "libraries": ["/x/libnccl.so.2"],
            }
        )
        finding = gpus.nccl_library_finding(trial, 2)
        assert finding.verdict is Verdict.OK
        assert "2.28.9 of /x/libnccl.so.2; CuPy 14.2.0 (cupy-cuda13x)" in finding.found

    @pytest.mark.parametrize(
        ("num_devices", "verdict"), [(1, Verdict.NOT_HERE), (2, Verdict.PROBLEM)]
    )
    def test_one_gpu_needs_no_nccl(self, num_devices: int, verdict: Verdict) -> None:
        trial = told(failure="CommunicatorError: nccl: CuPy can't be imported")
        assert gpus.nccl_library_finding(trial, num_devices).verdict is verdict

    def test_triton_is_needed_and_flashinfer_is_not(self) -> None:
        missing = told(failure="ModuleNotFoundError: No module named 'x'")
        triton = gpus.package_finding("Triton", missing, needed_for="kernels", without="")
        assert triton.verdict is Verdict.PROBLEM and "pip install triton" in triton.advice
        other = gpus.package_finding("FlashInfer", missing, needed_for="", without="ours is used")
        assert (other.verdict, other.found) == (Verdict.NOT_HERE, "not needed: ours is used")
        there = gpus.package_finding("Triton", told({"version": "3.5"}), needed_for="x", without="")
        assert (there.verdict, there.found) == (Verdict.OK, "3.5")


class TestHost:
    @pytest.mark.parametrize(
        ("free_mib", "verdict"),
        [(64, Verdict.OK), (31, Verdict.WARNING), (3, Verdict.PROBLEM)],
    )
    def test_shared_memory_has_room_for_the_slots_of_ranks(
        self, free_mib: int, verdict: Verdict
    ) -> None:
        finding = host.shared_memory_finding(64 * MIB, free_mib * MIB)
        assert finding.verdict is verdict
        assert bool(finding.advice) is (verdict is not Verdict.OK)

    def test_memory_is_also_what_a_container_may_take(self) -> None:
        assert host.memory_finding(64 * GIB, 32 * GIB, None).verdict is Verdict.OK
        limited = host.memory_finding(64 * GIB, 32 * GIB, 1 * GIB)
        assert limited.verdict is Verdict.WARNING and "1,024" in limited.found

    def test_stubs_say_which_packages_they_were_generated_with(self) -> None:
        text = "GRPC_GENERATED_VERSION = '1.84.0'\n# Protobuf Python Version: 7.35.1\n"
        assert host.stub_versions(text) == {"grpcio": "1.84.0", "protobuf": "7.35.1"}

    @pytest.mark.parametrize(
        ("grpcio", "verdict"),
        [("1.84.0", Verdict.OK), ("1.100.0", Verdict.OK), ("1.9.9", Verdict.PROBLEM)],
    )
    def test_an_older_grpc_than_the_stubs_is_a_problem(self, grpcio: str, verdict: Verdict) -> None:
        wanted = {"grpcio": "1.84.0", "protobuf": "7.35.1"}
        finding = host.stubs_finding(wanted, {"grpcio": grpcio, "protobuf": "7.35.1"})
        assert finding.verdict is verdict
        assert ("'grpcio>=1.84.0'" in finding.advice) is (verdict is Verdict.PROBLEM)

    def test_stubs_of_this_installation_are_found(self) -> None:
        assert host.stubs().verdict is Verdict.OK
        assert "?" not in host.stubs().found

    @pytest.mark.parametrize(("num_gpus", "verdict"), [(0, Verdict.WARNING), (1, Verdict.PROBLEM)])
    def test_expandable_segments_keep_workers_off_gpus_only(
        self, num_gpus: int, verdict: Verdict
    ) -> None:
        setting = ("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        finding = host.allocator(setting, num_gpus)
        assert finding.verdict is verdict and "unset PYTORCH_ALLOC_CONF" in finding.advice
        assert host.allocator(None, num_gpus).verdict is Verdict.OK

    @pytest.mark.parametrize(
        ("shm", "gloo", "verdict"),
        [
            (True, False, Verdict.OK),
            (False, True, Verdict.PROBLEM),
            (False, False, Verdict.PROBLEM),
        ],
    )
    def test_ranks_on_cpus_take_shm_unless_told_otherwise(
        self, shm: bool, gloo: bool, verdict: Verdict
    ) -> None:
        finding = transports.cpu_transport_finding({"shm": shm, "gloo": gloo})
        assert finding.verdict is verdict
        assert ("--transport gloo" in finding.advice) is (gloo and not shm)


class TestGpusTogether:
    """All findings on GPUs, from what every trial tells."""

    LINES = (
        {"writer": 0, "owner": 1, "arrived": True},
        {"writer": 1, "owner": 0, "arrived": True},
    )

    @pytest.fixture
    def trials(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Trial]]:
        """Of two GPUs in order, by probe; to be changed."""
        trials = {
            "devices": [told({"num_devices": 2, "driver_cuda": 13000}, gpu(0), gpu(1, "bb"))],
            "triton": [told({"version": "3.5"})],
            "flashinfer": [told(failure="ModuleNotFoundError: no")],
            "nccl_library": [
                told({"nccl": "2.28.9", "cupy": "14", "cuda": "13.0", "libraries": ["/libnccl.so"]})
            ],
            "peer_access": [told(*self.LINES)],
            "cuda_ipc": [told(line) for line in self.LINES],
            "nccl": [told({"median_us": 12.0}), told({"median_us": 13.0})],
        }
        outputs = {
            topology.GPUS: "0, GPU-aa, 580, Default, [N/A]\n1, GPU-bb, 580, Default, [N/A]\n",
            topology.TOPOLOGY: TWO_GPUS,
        }

        def try_out(probe: str, *arguments: str, ranks: int = 1) -> list[Trial]:
            found = trials[arguments[0] if probe == "package" else probe]
            assert len(found) == ranks
            return found

        monkeypatch.setattr(doctor, "try_out", try_out)
        monkeypatch.setattr(doctor, "output_of", outputs.__getitem__)
        return trials

    def test_two_gpus_in_order(self, trials: dict[str, list[Trial]]) -> None:
        findings = list(doctor._gpus("13.0", HostGpus(2)))
        assert [(finding.name, finding.verdict) for finding in findings] == [
            ("cuda:0", Verdict.OK),
            ("cuda:1", Verdict.OK),
            ("Triton", Verdict.OK),
            ("FlashInfer", Verdict.NOT_HERE),
            ("NCCL", Verdict.OK),
            ("links", Verdict.OK),
            ("peer access", Verdict.OK),
            ("CUDA IPC", Verdict.OK),
            ("transport nccl", Verdict.OK),
            ("ranks on GPUs", Verdict.OK),
        ]
        assert findings[-2].found.startswith("an all-reduce over 2 ranks verified; 13 µs for 8 KiB")
        assert findings[-1].found == "exchange over peer"

    def test_where_ipc_hangs_all_else_is_said_and_nccl_is_taken(
        self, trials: dict[str, list[Trial]]
    ) -> None:
        trials["cuda_ipc"] = [told(failure="did not end within 60 s")] * 2
        findings = {finding.name: finding for finding in doctor._gpus("13.0", HostGpus(2))}
        assert findings["CUDA IPC"].verdict is Verdict.WARNING
        assert "did not end within 60 s" in findings["CUDA IPC"].found
        assert findings["ranks on GPUs"].found.startswith(
            "all exchange over nccl, for cuda:0-1 can"
        )

    def test_one_gpu_is_tried_with_no_other(self, trials: dict[str, list[Trial]]) -> None:
        trials["devices"] = [told({"num_devices": 1, "driver_cuda": 13000}, gpu(0))]
        for needs_two in ("peer_access", "cuda_ipc", "nccl"):
            del trials[needs_two]
        names = [finding.name for finding in doctor._gpus("13.0", HostGpus(1))]
        assert names == ["cuda:0", "Triton", "FlashInfer", "NCCL", "ranks on GPUs"]

    def test_beside_a_broken_gpu_nothing_between_gpus_is_tried(
        self, trials: dict[str, list[Trial]]
    ) -> None:
        broken = {"index": 1, "error": "CUDA error: device is busy"}
        trials["devices"] = [told({"num_devices": 2, "driver_cuda": 13000}, gpu(0), broken)]
        findings = list(doctor._gpus("13.0", HostGpus(2)))
        assert [f.verdict for f in findings] == [Verdict.OK, Verdict.PROBLEM]


STAND_IN = """
import ctypes, mmap, os, sys, tempfile

cudaIpcMemLazyEnablePeerAccess = 1
mapped = {}


class CUDARuntimeError(RuntimeError):
    pass


def map(path, num_bytes):
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), num_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mapped[address] = (path, num_bytes, memory)
    return address


def malloc(num_bytes):
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.truncate(num_bytes)
    return map(file.name, num_bytes)


def ipcGetMemHandle(address):
    path, num_bytes, _ = mapped[address]
    return f"{num_bytes} {path}".encode()


def ipcOpenMemHandle(handle, flags):
    num_bytes, path = handle.decode().split()
    if sys.argv[3] == os.environ.get("REFUSED"):  # the rank
        raise CUDARuntimeError("cudaErrorMapBufferObjectFailed: mapping failed\\nmore")
    return map(path, int(num_bytes))


def memset(address, value, num_bytes):
    ctypes.memset(address, value, num_bytes)


def memcpy(target, source, num_bytes, kind):
    if os.environ.get("LOSES"):
        return
    ctypes.memmove(target, source, num_bytes)


def setDevice(device):
    pass


def deviceSynchronize():
    pass


def ipcCloseMemHandle(address):
    pass


def free(address):
    os.unlink(mapped[address][0])
"""


class TestCudaIpc:
    """The probe with files in place of GPUs: who writes where, and who looks."""

    @pytest.fixture(autouse=True)
    def stand_in(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "cupy" / "cuda"
        package.mkdir(parents=True)
        for name, text in {"__init__": "", "runtime": STAND_IN}.items():
            (package / f"{name}.py").write_text(text)
        (package.parent / "__init__.py").touch()
        paths = filter(None, (str(tmp_path), os.environ.get("PYTHONPATH", "")))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        monkeypatch.setenv("TMPDIR", str(tmp_path))

    def outcomes(self) -> dict[tuple[int, int], str]:
        ranks = try_out("cuda_ipc", "0", "1", "2", ranks=3)
        assert failure_of(ranks) == ""
        return gpus.write_outcomes([line for rank in ranks for line in rank.told], 3, "")

    def test_every_rank_finds_what_every_other_one_wrote(self) -> None:
        assert self.outcomes() == dict.fromkeys(permutations(range(3), 2), "")

    def test_a_rank_that_can_open_nothing_is_told_from_the_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REFUSED", "1")
        for (writer, _), problem in self.outcomes().items():
            why = "cudaErrorMapBufferObjectFailed: mapping failed"
            assert problem == (why if writer == 1 else "")

    def test_what_is_lost_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOSES", "1")
        assert set(self.outcomes().values()) == {gpus.LOST}


class TestTrials:
    def test_what_takes_too_long_is_ended_in_time(self) -> None:
        began = time.monotonic()
        (trial,) = try_out("torch_build", timeout_s=0.05)
        assert trial.failure == "did not end within 0.05 s"
        assert output_of(["sleep", "60"], timeout_s=0.2) is None
        assert time.monotonic() - began < 10

    def test_what_fails_says_why(self) -> None:
        (trial,) = try_out("package", "no_such_module")
        assert trial.failure == "ModuleNotFoundError: No module named 'no_such_module'"

    def test_the_rank_that_knows_why_is_quoted_and_nobody_waits_for_the_other(self) -> None:
        began = time.monotonic()
        trials = try_out("nccl", "0", "no number", ranks=2)
        assert time.monotonic() - began < 30, "rank 0 would wait a minute for rank 1"
        assert "rank " in failure_of(trials)
        killed = told(failure="did not end within 60 s")
        knows = told({"failure": "OSError: no"}, failure="OSError: no")
        assert failure_of([killed, knows]) == "rank 1: OSError: no"
        assert failure_of([told(), told()]) == ""

    def test_how_a_process_failed(self) -> None:
        assert how_it_failed(0, "noise", 1) == ""
        assert how_it_failed(None, "", 1) == "did not end within 1 s"
        assert how_it_failed(-11, "", 1) == "was killed by SIGSEGV"
        assert how_it_failed(3, "one\ntwo\n\n", 1) == "ended with exit code 3: two"

    def test_a_command_that_is_not_there_prints_nothing(self) -> None:
        assert output_of(["no-such-command"]) is None
        assert output_of([sys.executable, "-c", "print('here')"]) == "here\n"

    def test_a_step_that_fails_hides_none_after_it(self) -> None:
        def broken() -> list[Finding]:
            raise OSError("/proc is not there")

        (finding,) = doctor._guarded("cores", broken)
        assert finding.verdict is Verdict.WARNING
        assert "OSError: /proc is not there" in finding.found

    def test_no_trial_leaves_a_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        try_out("torch_build", timeout_s=0.05)
        output_of(["true"])
        assert not list(tmp_path.iterdir())
