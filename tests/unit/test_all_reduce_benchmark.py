"""benchmarks/all_reduce_gpu.py, but for what needs GPUs: what it checks, predicts, says and refuses."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import all_reduce_gpu
from benchmarks.all_reduce_gpu import EPS, HIDDEN, Buffers, sum_of_terms, term
from benchmarks.serving_results import Target

CPU = torch.device("cpu")
ROWS = 5


@pytest.mark.parametrize("size", [2, 4, 8])
def test_terms_have_sums_that_are_exact_in_any_order(size: int) -> None:
    terms = [term(rank, ROWS, CPU) for rank in range(size + 1)]
    exact = torch.stack(terms[:-1]).long().sum(0)
    assert torch.equal(sum_of_terms(size, ROWS, CPU).long(), exact)
    backwards = torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16)
    for each in reversed(terms[:-1]):
        backwards += each
    assert torch.equal(backwards.long(), exact)
    # The residual stream's too, and no term is another one's.
    assert torch.equal((backwards + terms[-1]).long(), exact + terms[-1].long())
    assert len({tuple(each.flatten()[:64].tolist()) for each in terms}) == size + 1


def buffers() -> Buffers:
    x = torch.empty(ROWS, HIDDEN, dtype=torch.bfloat16)
    weight = torch.linspace(0.5, 1.5, HIDDEN).to(x.dtype)
    return Buffers(x, torch.empty_like(x), weight, torch.empty_like(x))


def check(name: str, way: Any, buffers: Buffers) -> None:
    group: Any = SimpleNamespace(control=SimpleNamespace(rank=1, size=2), check=lambda: None)
    all_reduce_gpu.check_way(name, way, group, buffers)


def test_a_wrong_sum_a_wrong_residual_and_a_wrong_norm_are_found() -> None:
    held = buffers()

    def add() -> torch.Tensor:
        held.x.add_(term(0, ROWS, CPU))  # what the other rank has
        return held.x

    def add_and_norm() -> torch.Tensor:
        held.residual.add_(add())
        wide = held.residual.float()
        normed = wide * (wide.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
        return (normed * held.weight.float()).to(torch.bfloat16)

    check("one_shot", add, held)
    check("one_shot + norm", add_and_norm, held)
    with pytest.raises(AssertionError, match="one_shot, 40 KB, rank 1 of 2"):
        check("one_shot", lambda: held.x, held)
    with pytest.raises(AssertionError, match=r"one_shot \+ norm, 40 KB"):
        check("one_shot + norm", add, held)
    with pytest.raises(AssertionError, match=r"one_shot \+ norm, 40 KB"):
        check("one_shot + norm", lambda: add_and_norm() * 1.1, held)


def test_a_replay_takes_as_long_as_on_the_slowest_rank() -> None:
    first = {8192: {"nccl": [20.0, 18.0, 19.0]}}
    second = {8192: {"nccl": [19.0, 21.0, 18.5]}}
    (row,) = all_reduce_gpu.summarise([first, second], is_known=True)
    assert (row["bytes"], row["way"]) == (8192, "nccl")
    assert (row["median_us"], row["min_us"]) == (20.0, 19.0)
    assert row["predicted_us"] == pytest.approx(19.03, abs=0.01)
    (row,) = all_reduce_gpu.summarise([first, second], is_known=False)
    assert row["predicted_us"] is None


def test_predictions_are_of_the_same_thing_or_there_is_none() -> None:
    one_shot = all_reduce_gpu.predict("one_shot + norm", 2, 8192)
    assert one_shot == pytest.approx(3.67, abs=0.01)
    assert all_reduce_gpu.predict("one_shot", 2, 8192) is None, "its figures are with the norm"
    assert all_reduce_gpu.predict("one_shot + norm", 2, 2**21) is None, "they end at 1 MB"
    plain, normed = (all_reduce_gpu.predict(way, 4, 2**20) for way in ("nccl", "nccl + norm"))
    assert plain is not None and normed is not None
    assert 1.9 < normed - plain < 4


def rows(**median_us: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "bytes": num_bytes,
            "way": way.replace("_norm", " + norm"),
            "median_us": value,
            "min_us": value - 0.2,
            "predicted_us": None,
        }
        for way, values in median_us.items()
        for num_bytes, value in zip((2**13, 2**16, 2**25), values, strict=False)
    ]


def test_crossovers_are_those_that_a_group_of_workers_would_choose() -> None:
    measured = rows(nccl=[19, 19, 300], one_shot=[4, 9, 1], two_shot=[7, 8, 1])
    found = all_reduce_gpu.crossovers(measured)
    assert found == {"one_shot_bytes": 2**13, "two_shot_bytes": 2**16}, "a slot has 16 MB"
    assert all_reduce_gpu.crossovers(rows(nccl=[19, 19])) is None


def test_a_table_has_every_way_and_the_targets_of_two_ranks() -> None:
    result = {
        "ranks": 2,
        "device": "NVIDIA H200",
        "peer_problem": "",
        "crossovers": {"one_shot_bytes": 2**16, "two_shot_bytes": 2**24},
        "rows": rows(nccl=[19.5, 18.5, 300], one_shot_norm=[4.0, 6.0], two_shot_norm=[6.0, 5.5]),
    }
    lines = all_reduce_gpu.page([result])
    assert lines[0] == "### 2 ranks, NVIDIA H200"
    head = "| bytes | nccl | one_shot + norm | two_shot + norm | stores + norm: must / aim |"
    assert head in lines
    assert "| 8 KB | 19.5, 19.3, - | 4.0, 3.8, - | 6.0, 5.8, - | 4.5 / 3.4 |" in lines
    assert "| 64 KB | 18.5, 18.3, - | 6.0, 5.8, - | 5.5, 5.3, - | 5 / 3.7 **missed** |" in lines
    assert "| 32 MB | 300.0, 299.8, - | - | - | - |" in lines
    assert "One shot is the fastest up to 64 KB, two shots up to 16 MB." in lines
    four = all_reduce_gpu.page([result | {"ranks": 4, "peer_problem": "no", "crossovers": None}])
    assert not any("must" in line for line in four)
    assert "Without peer memory: no" in four
    assert all_reduce_gpu.TARGETS[2**20] == Target(8.0, 6.5)


@pytest.mark.parametrize(
    ("flags", "num_gpus", "chosen"),
    [
        ("", 8, (2, 4, 8)),
        ("", 5, (2, 4)),
        ("--ranks 3,5", 8, (3, 5)),
        ("--share-gpu", 1, (2, 4, 8)),
        ("--share-gpu --ranks 2", 1, (2,)),
    ],
)
def test_ranks_are_as_many_as_there_are_gpus_for(
    flags: str, num_gpus: int, chosen: tuple[int, ...]
) -> None:
    assert all_reduce_gpu.choose_ranks(all_reduce_gpu.parse(flags.split()), num_gpus) == chosen


@pytest.mark.parametrize(
    ("flags", "num_gpus", "problem"),
    [
        ("", 0, "there is no GPU"),
        ("", 1, "there is one GPU; --share-gpu checks sums on it"),
        ("--ranks 4", 2, "ranks = 4: each takes a GPU of its own, and this host has 2"),
        ("--ranks 1", 2, "ranks = 1: is not from 2 to 8"),
        ("--ranks 9", 9, "ranks = 9: is not from 2 to 8"),
        ("--bytes 100", 2, "bytes = 100: is no whole number of rows of 8192"),
        ("--share-gpu --bytes 2097152", 1, "bytes = 2097152: is more than 1 MB"),
    ],
)
def test_what_can_not_be_is_one_line_and_exit_code_2(
    flags: str,
    num_gpus: int,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert all_reduce_gpu.main(flags.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"benchmarks.all_reduce_gpu: {problem}")
    assert said.count("\n") == 1
