"""What is said of torch, CuPy and NCCL that do not fit together."""

import importlib.metadata

import pytest

from shard_worker import cuda_libraries as libraries

TORCH_NCCL = "/venv/lib/python3.12/site-packages/nvidia/nccl/lib/libnccl.so.2"
MAPS = f"""\
55d0c7a00000-55d0c7a01000 r--p 00000000 fe:01 1234                       /usr/bin/python3.12
7f1e5c000000-7f1e5c021000 rw-p 00000000 00:00 0
7f1e60000000-7f1e6a000000 r--p 00000000 fe:01 77                         {TORCH_NCCL}
7f1e6a000000-7f1e70000000 r-xp 0a000000 fe:01 77                         {TORCH_NCCL}
7f1e71000000-7f1e71100000 r--p 00000000 fe:01 78                         /opt/plugins/libnccl-net.so
7f1e72000000-7f1e72100000 r--p 00000000 fe:01 79                         /x/libs/nccl.cpython-312.so
7ffd1c9f0000-7ffd1ca11000 rw-p 00000000 00:00 0                          [stack]
"""


@pytest.mark.parametrize(
    ("torch_cuda", "runtime_version"), [("12.8", 12080), ("12.6", 12090), ("13.0", 13020)]
)
def test_cupy_of_the_same_major_version_is_fine(torch_cuda: str, runtime_version: int) -> None:
    assert libraries.cupy_problem(torch_cuda, runtime_version) == ""


@pytest.mark.parametrize(
    ("torch_cuda", "runtime_version", "parts"),
    [
        ("13.0", 12090, ("12.9", "13.0", "uninstall cupy-cuda12x", "'colrow[cuda13]'")),
        ("12.8", 13020, ("13.2", "12.8", "uninstall cupy-cuda13x", "'colrow[cuda12]'")),
    ],
)
def test_cupy_of_another_major_version_is_named_with_the_one_to_install(
    torch_cuda: str, runtime_version: int, parts: tuple[str, ...]
) -> None:
    problem = libraries.cupy_problem(torch_cuda, runtime_version)
    for part in parts:
        assert part in problem


def test_two_packages_of_cupy_at_once_are_both_named() -> None:
    assert libraries.cupy_packages_problem((), "13.0") == ""
    assert libraries.cupy_packages_problem(("cupy-cuda13x",), "13.0") == ""
    problem = libraries.cupy_packages_problem(("cupy-cuda12x", "cupy-cuda13x"), "13.0")
    assert "pip uninstall cupy-cuda12x cupy-cuda13x" in problem
    assert "pip install 'colrow[cuda13]'" in problem


def test_packages_of_cupy_are_found_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package in ("cupy-cuda12x", "cupy-cuda13x"):
            return "14.2.0"
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert libraries.cupy_packages() == ("cupy-cuda12x", "cupy-cuda13x")


def test_of_cupys_page_on_a_failed_import_the_cause_is_said() -> None:
    page = """
================================================================
Failed to import CuPy.

Original error:
  ImportError: libnvrtc.so.13: cannot open shared object file
================================================================
"""
    problem = libraries.cupy_import_problem(page, "13.0")
    assert "(ImportError: libnvrtc.so.13: cannot open shared object file)" in problem
    assert "pip install 'colrow[cuda13]'" in problem
    assert "\n" not in problem


def test_a_library_that_is_mapped_in_pieces_is_one() -> None:
    assert libraries.mapped_libraries(MAPS, libraries.NCCL) == (TORCH_NCCL,)
    assert libraries.nccl_problem(MAPS) == ""
    assert libraries.nccl_problem("") == ""


def test_two_nccls_in_one_process_are_a_problem_with_both_paths() -> None:
    other = "/root/.cupy/cuda lib/libnccl.so.2.27.7"
    maps = MAPS + f"7f1e80000000-7f1e81000000 r-xp 00000000 fe:01 99             {other}\n"
    assert libraries.mapped_libraries(maps, libraries.NCCL) == (TORCH_NCCL, other)
    problem = libraries.nccl_problem(maps)
    assert TORCH_NCCL in problem and other in problem


def test_a_library_that_was_replaced_on_disk_keeps_its_path() -> None:
    maps = "7f1e80000000-7f1e81000000 r-xp 00000000 fe:01 99    /usr/lib/libnccl.so.2 (deleted)\n"
    assert libraries.mapped_libraries(maps, libraries.NCCL) == ("/usr/lib/libnccl.so.2",)


@pytest.mark.parametrize(("code", "version"), [(22809, "2.28.9"), (23203, "2.32.3")])
def test_nccls_number_is_a_version(code: int, version: str) -> None:
    assert libraries.nccl_version(code) == version


def test_a_torch_for_cpus_is_told_from_one_for_gpus() -> None:
    assert libraries.torch_problem("2.13.0+cu130", "13.0") == ""
    problem = libraries.torch_problem("2.13.0+cpu", None)
    assert "2.13.0+cpu" in problem and "pip install" in problem


@pytest.mark.parametrize(
    ("num_devices", "words"),
    [
        (0, "CUDA_VISIBLE_DEVICES hides them"),
        (1, "torch sees 1 here, cuda:0;"),
        (2, "cuda:0 to cuda:1"),
    ],
)
def test_a_gpu_that_is_not_there_gets_those_that_are(num_devices: int, words: str) -> None:
    assert words in libraries.device_problem(num_devices, num_devices)
    assert libraries.device_problem(num_devices, num_devices + 1) == ""
