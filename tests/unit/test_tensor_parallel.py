"""Collectives where they are called: counted always, timed when that is asked for."""

import time

import pytest
import torch

from shard_worker.communicator.single import SingleCommunicator
from shard_worker.tensor_parallel import OpStats, TensorParallel
from tests.unit.thread_ranks import run_ranks

pytestmark = pytest.mark.timeout(30)

LATE_S = 0.05


def test_a_collective_is_timed_with_what_it_waits_for_the_others() -> None:
    def run(tp: TensorParallel) -> list[tuple[str, int, int]]:
        layer = tp.collectives("model.layers.0")
        with tp.timing(True) as times:
            if tp.rank == 1:
                time.sleep(LATE_S)
            assert layer.all_reduce(torch.ones(3)).tolist() == [2, 2, 2]
            layer.all_gather(torch.ones(2), (2, 2))
        return [
            (call.stats.operation, call.payload_bytes, call.duration_ns) for call in times.wait()
        ]

    first, second = run_ranks(2, run)
    assert [call[:2] for call in first] == [("all_reduce", 12), ("all_gather", 8)]
    assert [call[:2] for call in second] == [call[:2] for call in first]
    waited, own = first[0][2], second[0][2]
    assert waited >= 0.9e9 * LATE_S, "who came first waited"
    assert 0 < own <= waited - 0.5e9 * LATE_S, "who came last did not"


def test_what_is_timed_is_added_to_the_counters_and_what_is_not_only_counted() -> None:
    def run(tp: TensorParallel) -> list[OpStats]:
        layer = tp.collectives("model.layers.0")
        layer.all_reduce(torch.zeros(8))
        for wanted in (True, False, True):
            with tp.timing(wanted) as times:
                layer.all_reduce(torch.zeros(2))
            assert len(times.wait()) == wanted
        return tp.all_stats()

    for (stats,) in run_ranks(2, run):
        assert (stats.path, stats.calls, stats.payload_bytes) == ("threads", 4, 32 + 3 * 8)
        assert (stats.timed_calls, stats.timed_bytes) == (2, 16)
        assert stats.timed_ns > 0


def test_one_rank_times_nothing() -> None:
    tp = TensorParallel(0, 1, SingleCommunicator())
    with tp.timing(True) as times:
        tp.collectives("sampler").all_gather(torch.ones(1), (1,))
    assert times.wait() == []


def test_a_step_that_fails_leaves_no_timing_behind() -> None:
    def run(tp: TensorParallel) -> None:
        layer = tp.collectives("model.layers.0")
        with pytest.raises(ZeroDivisionError), tp.timing(True):
            raise ZeroDivisionError
        layer.all_reduce(torch.zeros(2))
        assert tp.all_stats()[0].timed_calls == 0

    run_ranks(2, run)


def test_times_that_are_read_in_the_next_epoch_do_not_count_there() -> None:
    def run(tp: TensorParallel) -> None:
        layer = tp.collectives("model.layers.0")
        with tp.timing(True) as times:
            layer.all_reduce(torch.zeros(2))
        tp.renew(tp.comm)
        layer.all_reduce(torch.zeros(2))
        assert len(times.wait()) == 1
        (stats,) = tp.all_stats()
        assert (stats.calls, stats.timed_calls, stats.timed_ns) == (1, 0, 0)

    run_ranks(2, run)
