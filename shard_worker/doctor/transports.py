"""How ranks would exchange activations here, each way tried."""

from collections.abc import Sequence

from colrow.finding import Finding, Verdict
from shard_worker.doctor.probe import PAYLOAD_BYTES
from shard_worker.doctor.trial import Trial, failure_of


def all_reduce_finding(
    name: str, trials: Sequence[Trial], *, verdict: Verdict, advice: str
) -> Finding:
    """Of an all-reduce tried between ranks; `verdict` and `advice` are for one that fails."""
    if failure := failure_of(trials):
        return Finding(name, verdict, failure, advice)
    slowest_us = max(trial.value("median_us") for trial in trials)
    return Finding(
        name,
        Verdict.OK,
        f"an all-reduce over {len(trials)} ranks verified; {slowest_us:,.0f} µs for "
        f"{PAYLOAD_BYTES // 1024} KiB, median",
    )


def cpu_transport_finding(works: dict[str, bool]) -> Finding:
    """What ranks on CPUs of this host get, by whether "shm" and "gloo" work."""
    name = "ranks on CPUs"
    if works["shm"]:
        return Finding(name, Verdict.OK, "exchange over shm")
    if works["gloo"]:
        return Finding(
            name,
            Verdict.PROBLEM,
            "exchange over shm, unless told otherwise, and that does not work",
            "serve with --transport gloo",
        )
    return Finding(name, Verdict.PROBLEM, "can't exchange", "serve with --tp 1, or mend the above")
