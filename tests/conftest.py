"""Fixtures that several test modules share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from client.demo_model import DEMO_MODEL_NAME, convert_demo_model
from tests.clusters import WorkerPool

# How long an example takes says more of the machine than of the code; pytest-timeout bounds the whole.
settings.register_profile("colrow", deadline=None)
settings.load_profile("colrow")

# A shell starts its background jobs with SIGINT ignored, and that is inherited. Tests send it to the
# processes that they start, which get the default again from a parent that has a handler.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[WorkerPool]:
    """Worker processes for the whole session, each used by one test at a time."""
    pool = WorkerPool()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def demo_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, converted once; where `colrow` finds it with `demo_cache_home`."""
    cache = tmp_path_factory.mktemp("cache")
    return convert_demo_model(cache / "colrow" / "models" / DEMO_MODEL_NAME)


@pytest.fixture(scope="session")
def demo_cache_home(demo_model_folder: Path) -> Path:
    """What `XDG_CACHE_HOME` has to be for the command to find the demo model converted."""
    return demo_model_folder.parents[2]
