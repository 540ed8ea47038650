"""Fixtures that several test modules share."""

from collections.abc import Iterator

import pytest

from tests.clusters import WorkerPool


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[WorkerPool]:
    """Worker processes for the whole session, each used by one test at a time."""
    pool = WorkerPool()
    yield pool
    pool.stop()
