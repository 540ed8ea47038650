"""A coordinator one of whose parts fails does not go on without it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from colrow.errors import Internal
from coordinator.__main__ import Coordinator
from coordinator.cluster import State
from coordinator.config import parse


class Parts:
    """A cluster that serves and servers that answer, except for what `failing` names."""

    state = State.SERVING

    def __init__(self, failing: str) -> None:
        self.failing = failing
        self.stopped: list[str] = []

    def raise_for(self, part: str) -> None:
        if part == self.failing:
            raise Internal(f"{part} failed")

    async def run(self) -> None:
        try:
            await asyncio.sleep(0)
            self.raise_for("cluster")
            await asyncio.Event().wait()
        finally:
            self.stopped.append("cluster")

    async def changes(self, interval_s: float | None) -> AsyncIterator[None]:
        yield
        await asyncio.Event().wait()

    async def set_serving(self, serving: bool) -> None:
        self.raise_for("health")

    async def stop(self, grace_s: float | None = None) -> None:
        self.stopped.append("grpc" if grace_s is not None else "other")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("failing", ["cluster", "health"])
async def test_it_stops_with_the_error_of_the_part_that_failed(failing: str) -> None:
    parts: Any = Parts(failing)
    coordinator = Coordinator(
        parse(["--model", "m", "--workers", "a:1"]), parts, parts, parts, None
    )
    with pytest.raises(Internal, match=f"{failing} failed"):
        await coordinator.run()
    assert sorted(parts.stopped) == ["cluster", "grpc", "other", "other"]
