"""A cluster that can't start says why in one line, and its workers are as good as before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import dying_worker
from tests.clusters import Service, WorkerPool, cluster, start
from tests.refusals import FAMILIES, PROMPT, Model, check_health, tokens_of

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def nobody() -> Iterator[str]:
    """An address at which nobody listens, nor can."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


def failure(model: Path, workers: Sequence[str], *arguments: str) -> str:
    """The one line with which a coordinator ends that can't serve."""
    service = start(
        "coordinator",
        "coordinator",
        *("--model", str(model), "--workers", ",".join(workers), "--grpc-port", "0"),
        *("--http-port", "0"),
        *arguments,
    )
    return service.wait_for_failure()


@pytest.fixture
def copy(model: Model, tmp_path: Path) -> Path:
    """A copy of the model's folder, to be damaged."""
    return Path(shutil.copytree(model.folder, tmp_path / "model"))


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


class TestAModelFolderThatIsNone:
    """No worker is needed to see that."""

    def test_missing_folder(self, tmp_path: Path, nobody: str) -> None:
        line = failure(tmp_path / "nothing", [nobody])
        assert f"model = '{tmp_path}/nothing'" in line and "config.json" in line

    def test_missing_config(self, copy: Path, nobody: str) -> None:
        (copy / "config.json").unlink()
        assert f"model = '{copy}': is no folder with a config.json" in failure(copy, [nobody])

    @pytest.mark.parametrize("text", ['{"architectures": [', "[1, 2]", "\x00", "[" * 100_000])
    def test_broken_config(self, copy: Path, text: str, nobody: str) -> None:
        (copy / "config.json").write_text(text)
        assert "config.json = " in failure(copy, [nobody])

    def test_config_of_an_unsupported_family(self, copy: Path, nobody: str) -> None:
        change_config(copy, architectures=["MambaForCausalLM"])
        line = failure(copy, [nobody])
        assert "'MambaForCausalLM'" in line
        assert all(family in line for family in FAMILIES)

    def test_config_with_a_wrong_value(self, copy: Path, nobody: str) -> None:
        change_config(copy, num_attention_heads=-9)
        assert "num_attention_heads" in (line := failure(copy, [nobody])) and "-9" in line

    @pytest.mark.parametrize(
        ("file", "text", "words"),
        [
            ("tokenizer.json", "{}", "tokenizer.json: "),
            ("tokenizer.json", "{", "tokenizer.json: "),
            ("tokenizer_config.json", "{", "tokenizer_config.json: "),
            ("tokenizer_config.json", "[]", "tokenizer_config.json: is no JSON object"),
            ("chat_template.jinja", "{% for %}", "chat template, line 1: "),
            ("generation_config.json", "{", "generation_config.json = '{'"),
            (
                "generation_config.json",
                '{"eos_token_id": "</s>"}',
                "generation_config.json: eos_token_id must be a token id, a list of them or null",
            ),
        ],
    )
    def test_broken_files_beside_it(
        self, copy: Path, file: str, text: str, words: str, nobody: str
    ) -> None:
        (copy / file).write_text(text)
        assert words in failure(copy, [nobody])


OLD_WORKER = """
import runpy
import colrow
colrow.__version__ = "0.0.9"
runpy.run_module("shard_worker", run_name="__main__")
"""


class TestAnAddressThatIsNone:
    def test_port_in_use(self, model: Model, nobody: str) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            line = failure(model.folder, [nobody], "--grpc-port", str(port))
            assert f"127.0.0.1:{port}" in line and "in use" in line
            code, log = start("worker", "shard_worker", "--port", str(port)).wait_for_end()
        assert code == 1 and "Traceback" not in log
        assert f"colrow worker: address = '127.0.0.1:{port}'" in log and "in use" in log

    def test_worker_that_does_not_answer(self, model: Model, nobody: str) -> None:
        began = time.monotonic()
        line = failure(model.folder, [nobody], "--startup-timeout", "2")
        assert f"worker 0 ({nobody}), connecting: does not answer within 2 s" in line
        assert 2 <= time.monotonic() - began < 10

    def test_one_worker_of_several_that_does_not_answer(
        self, model: Model, worker_pool: WorkerPool, nobody: str
    ) -> None:
        workers = [*worker_pool.addresses(1), nobody]
        line = failure(model.folder, workers, "--startup-timeout", "1")
        assert f"worker 1 ({nobody})" in line

    def test_duplicate_addresses(self, model: Model) -> None:
        code, log = start(
            "coordinator",
            "coordinator",
            *("--model", str(model.folder), "--workers", "127.0.0.1:9,127.0.0.1:9"),
        ).wait_for_end()
        assert code == 2, "wrong usage"
        assert "--workers 127.0.0.1:9,127.0.0.1:9: an address stands there twice" in log

    def test_worker_of_another_version(self, model: Model) -> None:
        log = model.folder.with_name("worker.log")
        process = subprocess.Popen(
            [sys.executable, "-c", OLD_WORKER, "--port", "0"],
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        old = Service("old worker", process, log)
        try:
            old.wait_for_port()
            line = failure(model.folder, [old.address])
        finally:
            old.stop()
        assert f"worker 0 ({old.address}): version = '0.0.9'" in line
        assert "the coordinator is" in line


class TestAModelThatTheWorkersRefuse:
    """The workers are as good as before: another coordinator serves with them."""

    @pytest.fixture(autouse=True)
    def still_good(self, worker_pool: WorkerPool, model: Model) -> Iterator[list[str]]:
        workers = worker_pool.addresses(2)
        yield workers
        for address in workers:
            check_health(address)
        with cluster(worker_pool, model.folder, 2) as running:
            good = running.client.generate(PROMPT, max_tokens=5, temperature=0, timeout_s=20)
            assert tokens_of(good) == model.expected[:5]

    def test_missing_safetensors(self, copy: Path, still_good: list[str]) -> None:
        (copy / "model.safetensors").unlink()
        line = failure(copy, still_good)
        assert f"model_path = '{copy}'" in line and "model.safetensors" in line

    def test_truncated_safetensors(self, copy: Path, still_good: list[str]) -> None:
        file = copy / "model.safetensors"
        os.truncate(file, file.stat().st_size - 1000)
        assert f"{file}: is truncated" in failure(copy, still_good)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"model.norm.weight": None}, "'model.norm.weight': missing"),
            ({"model.norm.bias": torch.ones(72)}, "'model.norm.bias': unexpected"),
            ({"model.norm.weight": torch.ones(71)}, "'model.norm.weight': has shape (71,)"),
            (
                {"model.norm.weight": torch.ones(72, dtype=torch.int32)},
                "'model.norm.weight': its data type",
            ),
        ],
        ids=["missing key", "unexpected key", "wrong shape", "wrong dtype"],
    )
    def test_other_tensors(
        self, change: dict[str, torch.Tensor | None], words: str, copy: Path, still_good: list[str]
    ) -> None:
        tensors: dict[str, torch.Tensor | None] = {
            **load_file(copy / "model.safetensors"),
            **change,
        }
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, copy / "model.safetensors")
        line = failure(copy, still_good)
        assert words in line and "worker " in line

    def test_more_ranks_than_heads(self, copy: Path, still_good: list[str]) -> None:
        change_config(copy, num_attention_heads=1, num_key_value_heads=1, head_dim=72)
        line = failure(copy, still_good)
        assert "tp_size 2" in line and "tp sizes that fit: 1" in line

    def test_more_weights_than_the_host_has_memory(self, copy: Path, still_good: list[str]) -> None:
        """Refused before a worker is asked to load anything."""
        change_config(copy, intermediate_size=2**31 - 1)  # terabytes
        line = failure(copy, still_good)
        assert "tp_size = 2: ranks 0 and 1 need " in line
        assert "GiB for weights on a host (cpu) that has " in line
        assert "no tp size up to " in line or "the smallest tp size that fits" in line

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--max-model-len", "257"), "max_model_len = 257: the model's context is 256"),
            (("--kv-cache-mib", "1", "--block-size", "100000"), "kv_cache_mib = 1"),
            (("--num-blocks", "4000000000", "--block-size", "4000000"), "num_blocks"),
            (("--memory-weights", "1,2,3"), "memory_weights must be one number per rank (2)"),
            (("--memory-weights", "nan,1"), "memory_weights[0]"),
        ],
    )
    def test_settings_that_do_not_fit(
        self, arguments: Sequence[str], words: str, model: Model, still_good: list[str]
    ) -> None:
        assert words in failure(model.folder, still_good, *arguments)


class TestADeviceThatCanNotBeHad:
    @pytest.mark.parametrize(
        ("variable", "value", "words"),
        [
            ("PYTORCH_CUDA_ALLOC_CONF", "", "device = 'cuda:99': "),
            ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF = "),
            ("PYTORCH_ALLOC_CONF", "expandable_segments:True", "PYTORCH_ALLOC_CONF = "),
        ],
    )
    def test_the_worker_ends_with_one_line(
        self, variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, value)
        code, log = start(
            "worker", "shard_worker", "--port", "0", "--device", "cuda:99"
        ).wait_for_end()
        assert code == 1
        assert log.startswith(f"colrow worker: {words}") and log.count("\n") == 1, log


class TestAWorkerThatDiesAtStart:
    """The coordinator ends within seconds and says which rank it was, and when; the other is free."""

    @pytest.mark.parametrize("phase", dying_worker.PHASES)
    @pytest.mark.parametrize("rank", [0, 1])
    def test_rank_phase_and_cause_are_named(
        self, rank: int, phase: str, model: Model, worker_pool: WorkerPool
    ) -> None:
        workers = worker_pool.addresses(1)
        dying = start("dying", "tests.dying_worker", "--port", "0", phase)
        dying.wait_for_port()
        workers.insert(rank, dying.address)
        began = time.monotonic()
        line = failure(model.folder, workers)
        assert time.monotonic() - began < 15, "most of it is the start of the coordinator"
        assert dying.process.wait(5) == -signal.SIGKILL
        dying.log.unlink()
        assert f"worker {rank} ({dying.address}), {phase}: the connection to it is lost" in line
        with cluster(worker_pool, model.folder, 1) as running:
            good = running.client.generate(PROMPT, max_tokens=5, temperature=0, timeout_s=20)
            assert tokens_of(good) == model.expected[:5]
