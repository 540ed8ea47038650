"""`colrow status`: rates from counters, the three views of a watch, and communication by module."""

import io
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live
from rich.table import Table

from client import watch
from client.endpoint import Endpoint
from client.grpc_client import Colrow
from client.views import (
    communication_by_module_table,
    communication_table,
    duration,
    status_tables,
)
from client.watch import (
    Follower,
    JsonView,
    LineView,
    LiveView,
    Meter,
    Update,
    bar,
    dashboard,
    rates,
    update_line,
)
from colrow.errors import Unavailable
from colrow.v1 import control_service_pb2 as pb
from colrow.v1 import shard_plan_pb2, shard_worker_service_pb2


def cluster(
    steps: int = 0,
    *,
    busy_us: Sequence[int] = (0, 0),
    epoch: int = 1,
    state: int = pb.CLUSTER_STATE_SERVING,
    **scheduler: int,
) -> pb.Cluster:
    return pb.Cluster(
        state=state,  # type: ignore[arg-type]
        epoch=epoch,
        model="tiny",
        scheduler=pb.SchedulerStatus(steps=steps, kv_blocks_total=100, **scheduler),  # type: ignore[arg-type]
        workers=[
            pb.WorkerStatus(
                rank=rank,
                last_step_id=steps,
                busy_us=busy,
                phase=pb.WORKER_PHASE_SERVING,
                description=shard_worker_service_pb2.WorkerDescription(
                    state=shard_worker_service_pb2.WORKER_STATE_READY,
                    communication=[
                        shard_worker_service_pb2.CommunicationStats(
                            operation="all_reduce",
                            module=f"model.layers.{layer}",
                            path="shm",
                            calls=2 * steps,
                            payload_bytes=1024 * steps,
                        )
                        for layer in range(2)
                    ],
                ),
            )
            for rank, busy in enumerate(busy_us)
        ],
    )


BEFORE = Update(10.0, cluster(100, busy_us=(0, 1_000_000), prompt_tokens=5, generated_tokens=7))
AFTER = Update(
    12.0,
    cluster(
        150,
        busy_us=(1_000_000, 4_000_000),
        prompt_tokens=25,
        generated_tokens=107,
        prefix_queries=20,
        prefix_hits=15,
        preemptions=1,
        kv_blocks_used=50,
        kv_blocks_cached=25,
        running=3,
        waiting=2,
    ),
)


def text(*parts: Any) -> str:
    file = io.StringIO()
    out = Console(file=file, width=132, highlight=False)
    for part in parts:
        out.print(part)
    return " ".join(file.getvalue().split())


# --- rates ------------------------------------------------------------------------------------


def test_rates_are_differences_over_the_time_between() -> None:
    found = rates(BEFORE, AFTER)
    assert found is not None
    assert (found.seconds, found.steps_per_s, found.preemptions) == (2.0, 25.0, 1)
    assert (found.prompt_tokens_per_s, found.generated_tokens_per_s) == (10.0, 50.0)
    assert found.prefix_hit_rate == 0.75
    assert [rank.busy for rank in found.ranks] == [0.5, 1.0], "never more than all of the time"
    assert [rank.communicated_bytes_per_s for rank in found.ranks] == [51_200.0] * 2


def test_without_prompts_there_is_no_hit_rate() -> None:
    found = rates(BEFORE, Update(11.0, cluster(101)))
    assert found is not None
    assert found.prefix_hit_rate is None


@pytest.mark.parametrize(
    "after",
    [
        Update(12.0, cluster(150, epoch=2)),
        Update(12.0, cluster(1)),  # another coordinator
        Update(12.0, None, "gone"),
        Update(10.0, cluster(150)),
    ],
)
def test_counters_that_began_anew_give_no_rates(after: Update) -> None:
    assert rates(BEFORE, after) is None


def test_a_change_between_two_updates_does_not_make_a_rate_of_milliseconds() -> None:
    meter = Meter(1.0)
    assert meter.take(Update(0.0, cluster(0))) is None
    first = meter.take(Update(1.0, cluster(10)))
    assert first is not None
    assert first.steps_per_s == 10
    assert meter.take(Update(1.01, cluster(11))) is first
    later = meter.take(Update(2.0, cluster(30)))
    assert later is not None
    assert later.steps_per_s == 20
    assert meter.take(Update(2.5, None, "gone")) is None
    assert meter.take(Update(3.0, cluster(0, epoch=2))) is None
    assert meter.take(Update(4.0, cluster(5, epoch=2))) is not None


@pytest.mark.parametrize(
    ("counts", "total", "cells"),
    [((50, 24), 100, [5, 2]), ((0, 0), 100, [0, 0]), ((60, 40), 100, [6, 4]), ((0, 0), 0, [0, 0])],
)
def test_a_bar_fills_by_share(counts: tuple[int, int], total: int, cells: list[int]) -> None:
    assert bar(counts, total, 10) == cells
    assert sum(cells) <= 10


# --- following --------------------------------------------------------------------------------


def test_a_coordinator_that_goes_away_is_told_of_and_found_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lives: Iterator[Any] = iter(([1, 2, Unavailable("gone")], Unavailable("nobody"), [3]))
    ended = threading.Event()

    def follow(self: Colrow, *, interval_s: float) -> Iterator[pb.Cluster]:
        life = next(lives, None)
        if life is None:
            ended.wait()
            return
        for step in life if isinstance(life, list) else [life]:
            if isinstance(step, Exception):
                raise step
            yield cluster(step, state=pb.CLUSTER_STATE_LOADING)

    monkeypatch.setattr(Colrow, "watch", follow)
    monkeypatch.setattr(watch, "RETRY_S", 0.01)
    follower = Follower(Endpoint("there:1"), 1.0)
    follower.start()
    heard = [follower.updates.get(timeout=5) for _ in range(6)]
    follower.stop()
    ended.set()
    assert [update.error or update.cluster.scheduler.steps for update in heard] == [  # type: ignore[union-attr]
        *(1, 2, "gone", "nobody", 3, "the coordinator ended the call")
    ]


# --- views ------------------------------------------------------------------------------------


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    view = JsonView("there:1")
    view.show(BEFORE, None)
    view.show(AFTER, rates(BEFORE, AFTER))
    view.tick()
    view.show(Update(13.0, None, "gone"), None)
    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["rates"] is None
    assert second["cluster"]["state"] == "serving"
    assert second["rates"]["ranks"][0] == {
        "rank": 0,
        "busy": 0.5,
        "communicated_bytes_per_s": 51_200.0,
    }
    assert (third["cluster"], third["error"]) == (None, "gone")


def test_lines_come_once_an_interval_and_when_the_state_changes() -> None:
    file = io.StringIO()
    view = LineView("there:1", Console(file=file, width=80), 1.0)
    view.show(Update(0.0, cluster(0, state=pb.CLUSTER_STATE_LOADING)), None)
    view.show(Update(0.1, cluster(0, state=pb.CLUSTER_STATE_LOADING)), None)
    view.show(Update(0.2, cluster(0)), None)
    view.show(Update(0.3, cluster(0)), None)
    view.show(Update(1.2, AFTER.cluster), rates(BEFORE, AFTER))
    view.show(Update(1.3, None, "[gone]"), None)
    view.show(Update(2.3, None, "[gone]"), None)
    view.show(Update(3.3, cluster(0)), None)
    lines = [line.partition(" ")[2] for line in file.getvalue().splitlines()]
    assert [line.split(";")[0] for line in lines] == [
        *("loading", "serving", "serving"),
        "there:1 does not answer: [gone]",
        "serving",
    ]
    assert "3 running, 2 waiting; KV 50 used, 25 cached of 100; 25.0 steps/s" in lines[2]
    assert "75% prefix hits; 1 preemptions; busy 0: 50% 1: 100%" in lines[2]


def test_the_live_view_shows_all_and_keeps_it_while_nothing_is_heard() -> None:
    out = Console(file=io.StringIO(), width=132, highlight=False)
    live = Live(console=out, auto_refresh=False)
    view = LiveView("there:1", live)
    view.tick()
    assert "Waiting for there:1" in text(live.renderable)
    view.show(AFTER, rates(BEFORE, AFTER))
    shown = text(live.renderable)
    assert "serving tiny 2 ranks" in shown
    assert f"{'█' * 20}{'▒' * 10}{'·' * 10} 50 used, 25 cached, 25 free" in shown
    assert "25.0 steps/s, 10.0 prompt and 50.0 generated tokens/s" in shown
    assert "75% of 20 prompt tokens, 75% now" in shown
    assert "0 serving 150 50% 0.0 MiB/s" in shown
    view.show(Update(13.0, None, "gone"), None)
    view.tick()
    shown = text(live.renderable)
    assert "there:1 does not answer since" in shown
    assert "50 used, 25 cached" in shown
    view.show(AFTER, None)
    assert "does not answer" not in text(live.renderable)


# --- failures ---------------------------------------------------------------------------------


def lost() -> pb.Cluster:
    """Two ranks, of which one is lost while it served."""
    made = cluster(17, state=pb.CLUSTER_STATE_RECOVERING)
    made.workers[0].phase = pb.WORKER_PHASE_WAITING
    made.workers[1].MergeFrom(
        pb.WorkerStatus(
            phase=pb.WORKER_PHASE_LOST,
            phase_age_s=3.2,
            heard_age_s=5.6,
            last_step_id=16,
            error="serving after step 16: does not answer within 2 s",
            error_age_s=3.2,
            losses=2,
            restarts=1,
        )
    )
    return made


def test_every_view_names_the_rank_that_is_lost_with_its_phase_and_last_step() -> None:
    error = "serving after step 16: does not answer within 2 s (3.2 s ago)"
    status = text(*status_tables(lost()))
    assert "0 waiting for 0.0 s never 17 0 0" in status
    assert f"1 lost for 3.2 s 5.6 s ago 16 2 1 {error}" in status
    assert f"1 lost for 3.2 s 16 1 {error}" in text(*dashboard(lost(), None))
    assert "recovering; worker 1 lost for 3.2 s;" in update_line("", Update(0.0, lost()), None)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (2e5, "2 d")],
)
def test_a_duration_has_the_unit_that_fits(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


# --- communication ----------------------------------------------------------------------------


def test_status_says_which_ranks_do_not_reach_each_other_as_they_should_and_why() -> None:
    made = cluster(17)
    link = shard_worker_service_pb2.Link
    made.workers[0].description.links.add(rank=1, path="peer")
    assert "reaches" not in text(*status_tables(made)), "a link that is as it should be"
    made.workers[0].description.links[0].MergeFrom(
        link(path="nccl", note="can't be written to [x]")
    )
    made.workers[1].description.links.add(rank=0, path="nccl", note="rank 0 can't reach its peers")
    status = text(*status_tables(made))
    assert "rank 0 reaches rank 1 by nccl: can't be written to [x]" in status
    assert "rank 1 reaches rank 0 by nccl: rank 0 can't reach its peers" in status


def rows(table: Table) -> str:
    return text(table)


def test_communication_is_summed_over_modules_and_compared_with_the_plan() -> None:
    made = cluster(3)
    made.plan.CopyFrom(shard_plan_pb2.ShardPlan(all_reduce_bytes_per_token=1024))
    assert "0 all_reduce 12 6,144 = 1,024 x 6 = 6,144" in rows(communication_table(made, 6))
    assert "1 all_reduce 12 6,144 ≠ 1,024 x 5 = 5,120" in rows(communication_table(made, 5))


def test_communication_by_module_has_a_column_for_each_rank() -> None:
    shown = rows(communication_by_module_table(cluster(3)))
    assert "module operation path calls rank 0 rank 1" in shown
    assert "model.layers.0 all_reduce shm 6 3,072 3,072" in shown
    assert "model.layers.1 all_reduce shm 6 3,072 3,072" in shown


def test_where_calls_were_timed_the_rank_that_waited_least_says_how_long_they_took() -> None:
    made = cluster(3)
    for worker, timed_us in zip(made.workers, (90, 20), strict=True):
        worker.description.communication[1].timed_calls = 4
        worker.description.communication[1].timed_us = timed_us
    shown = rows(communication_by_module_table(made))
    assert "module operation path calls rank 0 rank 1 µs a call, waiting included" in shown
    assert "model.layers.0 all_reduce shm 6 3,072 3,072 -" in shown
    assert "model.layers.1 all_reduce shm 6 3,072 3,072 5.0" in shown
