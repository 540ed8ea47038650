"""benchmarks/serving.py: which clusters it starts, and what its tables say."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving
from benchmarks import serving_results as results
from benchmarks.predict_scaling import LLAMA_8B
from benchmarks.serving import CPU, Machine, Setup
from colrow.gpus import HostGpus
from coordinator.families import model_spec
from coordinator.shard_plan import make_plan

H200 = Machine("NVIDIA H200", 8, 143771 * 2**20)


def setups(count: int, shapes: str = "8b,70b", *tp_sizes: int) -> list[tuple[str, int, str]]:
    machine = Machine(H200.device, count, H200.memory_bytes)
    chosen = serving.choose_setups(serving.read_shapes(shapes), tp_sizes, ("auto", "nccl"), machine)
    return [(setup.shapes, setup.tp, setup.transport) for setup in chosen]


def result(tp_size: int, transport: str, **changes: Any) -> dict[str, Any]:
    return {
        "shapes": "8b",
        "device": "NVIDIA H200",
        "tp_size": tp_size,
        "transport": transport,
        "chosen_transport": {"auto": "peer", "nccl": "nccl"}.get(transport),
        "figures": {},
        "predicted": {},
        "error": None,
        "request_errors": [],
    } | changes


ONE = result(1, "single", figures={"tpot_s": {"1": 4.3e-3, "8": 4.8e-3}, "ttft_s": {"128": 9e-3}})
TWO = result(
    2,
    "auto",
    figures={
        "tpot_s": {"1": 2.5e-3, "8": 3.2e-3},
        "ttft_s": {"128": None},
        "tokens_per_s": {"512": 17000.0},
        "idle_share": {"1": 0.031},
        "communication_s": 0.5e-3,
        "serving_after_s": 11.04,
        "first_token_after_s": 12.0,
    },
    predicted={
        "tpot_s": {"1": 2.67e-3, "8": 3.06e-3},
        "ttft_s": {"128": 6.3e-3},
        "communication_s": 0.267e-3,
        "communication_share": 0.1,
    },
)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_without_sizes_every_one_is_measured_that_there_are_gpus_and_memory_for() -> None:
    assert setups(1) == [("8b", 1, "single")], "70B does not fit on one"
    assert setups(2) == [
        *(("8b", 1, "single"), ("8b", 2, "auto"), ("8b", 2, "nccl")),
        *(("70b", 2, "auto"), ("70b", 2, "nccl")),
    ]
    assert {tp for _, tp, _ in setups(8)} == {1, 2, 4, 8}
    assert setups(1, "8b", 4) == [("8b", 4, "auto"), ("8b", 4, "nccl")], "what is named is tried"


def test_shapes_are_names_or_folders_and_anything_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    found = serving.read_shapes(f"70b,{tmp_path}")
    assert found["70b"]["hidden_size"] == 8192
    assert found[tmp_path.name] == {"hidden_size": 8}
    with pytest.raises(ValueError, match="shapes = '9b': is none of 8b, 70b"):
        serving.read_shapes("9b")


def test_a_row_has_speed_ups_and_below_it_predictions_and_targets() -> None:
    head, _, one, two, predicted, wanted = map(cells, results.speed_table([ONE, TWO]))
    assert head[:3] == ["tp", "transport", "TPOT, batch 1, ms"]
    assert head[-1] == "tokens/s, 512 requests at once"
    assert one == ["1", "single", "4.30", "4.80", "9.0", "-"]
    assert two == [*("2", "auto (peer)", "2.50 (1.72x)", "3.20 (1.50x) **missed**", "-", "17,000")]
    assert predicted == ["", "predicted", "2.67 (+6.8%)", "3.06 (-4.4%)", "6.3", "-"]
    assert wanted == [
        *("", "must / aim", "2.80 / 2.10", "3.10 / 2.40", "7.0 / 4.0", "16,500 / 21,000")
    ]


def test_a_throughput_that_is_less_than_it_must_be_is_missed() -> None:
    slow = TWO | {"figures": {"tokens_per_s": {"512": 16000.0}}}
    assert "16,000 **missed**" in results.speed_table([slow])[2]


def test_nccl_alone_has_a_target_of_its_own() -> None:
    nccl = result(2, "nccl", figures={"tpot_s": {"1": 4.0e-3}})
    table = results.speed_table([nccl])
    assert cells(table[2]) == ["2", "nccl", "4.00"]
    assert cells(table[3]) == ["", "must / aim", "4.10 / 3.60"]


def test_70b_is_compared_with_two_ranks() -> None:
    two, four = (
        result(tp, "auto", shapes="70b", figures={"tpot_s": {"1": tpot_s}})
        for tp, tpot_s in ((2, 18e-3), (4, 10e-3))
    )
    lines = results.page([two, four])
    assert "Medians; in parentheses times as good as tp=2." in lines
    assert any("10.00 (1.80x)" in line for line in lines)


def stored() -> dict[str, Any]:
    """One H200 and the 8B shapes, which were measured with the command's defaults."""
    name = results.file_name("8b", 1, results.SINGLE, H200.device)
    found: dict[str, Any] = json.loads((serving.RESULTS / name).read_text())
    return found


def test_the_docs_say_how_far_off_predictions_were_as_it_was_measured() -> None:
    said = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert "\n".join(["", *results.speed_table([stored()]), ""]) in said


def test_todays_cost_model_predicts_what_the_stored_results_have_beside_them() -> None:
    one = Setup("8b", LLAMA_8B, 1, results.SINGLE)
    plan = make_plan(model_spec(LLAMA_8B), 1)
    today = serving.predict(plan, one, H200, serving.parse([]))
    for kind in ("tpot_s", "ttft_s"):
        assert today[kind] == pytest.approx(stored()["predicted"][kind])


def test_the_start_idle_time_and_communication_stand_beside_what_was_predicted() -> None:
    head, _, row = map(cells, results.overhead_table([TWO]))
    shown = dict(zip(head, row, strict=True))
    assert (shown["serves after, s"], shown["first token after, s"]) == ("11.0", "12.0")
    assert (shown["idle of a step, batch 1"], shown["idle of a step, batch 8"]) == ("3.1%", "-")
    assert (shown["communication of one token, µs"], shown["of its TPOT"]) == ("500", "20.0%")
    assert (shown["predicted, µs"], shown["predicted of TPOT"]) == ("267", "10.0%")


def test_what_failed_is_said_and_the_rest_is_there() -> None:
    failed = result(4, "auto", chosen_transport=None, error="ClusterError: no\nits log: here")
    lines = results.page([ONE, failed | {"request_errors": ["3 tokens came"]}])
    assert "- 8b, tp=4, auto: failed: ClusterError: no" in lines
    assert "- 8b, tp=4, auto: requests failed: 3 tokens came" in lines
    assert any("4.30" in line for line in lines)


def test_a_time_per_token_is_that_of_steps_in_which_the_whole_batch_decodes() -> None:
    def of(kind: str, value: Any, **rates: Any) -> dict[str, Any]:
        known = {"steps_per_s": None, "control_share": None, "tokens_per_s": None} | rates
        return {
            "kind": kind,
            "value": value,
            "over_repeats": known,
            "over_requests": {"ttft_s": {"p50": 0.009}},
            "repeats": [{"seconds": 1.0, "requests": [{"arrivals": []}]}],
        }

    bench = {
        "settings": {"requests": 512},
        "measurements": [
            of("decode", 8, steps_per_s={"p50": 250.0}, control_share={"p50": 0.02}),
            of("decode", 128),
            of("prefill", 1024),
            of("throughput", "inf", tokens_per_s={"p50": 9.0}),
        ],
    }
    assert results.figures_of(bench) == {
        "tpot_s": {"8": 0.004, "128": None},
        "idle_share": {"8": 0.02, "128": None},
        "ttft_s": {"1024": 0.009},
        "tokens_per_s": {"512": 9.0},
    }
    short = results.without_requests(bench)["measurements"]
    assert [measured["repeats"] for measured in short] == [[{"seconds": 1.0}]] * 4


def test_predictions_are_for_the_gpus_that_the_figures_are_of_and_know_the_transport() -> None:
    flags = serving.parse([])
    plan = make_plan(model_spec(LLAMA_8B), 2)

    def predicted(transport: str, machine: Machine) -> dict[str, Any]:
        setup = Setup("8b", LLAMA_8B, 2, transport)
        return serving.predict(plan, setup, machine, flags)

    auto, nccl = predicted("auto", H200), predicted("nccl", H200)
    assert auto["tpot_s"].keys() == {"1", "8", "32", "128"}
    assert auto["ttft_s"].keys() == {"128", "1024", "8192"}
    assert 2e-3 < auto["tpot_s"]["1"] < 3e-3 < nccl["tpot_s"]["1"] < 4.5e-3
    assert auto["communication_s"] < nccl["communication_s"]
    assert predicted("auto", Machine("NVIDIA L4", 2)) == predicted("auto", CPU) == {}


def test_a_device_is_a_part_of_the_files_name() -> None:
    assert (
        results.file_name("8b", 2, "auto", "NVIDIA H200") == "serving_8b_tp2_auto_nvidia-h200.json"
    )


def test_what_takes_too_long_is_ended() -> None:
    with (
        pytest.raises(serving.TimeLimit, match=r"not done within 0\.05 s"),
        serving.time_limit(0.05),
    ):
        time.sleep(10)


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for gpus in (HostGpus(0), HostGpus(2, "")):
        monkeypatch.setattr(serving, "local_gpus", lambda gpus=gpus: gpus)
        assert serving.main(["--shapes", "8b"]) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(r"benchmarks\.serving: device = 'cuda': there is no GPU: .*\n", said)
    assert "CUDA_VISIBLE_DEVICES = '' shows 0 of 2" in said


def test_a_driver_that_tells_nothing_of_its_gpu_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "local_gpus", lambda: HostGpus(1))
    monkeypatch.setenv("PATH", "")
    assert serving.main(["--shapes", "8b"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"benchmarks\.serving: device = 'cuda': nvidia-smi .*\n", said)
