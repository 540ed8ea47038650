"""Fused operations of a decode step on a GPU, in Triton, a file each.

What is here is small and bound by latency or memory: each operation reads its inputs once and writes its
output once. Products are cuBLAS's. Nothing below a layer imports this on a CPU, where Triton may be
missing; the layers have the same operations in plain torch, which tests hold these to.
"""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
