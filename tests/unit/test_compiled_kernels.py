"""Every Triton kernel compiles for a GPU as its launcher calls it, and keeps its numbers in registers.

Neither takes a GPU: Triton brings its own compiler, assembler and disassembler.
"""

import importlib.util
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shard_worker import kernels
from shard_worker.forward_batch import PackedSpan

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.timeout(300),
]

# hidden, MLP width, query heads, KV heads, head dimension
LLAMA_8B = (4096, 14336, 32, 8, 128)
SMOLLM2_135M = (576, 1536, 9, 3, 64)


class NoGpu:
    """Stands for a GPU of compute capability 9.0 as far as compiling goes."""

    def get_current_device(self) -> int:
        return -1  # no real one's, whose kernels Triton keeps

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What was compiled by the launches of a test, none of which runs."""
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", NoGpu())
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return found


def spilled_bytes(cubin: bytes, folder: Path) -> int:
    """Of a thread's local memory, which is where registers are spilled to."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)
    assert found, usage
    return sum(map(int, found))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("model", [LLAMA_8B, SMOLLM2_135M], ids=str)
def test_kernels_compile_for_sm_90_and_do_not_spill(
    model: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    compiled: list[Any],
    tmp_path: Path,
) -> None:
    hidden, width, q_heads, kv_heads, head_dim = model

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")  # launchers ask for no more

    def attend(attention: Callable[..., Tensor], tokens: int, *place: Any) -> None:
        cache = empty(1000, 16, kv_heads, head_dim)
        q = empty(tokens, q_heads, head_dim)
        attention(q, cache, cache, *place, scale=1.0, window=None)

    x, heads = empty(8, hidden), empty(8, kv_heads, head_dim)
    all_heads, cached = empty(8, q_heads + 2 * kv_heads, head_dim), empty(9, 16, kv_heads, head_dim)
    slots = empty(8, dtype=torch.int32)
    kernels.norm.rms_norm(x, empty(hidden), 1e-5)
    kernels.norm.rms_norm_heads_(heads, empty(head_dim), 1e-5)
    kernels.norm.add_rms_norm(x, x, empty(hidden), 1e-5)
    kernels.activation.silu_mul(empty(8, 2 * width))
    kernels.rotary.rotate_(empty(8, q_heads, head_dim), x, x)
    kernels.gemv.gemv(empty(width, hidden), empty(1, hidden), empty(width))
    kernels.rotary.rotate_and_write_(all_heads, x, x, cached, cached, slots)
    kernels.attention.write_kv(heads, heads, cached, cached, slots)
    for sequences in (1, 128):  # one is divided over programs, of many each is one program's
        tables, lens = (empty(*of, dtype=torch.int32) for of in ((sequences, 512), (sequences,)))
        attend(kernels.attention.decode_attention, sequences, tables, lens)
    packed = PackedSpan(*(empty(*of, dtype=torch.int32) for of in ((2, 40), (3, 8), (8, 512))))
    attend(kernels.attention.packed_attention, 512, packed)

    names = {kernel.name for kernel in compiled}
    assert names == {
        "_add_rms_norm", "_silu_mul", "_rotate", "_gemv", "_write", "_decode", "_merge", "_packed",
    }  # fmt: skip
    # Exact products of float32 are made without tensor cores, of operands that fill the registers.
    may_spill = {"_decode", "_packed"} if dtype == torch.float32 else set()
    for kernel in compiled:
        if kernel.name not in may_spill:
            assert not spilled_bytes(kernel.asm["cubin"], tmp_path), kernel.name
