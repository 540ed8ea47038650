"""What there is of GPUs, and between them: from what probes told to findings."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

from colrow import MAX_PEERS
from colrow.finding import Finding, Verdict
from colrow.gpus import HostGpus
from shard_worker import cuda_libraries
from shard_worker.doctor import topology
from shard_worker.doctor.topology import SmiGpu
from shard_worker.doctor.trial import Trial

Pair = tuple[int, int]

GIB = 2**30

LOST = "what was written did not arrive"

_OPEN_MODE = "Default"
_FREE_SHARE = 0.9  # of the memory; what `--gpu-memory-utilization` takes by default


def torch_finding(trial: Trial, num_gpus: int) -> Finding:
    """Of the probe `torch_build`, on a host with so many visible GPUs."""
    if trial.failure:
        missing = "ModuleNotFoundError" in trial.failure
        advice = "pip install 'colrow[worker]'" if missing else "install torch anew"
        return Finding("torch", Verdict.PROBLEM, trial.failure, advice)
    version, cuda = trial.value("version"), trial.value("cuda")
    found = f"{version}, " + (f"built for CUDA {cuda}" if cuda else "built for CPUs")
    problem = cuda_libraries.torch_problem(version, cuda) if num_gpus else ""
    return Finding("torch", Verdict.PROBLEM if problem else Verdict.OK, found, problem)


def device_findings(
    trial: Trial, smi: Sequence[SmiGpu], torch_cuda: str, host_has: HostGpus
) -> list[Finding]:
    """Of the probe `devices`: one for each GPU that torch sees, and one if that broke off.

    Where some of those in the driver are hidden, also one that says by what. host_has: what
    `colrow serve` goes by.
    """
    findings = []
    driver_cuda = trial.value("driver_cuda", 0)
    for told in trial.told:
        if "index" not in told:
            continue
        name = f"cuda:{told['index']}"
        if "error" in told:
            advice = (
                "see what nvidia-smi and dmesg say of it; a torch for another CUDA may not know it"
            )
            findings.append(Finding(name, Verdict.PROBLEM, told["error"], advice))
        else:
            gpu = next((gpu for gpu in smi if gpu.uuid == told["uuid"]), None)
            findings.append(_device_finding(name, told, gpu, torch_cuda, driver_cuda))
    if trial.failure:
        findings.append(
            Finding(
                "GPUs",
                Verdict.PROBLEM,
                f"{trial.failure} (after {len(findings)} GPUs)",
                "see whether nvidia-smi answers; a hanging driver needs a reset of the GPU or a reboot",
            )
        )
    elif not findings:
        found = f"torch sees none; the driver has {host_has.num_in_driver}"
        advice = cuda_libraries.device_problem(0, 0) if host_has.num_visible else ""
        verdict = Verdict.PROBLEM if host_has.num_visible else Verdict.NOT_HERE
        findings.append(Finding("GPUs", verdict, found, advice))
    if host_has.what_is_hidden:
        findings.append(Finding("hidden GPUs", Verdict.NOT_HERE, host_has.what_is_hidden))
    return findings


def _device_finding(
    name: str, told: Mapping[str, Any], gpu: SmiGpu | None, torch_cuda: str, driver_cuda: int
) -> Finding:
    free, total = told["free_bytes"], told["total_bytes"]
    found = (
        f"{told['name']}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability "
        f"{told['capability']}, CUDA {torch_cuda} in torch and "
        f"{driver_cuda // 1000}.{driver_cuda % 1000 // 10} in the driver"
    )
    advice = []
    if gpu is not None:
        found += f" {gpu.driver}, compute mode {gpu.compute_mode}"
        if gpu.mig == "Enabled":
            found += ", MIG"
            advice.append(
                "instances of MIG reach neither each other nor other GPUs: serve with --tp 1, or "
                f"nvidia-smi -i {gpu.index} -mig 0"
            )
        if gpu.compute_mode == "Prohibited":
            advice.append(f"no process may use it: nvidia-smi -i {gpu.index} -c DEFAULT")
            return Finding(name, Verdict.PROBLEM, found, "; ".join(advice))
        if gpu.compute_mode != _OPEN_MODE:
            advice.append(
                f"another rank can't open its memory: nvidia-smi -i {gpu.index} -c DEFAULT"
            )
    if free < _FREE_SHARE * total:
        advice.append("other processes hold memory that weights and KV cache could use")
    return Finding(name, Verdict.WARNING if advice else Verdict.OK, found, "; ".join(advice))


def uuids(trial: Trial) -> dict[int, str]:
    """Of the probe `devices`: the uuid of each GPU that works, by torch's index."""
    return {told["index"]: told["uuid"] for told in trial.told if "uuid" in told}


def link_findings(
    uuid_of: Mapping[int, str], smi: Sequence[SmiGpu], links: Mapping[Pair, str]
) -> list[Finding]:
    """The links between the GPUs of `uuid_of`; those of `links` are by the driver's indices."""
    driver_index = {gpu.uuid: gpu.index for gpu in smi}
    outcomes = {}
    for one, other in combinations(uuid_of, 2):
        indices = [driver_index.get(uuid_of[device], -1) for device in (one, other)]
        outcomes[one, other] = links.get((min(indices), max(indices)), "")

    def finding(link: str, pairs: str) -> Finding:
        if not link:
            return Finding("links", Verdict.NOT_HERE, f"{pairs}: unknown, nvidia-smi does not say")
        found = f"{pairs}: {topology.describe_link(link)}"
        if topology.is_short(link):
            return Finding("links", Verdict.OK, found)
        advice = (
            "an all-reduce takes longer than over NVLink; CUDA_VISIBLE_DEVICES chooses among GPUs"
        )
        return Finding("links", Verdict.WARNING, found, advice)

    return _by_outcome(outcomes, finding)


def write_outcomes(
    told: Iterable[Mapping[str, Any]], num_devices: int, failure: str
) -> dict[Pair, str]:
    """For each (writer, owner) why nothing could be written, or `LOST`; "" where it arrived.

    Of what `peer_access` or the ranks of `cuda_ipc` told before they ended, with `failure` perhaps.
    """
    errors: dict[Pair, str] = {}
    arrived: dict[Pair, bool] = {}
    for line in told:
        if "error" in line:
            errors[line["writer"], line["owner"]] = line["error"]
        elif "arrived" in line:
            arrived[line["writer"], line["owner"]] = line["arrived"]
    outcomes = {}
    for pair in permutations(range(num_devices), 2):
        unknown = failure or "was not tried"
        outcome = ("" if arrived[pair] else LOST) if pair in arrived else unknown
        outcomes[pair] = errors.get(pair, outcome)
    return outcomes


def write_findings(name: str, outcomes: Mapping[Pair, str]) -> list[Finding]:
    """Of `write_outcomes`, with each pair both ways."""

    def finding(problem: str, pairs: str) -> Finding:
        if not problem:
            return Finding(name, Verdict.OK, f"{pairs}: written and verified, both ways")
        if problem == LOST:
            # NCCL writes the same way, so it would be wrong too.
            advice = "turn PCIe ACS off or the IOMMU to pass-through; NCCL_P2P_DISABLE=1 avoids it"
            return Finding(name, Verdict.PROBLEM, f"{pairs}: {problem}", advice)
        advice = (
            "ranks with such a pair among them all take NCCL, over what it finds; containers need a "
            "common IPC namespace"
        )
        return Finding(name, Verdict.WARNING, f"{pairs}: {problem}", advice)

    return _by_outcome(_both_ways(outcomes), finding)


def transport_finding(
    num_devices: int, peer_access: Mapping[Pair, str], cuda_ipc: Mapping[Pair, str]
) -> Finding:
    """What ranks on all of these GPUs get: "peer" where every pair allows it, else "nccl" all of them.

    Of `write_outcomes`, twice. Ranks decide it together when they join, the same way.
    """
    name = "ranks on GPUs"
    if num_devices == 1:
        return Finding(name, Verdict.OK, "one GPU exchanges with nobody: colrow serve --tp 1")
    by_peer, by_ipc = _both_ways(peer_access), _both_ways(cuda_ipc)
    failing = [pair for pair in by_peer if by_peer[pair] or by_ipc[pair]]
    if failing:
        pairs = _names(failing, len(by_peer))
        found = f"all exchange over nccl, for {pairs} can't write to each other's memory"
    elif num_devices > MAX_PEERS:
        found = f"exchange over peer up to --tp {MAX_PEERS}, beyond that over nccl"
    else:
        found = "exchange over peer"
    return Finding(name, Verdict.OK, found)


def nccl_library_finding(trial: Trial, num_devices: int) -> Finding:
    """Of the probe `nccl_library`."""
    if trial.failure:
        if num_devices < 2:
            found = f"{trial.failure} (one GPU needs none)"
            return Finding("NCCL", Verdict.NOT_HERE, found)
        return Finding(
            "NCCL", Verdict.PROBLEM, trial.failure, "ranks on GPUs can't join without it"
        )
    return Finding(
        "NCCL",
        Verdict.OK,
        f"{trial.value('nccl')} of {', '.join(trial.value('libraries'))}; CuPy {trial.value('cupy')}, "
        f"torch for CUDA {trial.value('cuda')}",
    )


def package_finding(name: str, trial: Trial, *, needed_for: str, without: str) -> Finding:
    """Of the probe `package`. `needed_for` may be "": then `without` says what is used instead."""
    if not trial.failure:
        found = str(trial.value("version"))
        return Finding(name, Verdict.OK, found if needed_for else f"{found}, not used: {without}")
    if not needed_for:
        return Finding(name, Verdict.NOT_HERE, f"not needed: {without}")
    return Finding(
        name, Verdict.PROBLEM, trial.failure, f"{needed_for}: pip install {name.lower()}"
    )


def _both_ways(outcomes: Mapping[Pair, str]) -> dict[Pair, str]:
    """Of each pair (a, b), a < b, the problem of either way."""
    return {
        (one, other): outcomes[one, other] or outcomes[other, one]
        for one, other in outcomes
        if one < other
    }


def _by_outcome(
    outcomes: Mapping[Pair, str], finding: Callable[[str, str], Finding]
) -> list[Finding]:
    """One `finding(outcome, pairs)` for all pairs with the same outcome: of eight GPUs there are 28."""
    pairs: dict[str, list[Pair]] = {}
    for pair, outcome in outcomes.items():
        pairs.setdefault(outcome, []).append(pair)
    findings = []
    for outcome, having in pairs.items():
        findings.append(finding(outcome, _names(having, len(outcomes))))
    return findings


def _names(pairs: Sequence[Pair], num_pairs: int) -> str:
    """Of some out of so many pairs."""
    if len(pairs) == num_pairs > 1:
        return f"all {num_pairs} pairs"
    return ", ".join(f"cuda:{one}-{other}" for one, other in pairs)
