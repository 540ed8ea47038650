"""Tests of the Triton kernels, on a GPU or in Triton's interpreter on a CPU.

    python -m pytest tests/kernels                        # compiled, on a GPU
    TRITON_INTERPRET=1 python -m pytest tests/kernels     # interpreted

Which of the two it is Triton decides when it is imported. So where there is no GPU they are skipped in
the process of the suite, and tests/unit/test_interpreted_kernels.py runs them in one of their own.
"""

from pathlib import Path

import pytest
import torch

from tests.kernels.numbers import INTERPRETED

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETED or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU; test_interpreted_kernels.py runs them without one")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
