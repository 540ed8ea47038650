"""benchmarks/serving.py on a CPU: whole clusters, from their start to the tables."""

import json
import tempfile
from pathlib import Path

import pytest

from benchmarks import serving
from benchmarks import serving_results as results


@pytest.mark.timeout(120)
def test_it_measures_whole_clusters_and_goes_on_after_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        tempfile, "tempdir", str(tmp_path)
    )  # where a cluster that fails leaves its logs
    tiny = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 72,
        "intermediate_size": 104,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 331,
        "max_position_embeddings": 512,
        "torch_dtype": "float32",
    }
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(tiny))
    where = ["--results", str(tmp_path / "results")]
    code = serving.main(
        [
            *("--device", "cpu", "--shapes", str(tmp_path / "tiny"), "--tp", "2"),
            *("--transport", "nccl,auto", "--batch", "1,2", "--prompt", "16,64", "--repeats", "1"),
            *("--output-tokens", "24", "--requests", "4", "--offline-tokens", "16,8", *where),
        ]
    )
    assert code == 1, "one of them failed"
    read = {r["transport"]: r for r in results.load(tmp_path / "results")}
    assert "the workers are on CPUs" in read["nccl"]["error"]
    measured = read["auto"]
    assert (measured["error"], measured["request_errors"]) == (None, [])
    assert measured["chosen_transport"] == "shared memory"
    figures = measured["figures"]
    for kind, keys in {"tpot_s": "1 2", "ttft_s": "16 64", "tokens_per_s": "4"}.items():
        assert list(figures[kind]) == keys.split()
        assert all(value > 0 for value in figures[kind].values())
    assert 0 < figures["serving_after_s"] < figures["first_token_after_s"] < 60
    sums = measured["communication"][0]
    assert (sums["operation"], sums["path"], sums["calls"]) == ("all_reduce", "shm", 5)
    assert sums["bytes"] == 5 * 72 * 4
    assert measured["measured_on"]["devices"] == ["cpu", "cpu"]
    kinds = [part["measurements"][0]["kind"] for part in measured["bench"]]
    assert kinds == ["decode", "decode", "prefill", "prefill", "throughput"]
    capsys.readouterr()
    assert serving.main([*where, "--table"]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "results" / "serving.md").read_text()
    assert "| 2 | auto (shared memory) |" in printed
    assert "- tiny, tp=2, nccl: failed: ClusterError" in printed
