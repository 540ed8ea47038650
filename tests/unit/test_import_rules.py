"""Who may import whom: by the sources, and by what a process has loaded once it is up."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[2]

WIRE = {"grpc", "grpc_channelz", "grpc_health", "grpc_reflection", "grpc_status", "google"}
"""gRPC, and protobuf as `google.protobuf`."""

CONVERSIONS = ("descriptions", "operators", "plans", "tensors", "users", "workers")

EDGES = {
    "coordinator": {
        *(f"convert.{part}" for part in CONVERSIONS),
        *("grpc_server", "worker_client"),
    },
    "shard_worker": {"convert", "grpc_server"},
}
"""The modules that may see gRPC and protobuf."""

WEB = {"fastapi", "pydantic", "pydantic_core", "starlette", "uvicorn"}
"""What the HTTP API is made of; what it looks like is said with pydantic."""

PURE = (
    *("block_manager", "cost_model", "families", "model_spec"),
    *("scheduler", "sequence", "shard_plan"),
)
"""Modules of the coordinator that only compute."""


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    assert found
    return found


def imports(path: Path) -> Iterator[str]:
    """The modules that a source imports anywhere in it, functions and type checking included."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, node.module or ""]).strip(".") if node.level else node.module
            for alias in node.names:
                yield f"{base}.{alias.name}"


def uses(name: str, module: str) -> bool:
    """Whether an imported name is a module or lies within it."""
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("coordinator", ("torch", "cupy", "transformers", "shard_worker", "client", "tests")),
        ("shard_worker", ("coordinator", "client", "transformers", "tokenizers", "tests")),
        ("client", ("torch", "cupy", "transformers", "tests")),
        ("protos/colrow", ("coordinator", "shard_worker", "client", "torch", "tests")),
        ("benchmarks", ("tests",)),
    ],
)
def test_a_package_does_not_import_what_is_not_its_business(
    package: str, forbidden: tuple[str, ...]
) -> None:
    broken = [
        f"{module} imports {name}"
        for module, path in modules(package).items()
        for name in imports(path)
        for other in forbidden
        if uses(name, other)
    ]
    assert not broken


def sees_the_wire(path: Path) -> bool:
    ours = ("colrow.v1", "colrow.rpc", "colrow.rpc_access")
    return any(
        name.partition(".")[0] in WIRE or any(uses(name, module) for module in ours)
        for name in imports(path)
    )


@pytest.mark.parametrize("package", EDGES)
def test_only_the_edges_of_a_service_see_grpc_and_protobuf(package: str) -> None:
    seeing = {
        module.removeprefix(f"{package}.")
        for module, path in modules(package).items()
        if sees_the_wire(path)
    }
    assert seeing == EDGES[package]


def test_only_the_http_api_sees_what_it_is_made_of() -> None:
    seeing = {
        module
        for package in ("coordinator", "shard_worker", "client", "protos/colrow")
        for module, path in modules(package).items()
        for name in imports(path)
        if name.partition(".")[0] in WEB
    }
    assert seeing
    assert all(uses(module, "coordinator.http") for module in seeing)


def test_of_the_contracts_own_modules_two_see_grpc_and_protobuf() -> None:
    seeing = {path.name for path in (ROOT / "protos/colrow").glob("*.py") if sees_the_wire(path)}
    assert seeing == {"rpc.py", "rpc_access.py"}


def test_in_the_client_one_module_makes_calls() -> None:
    calling = {
        module
        for module, path in modules("client").items()
        for name in imports(path)
        if uses(name, "grpc") or name.startswith("colrow.rpc") or name.endswith("_pb2_grpc")
    }
    assert calling == {"client.grpc_client"}


def test_scheduling_and_planning_use_nothing_but_python_and_each_other() -> None:
    allowed = {f"coordinator.{name}" for name in PURE}
    for name in PURE:
        for imported in imports(ROOT / "coordinator" / f"{name}.py"):
            top = imported.partition(".")[0]
            assert imported.rpartition(".")[0] in allowed or top in sys.stdlib_module_names
            assert top not in {
                "asyncio",
                "io",
                "os",
                "pathlib",
                "socket",
                "subprocess",
                "threading",
            }


@pytest.mark.parametrize("package", EDGES)
def test_only_the_settings_of_a_service_read_the_environment(package: str) -> None:
    for module, path in modules(package).items():
        if module == f"{package}.config":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"environ", "getenv"}, module


RUNS_WHAT_IT_READS = {
    *("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
    *("torch.load", "torch.save", "torch.jit", "torch.hub", "torch.package", "runpy"),
}
RUNS_TEXT = {"eval", "exec", "compile", "__import__", "all_gather_object", "broadcast_object_list"}


@pytest.mark.parametrize("package", ["coordinator", "shard_worker", "client", "protos/colrow"])
def test_nothing_that_is_read_or_received_is_run(package: str) -> None:
    """No pickle, no code of a model: checkpoints are safetensors, configs JSON, templates sandboxed."""
    for module, path in modules(package).items():
        if module == "client.child":  # starts a service of ours by its name
            continue
        for name in imports(path):
            assert not any(uses(name, other) for other in RUNS_WHAT_IT_READS), (module, name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                dotted = ast.unparse(node)
                assert dotted not in RUNS_WHAT_IT_READS, (module, dotted)
                assert node.attr not in RUNS_TEXT - {"compile"}, (module, dotted)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in RUNS_TEXT, (module, node.func.id)
            elif isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", module


def loaded(*names: str) -> set[str]:
    """The modules, by name, that a fresh process has once it has imported these."""
    script = f"import {', '.join(names)}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("service", "expected", "forbidden"),
    [
        (
            "coordinator",
            {"grpc", "tokenizers", "coordinator.scheduler"},
            {"torch", "cupy", "transformers", "shard_worker", "client"},
        ),
        (
            "shard_worker",
            {"grpc", "torch", "shard_worker.model_runner"},
            {"coordinator", "client", "transformers", "tokenizers", "huggingface_hub"},
        ),
    ],
)
def test_a_running_service_has_not_loaded_what_it_must_not_import(
    service: str, expected: set[str], forbidden: set[str]
) -> None:
    found = loaded(f"{service}.__main__")
    assert expected <= found
    assert not found & forbidden


@pytest.mark.parametrize("package", EDGES)
def test_what_lies_within_the_edges_loads_without_grpc_and_protobuf(package: str) -> None:
    within = [
        module
        for module in modules(package)
        if module.removeprefix(f"{package}.") not in EDGES[package]
        and module.rpartition(".")[2] != "__main__"
        # Kernels need Triton, which not every build of torch brings.
        and not module.startswith("shard_worker.kernels.")
    ]
    assert len(within) > 10
    found = loaded(*within)
    assert set(within) <= found
    assert not found & {*WIRE - {"google"}, "google.protobuf", "colrow.rpc", "colrow.rpc_access"}
