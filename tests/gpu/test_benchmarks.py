"""The benchmarks of docs/gpu.md run; what they measure of so little means nothing."""

import json
from pathlib import Path

import pytest

from benchmarks import all_reduce_gpu, serving
from benchmarks import serving_results as results
from benchmarks.predict_scaling import LLAMA_8B

pytestmark = pytest.mark.timeout(300)


def test_sums_of_ranks_that_share_a_gpu_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    code = all_reduce_gpu.main(["--share-gpu", "--ranks", "2", "--bytes", "8192,262144"])
    assert code == 0, capsys.readouterr().err
    assert "2 ranks that share a GPU: sums are exact up to 256 KB" in capsys.readouterr().out


def test_a_cluster_is_measured(tmp_path: Path) -> None:
    config = LLAMA_8B | {"num_hidden_layers": 2, "max_position_embeddings": 1024}
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    flags = (
        *("--shapes", str(tmp_path / "small"), "--tp", "1", "--batch", "1,8", "--prompt", "128"),
        *("--requests", "16", "--repeats", "1", "--results", str(tmp_path / "results")),
        *("--offline-tokens", "64,32"),
    )
    assert serving.main(flags) == 0
    (measured,) = results.load(tmp_path / "results")
    assert measured["figures"]["tpot_s"]["1"] > 0
    assert 0 <= measured["figures"]["idle_share"]["8"] < 1
    assert measured["communication"] == []
