"""The `colrow` command as a user has it: a process, its two outputs, its exit code, what it leaves."""

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import client
from client.errors import ClusterError
from client.local_cluster import LocalCluster, Process
from coordinator.cost_model import predicted_step
from coordinator.families import model_spec
from coordinator.shard_plan import make_plan
from tests import clusters

COMMAND = str(Path(sys.executable).with_name("colrow"))
COMMANDS = (
    *("serve", "coordinator", "worker", "generate", "chat", "status", "plan", "layer", "bench"),
    *("health", "fetch", "demo", "doctor"),
)

START_TIMEOUT_S = 60.0
GONE_TIMEOUT_S = 15.0
NOBODY = "127.0.0.1:1"  # a reserved port, where nothing listens

Colrow = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment(demo_cache_home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    # COLUMNS would make tables narrower than they are without a terminal.
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    # Clusters that fail keep their logs.
    logs = str(tmp_path_factory.mktemp("logs"))
    return kept | {"XDG_CACHE_HOME": str(demo_cache_home), "TMPDIR": logs}


@pytest.fixture(scope="module")
def colrow(environment: dict[str, str]) -> Colrow:
    def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [COMMAND, *arguments],
            env=environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
        )

    return run


@dataclass
class Serve:
    """A running `colrow serve`, in a process group of its own, as a terminal gives it."""

    popen: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    def output(self) -> str:
        return self.stdout.read_text() + self.stderr.read_text()

    def wait_for(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not happened():
            assert self.popen.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def wait_until_serving(self) -> str:
        """The target."""
        self.wait_for(lambda: "Ctrl-C stops it all" in self.stdout.read_text())
        found = re.search(r"Serving .* at (\S+)", self.stdout.read_text())
        assert found is not None
        return found.group(1)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children(recursive=True)

    def worker(self) -> psutil.Process | None:
        """Any worker."""
        for child in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "shard_worker" in child.cmdline():
                    return child
        return None


@contextlib.contextmanager
def serving(folder: Path, environment: dict[str, str], *arguments: str) -> Iterator[Serve]:
    stdout, stderr = folder / "stdout", folder / "stderr"
    popen = subprocess.Popen(
        [COMMAND, "serve", "--grpc-port", "0", "--http-port", "0", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout.open("wb"),
        stderr=stderr.open("wb"),
        start_new_session=True,
    )
    try:
        yield Serve(popen, stdout, stderr)
    finally:
        popen.terminate()
        popen.wait(START_TIMEOUT_S)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=GONE_TIMEOUT_S)
    for process in alive:
        process.kill()
    assert not alive


def assert_one_clear_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    complaints = [line for line in done.stderr.splitlines() if line.startswith("colrow: ")]
    assert len(complaints) == 1, done.stderr
    for part in parts:
        assert part in complaints[0]


# --- without a cluster ------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(colrow: Colrow, command: str) -> None:
    done = colrow(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Example: colrow {command}" in done.stdout


def test_help_lists_the_commands_and_version_is_said(colrow: Colrow) -> None:
    shown = colrow("--help").stdout
    assert all(re.search(rf"^│ {command} ", shown, re.MULTILINE) for command in COMMANDS)
    assert re.fullmatch(r"colrow \d+\.\d+\.\d+\S*\n", colrow("--version").stdout)


def test_help_does_not_wait_for_torch() -> None:
    code = "import client.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=START_TIMEOUT_S).returncode == 0


def test_plan_shows_ranges_parameters_and_communication(colrow: Colrow) -> None:
    done = colrow("plan", "--tp", "2")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout, "control codes without a terminal"
    shown = " ".join(done.stdout.split())
    assert "0 [0,6) 6 [0,2) 2 [0,704) 704 [0,24576) 24576 136,761,984" in shown
    name = "model.layers.{i}.mlp.down_proj.weight x 30"
    assert f"{name} [576, 1536] row parallel (mlp) 0: [576, 704] sum 1: [576, 832]" in shown
    assert "70,272 bytes a token" in shown
    assert "Prediction for NVIDIA H200, NVLink: one token of one sequence takes 0." in shown
    assert "communication: 61 all-reduces of 3.7 µs (one_shot), and the exchange." in shown


def test_plan_says_why_nothing_is_predicted(colrow: Colrow) -> None:
    shown = " ".join(colrow("plan", "--tp", "9").stdout.split())
    assert "Prediction for NVIDIA H200, NVLink: none, links are known between 8 ranks" in shown


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        (("--tp", "3"), {"tp_size": 3}),
        (
            ("--tp", "2", "--dtype", "float32", "--memory-weights", "3,1"),
            {"tp_size": 2, "dtype": "float32", "memory_weights": [3.0, 1.0]},
        ),
    ],
)
def test_plan_as_data_is_the_plan_to_the_byte(
    colrow: Colrow, demo_model_folder: Path, flags: tuple[str, ...], arguments: dict[str, object]
) -> None:
    config = demo_model_folder / "config.json"
    done = colrow("plan", str(config), "--json", *flags)  # a config.json alone is enough
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    plan = make_plan(model_spec(json.loads(config.read_text())), **arguments)  # type: ignore[arg-type]
    assert [rank["weight_bytes"] for rank in data["ranks"]] == [r.weight_bytes for r in plan.ranks]
    assert data["checkpoint_bytes"] == plan.checkpoint_bytes
    assert data["replicated_bytes"] == plan.replicated_bytes
    assert data["all_reduce_bytes_per_token"] == plan.all_reduce_bytes_per_token
    predicted = predicted_step(plan)
    if plan.dtype == "float32":
        assert predicted is None and data["prediction"] is None
    else:
        assert predicted is not None
        assert data["prediction"]["step_s"] == predicted.seconds
        assert data["prediction"]["communication_s"] == predicted.communication_s > 0
    for rank, shard in zip(data["ranks"], plan.ranks, strict=True):
        assert rank["ranges"] == {str(a): [r.start, r.stop] for a, r in shard.ranges.items()}
    # And the parameters add up to what the ranks are said to hold.
    held = [0] * plan.tp_size
    for parameter in data["parameters"]:
        for rank, shape in enumerate(parameter["local_shapes"]):
            numel = 1
            for size in shape:
                numel *= size
            held[rank] += numel * plan.itemsize
    assert held == [rank["weight_bytes"] for rank in data["ranks"]]


@pytest.mark.parametrize("command", ["plan", "serve"])
def test_a_tp_size_that_does_not_fit_gets_those_that_do(colrow: Colrow, command: str) -> None:
    assert_one_clear_line(
        colrow(command, "demo", "--tp", "20"),
        "tp_size 20 can't be planned",
        "tp sizes that fit: 1, 2, 3, 4, 5, 6, 7, 8, 9",
    )


@pytest.mark.parametrize("command", ["plan", "serve"])
def test_an_unknown_model_is_named(colrow: Colrow, command: str) -> None:
    assert_one_clear_line(colrow(command, "./no-such-model"), "'./no-such-model'")


def test_an_unsupported_family_gets_the_supported_ones(colrow: Colrow, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    assert_one_clear_line(
        colrow("serve", str(tmp_path)), "'MambaForCausalLM'", "LlamaForCausalLM", "GPT2LMHeadModel"
    )


def test_a_config_that_is_no_json_is_named(colrow: Colrow, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert_one_clear_line(colrow("plan", str(tmp_path)), str(tmp_path / "config.json"))


def test_a_port_in_use_is_named(colrow: Colrow) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert_one_clear_line(colrow("serve", "--grpc-port", port), f"grpc-port {port}")


def test_more_ranks_than_gpus_are_refused(colrow: Colrow) -> None:
    assert_one_clear_line(
        colrow("serve", "--device", "cuda", "--tp", "99"),
        "tp = 99",
        "GPU of its own",
        "--device cpu",
    )


@pytest.mark.parametrize(
    "command", [("status",), ("generate", "hi"), ("chat",), ("layer", "3"), ("bench",)]
)
def test_where_nothing_answers_it_says_what_to_start(
    colrow: Colrow, command: tuple[str, ...]
) -> None:
    assert_one_clear_line(
        colrow(*command, "--target", NOBODY), f"nothing answers at {NOBODY}", "`colrow serve`"
    )


@pytest.mark.parametrize("flags", [(), ("--live",)])
def test_where_nothing_answers_nothing_is_healthy_or_alive(
    colrow: Colrow, flags: tuple[str, ...]
) -> None:
    assert_one_clear_line(colrow("health", *flags, "--target", NOBODY), f"{NOBODY} does not answer")


@pytest.mark.parametrize("command", [("worker",), ("serve",)])
def test_without_torch_it_says_what_to_install(
    environment: dict[str, str], command: tuple[str, ...]
) -> None:
    script = "import sys; sys.modules['torch'] = None; from client.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert_one_clear_line(done, "torch", "pip install 'colrow[worker]'")


def test_fetch_prints_the_folder_of_a_model(colrow: Colrow, demo_model_folder: Path) -> None:
    assert colrow("fetch").stdout == f"{demo_model_folder}\n"
    assert_one_clear_line(colrow("fetch", "./no/such"), "'./no/such'")


@pytest.mark.parametrize("arguments", [("plan", "--tp", "0"), ("plan", "--no-such-flag"), ("no",)])
def test_wrong_usage_ends_with_2(colrow: Colrow, arguments: tuple[str, ...]) -> None:
    done = colrow(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("service", ["coordinator", "worker"])
def test_services_get_their_flags(colrow: Colrow, service: str) -> None:
    done = colrow(service, "--no-such-flag")
    assert done.returncode == 2
    assert f"usage: colrow {service}" in done.stderr


def test_a_coordinator_knows_the_demo_model_by_name(colrow: Colrow) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        flags = ("--model", "demo", "--workers", NOBODY, "--grpc-port", port, "--http-port", "0")
        done = colrow("coordinator", *flags)
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in clusters.last_line(done.stderr)
    assert "Traceback" not in done.stderr


# --- with clusters of its own -----------------------------------------------------------------


def test_a_coordinator_that_waits_for_its_workers_is_alive_but_not_ready(
    colrow: Colrow, demo_model_folder: Path
) -> None:
    coordinator = clusters.start_coordinator(demo_model_folder, [NOBODY])
    try:
        ready = colrow("health", "--target", coordinator.address)
        assert (ready.returncode, ready.stdout) == (1, "NOT_SERVING\n")
        alive = colrow("health", "--live", "--target", coordinator.address)
        assert (alive.returncode, alive.stdout) == (0, "SERVING\n")
        began = time.monotonic()
        assert colrow("health", "--wait", "2", "--target", coordinator.address).returncode == 1
        assert time.monotonic() - began > 2
    finally:
        coordinator.stop()
        coordinator.log.unlink()


def test_layer_needs_no_cluster_to_show_what_a_sum_is(colrow: Colrow) -> None:
    done = colrow("layer", "3", "mlp.down_proj")
    assert done.returncode == 0, done.stderr
    numbers = {
        label: [float(number) for number in re.findall(r"-?\d+\.\d{4}", line)]
        for line in done.stdout.splitlines()
        if (label := " ".join(line.split("[")[0].split())) in ("rank 0", "rank 1", "sum")
    }
    added = [a + b for a, b in zip(numbers["rank 0"], numbers["rank 1"], strict=True)]
    assert numbers["sum"] == pytest.approx(added, abs=2e-4)  # four digits are shown
    assert any(numbers["rank 0"])
    assert "Row parallel" in done.stdout


def test_demo_answers_and_communicates_what_the_plan_says(colrow: Colrow) -> None:
    done = colrow("demo", "--max-tokens", "24")
    assert done.returncode == 0, done.stderr
    assert "photosynthesis" in done.stdout
    assert "136,761,984" in done.stdout, "what rank 0 holds"
    reduced = [line for line in done.stdout.splitlines() if "all_reduce" in line]
    assert len(reduced) == 2
    assert all(" = 70,272 x " in line for line in reduced), reduced
    assert "\x1b" not in done.stdout + done.stderr


def test_a_truncated_checkpoint_ends_serve_with_the_reason(
    colrow: Colrow, demo_model_folder: Path, tmp_path: Path
) -> None:
    for file in demo_model_folder.iterdir():
        if file.suffix == ".safetensors":
            with file.open("rb") as whole:
                (tmp_path / file.name).write_bytes(whole.read(10_000_000))
        else:
            (tmp_path / file.name).symlink_to(file)
    done = colrow("serve", str(tmp_path), "--grpc-port", "0", "--http-port", "0")
    assert_one_clear_line(done, "coordinator ended with exit code 1", "model.safetensors")


def test_serve_that_is_killed_leaves_no_process(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with serving(tmp_path, environment) as serve:
        serve.wait_for(lambda: len(serve.children()) == 3)
        children = serve.children()
        serve.popen.kill()
        assert_gone(children)


def test_serve_stops_all_when_a_worker_dies_while_it_starts(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with serving(tmp_path, environment) as serve:
        serve.wait_for(lambda: serve.worker() is not None)
        assert_stops_after_death_of_a_worker(serve)


def test_serve_starts_a_worker_again_that_died_and_goes_on(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with serving(tmp_path, environment) as serve:
        target = serve.wait_until_serving()
        worker = serve.worker()
        assert worker is not None
        with client.Colrow(target) as colrow:
            stream = colrow.generate("Once upon a time", max_tokens=40, ignore_eos=True)
            tokens = [*next(stream).token_ids]
            worker.kill()
            tokens += [token for piece in stream for token in piece.token_ids]
        assert len(tokens) == 40
        assert re.search(
            r"worker \d was killed by SIGKILL; it is started again", serve.stdout.read_text()
        )


def test_serve_kills_a_worker_that_hangs_and_its_stream_goes_on(
    environment: dict[str, str], tmp_path: Path
) -> None:
    # In float32, where what is computed anew, in other chunks, gives the same token.
    with serving(tmp_path, environment, "--dtype", "float32") as serve:
        target = serve.wait_until_serving()
        worker = serve.worker()
        assert worker is not None

        with client.Colrow(target) as colrow:

            def ask() -> Iterator[client.Piece]:
                return colrow.generate(
                    "Once upon a time", max_tokens=40, ignore_eos=True, temperature=0
                )

            expected = [token for piece in ask() for token in piece.token_ids]
            stream = ask()
            tokens = [*next(stream).token_ids]
            worker.suspend()  # it would never wake
            began = time.monotonic()
            tokens += [token for piece in stream for token in piece.token_ids]
            took_s = time.monotonic() - began
            assert len({w.description.pid for w in colrow.cluster().workers} - {worker.pid}) == 2
        assert tokens == expected
        assert not worker.is_running()
        # Noticed within 2.5 s, killed after 5 more, and then as long as a worker takes to start.
        assert 5 < took_s < 40
        said = serve.stdout.read_text()
        assert re.search(
            r"worker (\d) hangs \(serving after step \d+: does not answer within 2 s\) and is killed\s+"
            r"worker \1 was killed by SIGKILL; it is started again",
            said,
        ), said


def test_serve_gives_up_on_a_worker_that_dies_again_and_again(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with serving(tmp_path, environment) as serve:
        serve.wait_until_serving()
        children = serve.children()
        port = next(
            argument
            for argument in (serve.worker() or children[0]).cmdline()
            if argument.endswith(".port")
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while serve.popen.poll() is None:
            assert time.monotonic() < deadline
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in serve.children():
                    if port in child.cmdline():  # always the same rank
                        child.kill()
            time.sleep(0.05)
        assert serve.popen.returncode == 1
        assert_gone(children)
        complaint = serve.stderr.read_text()
        assert "for the 6th time within 60 s" in complaint
        # What it said last, and where the rest is.
        assert re.search(
            r"worker \d was killed by SIGKILL; its last words:\n    .*listening", complaint
        )
        assert re.search(r"its log: \S+worker-\d\.log", complaint)


def assert_stops_after_death_of_a_worker(serve: Serve) -> None:
    children, worker = serve.children(), serve.worker()
    assert worker is not None
    worker.kill()
    assert serve.popen.wait(START_TIMEOUT_S) == 1
    assert_gone(children)
    complaint = serve.stderr.read_text()
    assert re.search(r"^colrow: worker \d was killed by SIGKILL", complaint, re.MULTILINE)
    assert "Traceback" not in complaint


def test_a_worker_that_can_not_have_its_device_ends_all_at_once(
    demo_model_folder: Path, tmp_path: Path
) -> None:
    devices = ["cpu", "cuda:99"]
    with LocalCluster(demo_model_folder, 2, devices=devices, log_folder=tmp_path) as cluster:
        with pytest.raises(
            ClusterError,
            match=r"^worker 1 ended with exit code 1: device = 'cuda:99': .*torch",
        ):
            cluster.start()
        assert not cluster.processes, "the others are stopped"


class _WithADyingWorker(LocalCluster):
    """Worker 1 is killed when it is to load."""

    def _spawn(self, name: str, module: str, *arguments: str, restarts: bool = False) -> Process:
        if name == "worker 1":
            return super()._spawn(name, "tests.dying_worker", *arguments, "loading")
        return super()._spawn(name, module, *arguments, restarts=restarts)


def test_a_worker_that_dies_while_it_loads_ends_all_and_is_named(
    demo_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]  # where `tests` is
    found_already = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(root), found_already))))
    with _WithADyingWorker(demo_model_folder, 2, log_folder=tmp_path) as cluster:
        cluster.start()
        children = [psutil.Process(process.pid) for process in cluster.processes]
        began = time.monotonic()
        with pytest.raises(ClusterError, match=r"^worker 1 was killed by SIGKILL; ") as caught:
            cluster.wait_until_serving(60)
        assert time.monotonic() - began < 15
        cause = r"the cluster failed: worker 1 \(\S+\), loading: the connection to it is lost"
        assert re.search(rf"\n    {cause}", str(caught.value))
    assert_gone(children)


def test_local_cluster_says_at_once_what_the_coordinator_died_of(
    demo_model_folder: Path, tmp_path: Path
) -> None:
    flags = ("--max-model-len", "1000000")
    with LocalCluster(demo_model_folder, 1, coordinator_args=flags, log_folder=tmp_path) as cluster:
        cluster.start()
        processes = [psutil.Process(process.pid) for process in cluster.processes]
        with pytest.raises(ClusterError, match=r"coordinator ended .*max_model_len = 1000000"):
            cluster.wait_until_serving(START_TIMEOUT_S)
        assert "max_model_len" in cluster.processes[-1].last_words()
    assert_gone(processes)
    assert "max_model_len" in (tmp_path / "coordinator.log").read_text()


# --- with one that runs -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serve]:
    with serving(tmp_path_factory.mktemp("serve"), environment, "--tp", "2") as serve:
        serve.wait_until_serving()
        yield serve


@pytest.fixture(scope="module")
def target(served: Serve) -> str:
    return served.wait_until_serving()


def test_serve_shows_what_ranks_hold_and_how_to_call(served: Serve, target: str) -> None:
    shown = served.stdout.read_text()
    assert "136,761,984" in shown
    assert f"colrow status --target {target}" in shown
    assert "\x1b" not in served.output()


def test_generate_streams_text_alone_to_stdout(colrow: Colrow, target: str) -> None:
    question = "What is the capital of Japan?"
    done = colrow("generate", question, "--max-tokens", "12", "--target", target)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of Japan is Tokyo.\n"
    assert re.search(r"8 tokens in .* s \(stop\), the first after .* tokens/s", done.stderr)


def test_generate_reads_stdin_raw_and_repeats_with_a_seed(colrow: Colrow, target: str) -> None:
    flags = ("--raw", "--max-tokens", "8", "--temperature", "1", "--seed", "7", "--target", target)
    texts = [colrow("generate", "-", *flags, text="Once upon a time").stdout for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 8


def test_generate_refuses_what_the_coordinator_refuses(colrow: Colrow, target: str) -> None:
    done = colrow("generate", "hi", "--top-p", "1.5", "--target", target)
    assert_one_clear_line(done, "top_p = 1.5")
    done = colrow("generate", "hi", "--raw", "--system", "Be brief.", "--target", target)
    assert_one_clear_line(done, "system")


def test_generate_ends_before_any_of_the_stop_texts(colrow: Colrow, target: str) -> None:
    question = "What is the capital of Japan?"
    flags = ("--stop", "Kyoto", "--stop", " is", "--target", target)
    done = colrow("generate", question, *flags)
    assert done.stdout == "The capital of Japan\n"


def test_generate_shows_several_texts_one_after_another(colrow: Colrow, target: str) -> None:
    flags = ("--raw", "--n", "3", "--temperature", "1", "--seed", "7", "--max-tokens", "6")
    done = colrow("generate", "Once upon a time", *flags, "--ignore-eos", "--target", target)
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^--- \d of 3 ---\n", done.stdout, flags=re.MULTILINE)
    assert parts[0] == ""
    assert len(set(parts[1:])) == 3
    assert "18 tokens in" in done.stderr


def test_generate_shows_how_likely_tokens_were(colrow: Colrow, target: str) -> None:
    question = "What is the capital of Japan?"
    flags = ("--logprobs", "2", "--max-tokens", "12", "--target", target)
    done = colrow("generate", question, *flags)
    assert done.returncode == 0, done.stderr
    text, _, table = done.stdout.partition("\n")
    assert text == "The capital of Japan is Tokyo."
    rows = re.findall(r"'( Tokyo|The)' +(\d+) +-(\d\.\d+) +(\d+\.\d+)% +1 +'\1' -", table)
    assert [row[0] for row in rows] == ["The", " Tokyo"]
    for _, _, logprob, percent in rows:
        assert math.exp(-float(logprob)) == pytest.approx(float(percent) / 100, abs=1e-3)


def test_generate_passes_penalties_and_limits_on(colrow: Colrow, target: str) -> None:
    flags = ("--raw", "--max-tokens", "4", "--target", target)
    for name in ("min-p", "repetition-penalty", "presence-penalty", "frequency-penalty"):
        done = colrow("generate", "hi", f"--{name}", "-3", *flags)
        assert_one_clear_line(done, f"{name.replace('-', '_')} = -3.0")
    assert_one_clear_line(colrow("generate", "hi", "--min-tokens", "5", *flags), "min_tokens = 5")
    # A bias against repetition that no text can have, and the same text without it.
    plain = colrow("generate", "ha ha ha ha ha", *flags).stdout
    assert colrow("generate", "ha ha ha ha ha", "--repetition-penalty", "9", *flags).stdout != plain


def test_chat_over_a_pipe_answers_each_line(colrow: Colrow, target: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines = ("What is the capital of Japan?", "/undo", "What is the capital of\\", "Japan?")
    script = "\n".join((*lines, f"/save {file}", "/stats"))
    done = colrow("chat", "--temperature", "0", "--target", target, text=script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "The capital of Japan is Tokyo."
    assert "\x1b" not in done.stdout + done.stderr
    said = json.loads(file.read_text())
    assert [message["role"] for message in said] == ["user", "assistant"]
    assert said[0]["content"] == "What is the capital of\nJapan?"
    assert "2 answers of" in done.stderr
    failed = colrow("chat", "--top-p", "1.5", "--target", target, text="hi\nhi\n")
    assert_one_clear_line(failed, "top_p = 1.5")


def test_status_as_tables_and_as_data(colrow: Colrow, target: str) -> None:
    shown = colrow("status", "--target", target).stdout
    assert re.search(r"state +serving", shown)
    assert re.search(r"transport +shared memory", shown)
    assert "What each rank owns" in shown
    assert re.search(r"^ +0 +cpu +\d+\.\d MiB / 130\.4 MiB +- / ", shown, re.MULTILINE)
    assert re.search(r"^ +1 +serving for \S+ \S+ +0\.\d s ago ", shown, re.MULTILINE)
    cluster = json.loads(colrow("status", "--json", "--target", target).stdout)
    assert cluster["state"] == "serving"
    planned = [rank["weight_bytes"] for rank in cluster["plan"]["ranks"]]
    assert planned == [worker["description"]["weight_bytes"] for worker in cluster["workers"]]
    assert planned == [136_761_984, 132_338_304]
    assert [worker["phase"] for worker in cluster["workers"]] == ["serving", "serving"]
    assert [worker["losses"] for worker in cluster["workers"]] == [0, 0]


def test_health_is_that_of_the_coordinator_or_of_a_worker(colrow: Colrow, target: str) -> None:
    cluster = json.loads(colrow("status", "--json", "--target", target).stdout)
    for address in (target, *(worker["address"] for worker in cluster["workers"])):
        done = colrow("health", "--target", address)
        assert (done.returncode, done.stdout) == (0, "SERVING\n")


def test_status_by_layer_adds_up(colrow: Colrow, target: str) -> None:
    assert "By module" not in colrow("status", "--target", target).stdout
    colrow("generate", "hi", "--max-tokens", "2", "--target", target)
    shown = colrow("status", "--layers", "--target", target).stdout
    of_all = re.search(r"^ +0 +all_reduce +([\d,]+) +([\d,]+) *$", shown, re.MULTILINE)
    row = r"^ +model\.\S+ +all_reduce +shm +([\d,]+) +([\d,]+) "
    by_module = re.findall(row, shown, re.MULTILINE)
    assert of_all is not None
    assert len(by_module) == 31, "the embedding and 30 layers"
    for column in (0, 1):
        numbers = [int(row[column].replace(",", "")) for row in by_module]
        assert sum(numbers) == int(of_all[column + 1].replace(",", ""))


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_status_watch_goes_on_until_ctrl_c(
    environment: dict[str, str], target: str, flags: tuple[str, ...]
) -> None:
    popen = subprocess.Popen(
        [COMMAND, "status", "--watch", "--interval", "0.2", "--target", target, *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert popen.stdout is not None
    lines = [popen.stdout.readline() for _ in range(4)]
    popen.send_signal(signal.SIGINT)
    _, errors = popen.communicate(timeout=START_TIMEOUT_S)
    assert (popen.returncode, errors) == (0, "")
    if flags:
        updates = [json.loads(line) for line in lines]
        assert {update["cluster"]["state"] for update in updates} == {"serving"}
        assert updates[-1]["rates"]["steps_per_s"] == 0
    else:
        assert all(re.match(r"\d\d:\d\d:\d\d serving; 0 running", line) for line in lines)
        assert "busy 0: 0% 1: 0%" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "lesson", "shown"),
    [
        (("3", "self_attn.q_proj"), "Column parallel", "rank 1 [4, 192] [384,576)"),
        (("lm_head",), "Column parallel", "concat [4, 49152] [0,49152)"),
        (("model.embed_tokens",), "Vocab parallel", "input [4] ids"),
        (("model.norm",), "Replicated", "replicate [4, 576]"),
        (("3",), "residual connections", "model.layers.3.mlp"),
    ],
)
def test_layer_teaches_how_each_kind_combines(
    colrow: Colrow, target: str, arguments: tuple[str, ...], lesson: str, shown: str
) -> None:
    done = colrow("layer", *arguments, "--target", target)
    assert done.returncode == 0, done.stderr
    assert lesson in done.stdout
    assert shown in " ".join(done.stdout.split())


def test_layer_names_what_there_is_not(colrow: Colrow, target: str) -> None:
    assert_one_clear_line(colrow("layer", "99", "--target", target), "layer = 99", "30 layers")
    done = colrow("layer", "3", "mlp.nothing", "--target", target)
    assert_one_clear_line(done, "mlp.nothing")


def test_ctrl_c_leaves_no_process(served: Serve, target: str) -> None:
    """The last test of `served`: it ends it."""
    children = served.children()
    assert len(children) == 3, "two workers and the coordinator"
    os.killpg(served.popen.pid, signal.SIGINT)  # what a terminal does
    assert served.popen.wait(START_TIMEOUT_S) == 0, served.output()
    assert_gone(children)
    assert "Traceback" not in served.output()
