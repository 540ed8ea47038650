"""Whether torch, CuPy and NCCL fit together, and what to install where they do not.

Each `…_problem` takes versions and texts that its caller has found out, and returns one line, or ""
where nothing is wrong.
"""

import importlib.metadata
import re
from collections.abc import Sequence

CUPY_PACKAGES = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
"""All of them install the same module; of two, the one that came last has overwritten the other."""

NCCL = "libnccl.so"


def _major(torch_cuda: str) -> str:
    return torch_cuda.partition(".")[0]


def extra_of(torch_cuda: str) -> str:
    """The extra of `colrow` that brings CuPy for a torch that is built for this version of CUDA."""
    return f"colrow[cuda{_major(torch_cuda)}]"


def torch_problem(version: str, torch_cuda: str | None) -> str:
    """Of a torch that is to use a GPU; `torch_cuda` is its `torch.version.cuda`."""
    if torch_cuda is not None:
        return ""
    return (
        f"this torch ({version}) is a build without CUDA; install one with it, as with pip install "
        "--force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
    )


def device_problem(index: int, num_devices: int) -> str:
    """Of the GPU `index`, where torch sees `num_devices` of them."""
    if index < num_devices:
        return ""
    if not num_devices:
        return (
            "torch sees no GPU: the NVIDIA driver is not there, too old, or not in this container, or "
            "CUDA_VISIBLE_DEVICES hides them"
        )
    last = num_devices - 1
    seen = "cuda:0" if not last else f"cuda:0 to cuda:{last}"
    return f"torch sees {num_devices} here, {seen}; CUDA_VISIBLE_DEVICES may hide others"


def cupy_packages() -> tuple[str, ...]:
    """The packages of this installation that bring CuPy."""
    found = []
    for package in CUPY_PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(package)
    return tuple(found)


def cupy_import_problem(error: str, torch_cuda: str) -> str:
    """Of a CuPy whose import fails with `error`, for which CuPy takes a page."""
    lines = [line.strip() for line in error.splitlines() if line.strip(" =")]
    cause = lines[-1] if lines else "no reason given"
    return (
        f"CuPy can't be imported ({cause}); torch is built for CUDA {torch_cuda}: "
        f"pip install '{extra_of(torch_cuda)}'"
    )


def cupy_problem(torch_cuda: str, cupy_runtime_version: int) -> str:
    """Of a CuPy for another CUDA than torch's.

    cupy_runtime_version: of `cupy.cuda.runtime.runtimeGetVersion`, 13020 for CUDA 13.2.
    """
    major = cupy_runtime_version // 1000
    if str(major) == _major(torch_cuda):
        return ""
    return (
        f"CuPy is for CUDA {major}.{cupy_runtime_version % 1000 // 10}, torch for CUDA {torch_cuda}: "
        f"pip uninstall cupy-cuda{major}x, then pip install '{extra_of(torch_cuda)}'"
    )


def cupy_packages_problem(packages: Sequence[str], torch_cuda: str) -> str:
    """Of several packages at once that bring CuPy, as `cupy_packages` finds them."""
    if len(packages) < 2:
        return ""
    return (
        f"{' and '.join(packages)} are installed at once and overwrite each other: pip uninstall "
        f"{' '.join(packages)}, then pip install '{extra_of(torch_cuda)}'"
    )


def nccl_problem(maps: str) -> str:
    """Of a process, by its /proc/self/maps, that has loaded another NCCL beside torch's."""
    paths = mapped_libraries(maps, NCCL)
    if len(paths) < 2:
        return ""
    return (
        f"{len(paths)} NCCL libraries are loaded, {' and '.join(paths)}: keep the one that torch "
        "brings, and take the others out of LD_LIBRARY_PATH and CuPy's library folder"
    )


def mapped_libraries(maps: str, name: str) -> tuple[str, ...]:
    """The files that a /proc/PID/maps shows of a library, `libnccl.so` of any version, each once."""
    is_version = re.compile(rf"/{re.escape(name)}(\.\d+)*$")
    found: dict[str, None] = {}
    for line in maps.splitlines():
        # address, permissions, offset, device, inode, and of a mapped file its path
        path = line.split(maxsplit=5)[5:]
        if path and is_version.search(file := path[0].removesuffix(" (deleted)").strip()):
            found[file] = None
    return tuple(found)


def nccl_version(code: int) -> str:
    """`ncclGetVersion`'s number as a version: 22809 is 2.28.9."""
    return f"{code // 10_000}.{code % 10_000 // 100}.{code % 100}"
